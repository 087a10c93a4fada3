"""Pipelines that flush: all micro-batches of an iteration use the same weights, then one update.

They compute what gradient accumulation on one device computes; staleness is 0. With equal stages,
m micro-batches and W workers an iteration takes (m + W - 1)(f + b) seconds, so that workers idle
for the fraction (W - 1)/(m + W - 1) of the time (the bubble).
"""

from __future__ import annotations

from ddg_sim.periodic import at_least, periodic
from ddg_sim.rule import Activations, Rule
from ddg_sim.schedule import (
    OpTemplate,
    Schedule,
    backward,
    backward_input,
    backward_weight,
    forward,
    recompute,
    update,
)


def gpipe(num_stages: int, micro_batches: int | None = None, replay: bool = False) -> Schedule:
    """GPipe (Huang et al., NeurIPS 2019, arXiv 1811.06965): all forward, then all backward.

    The backward passes run in reverse order, as in the paper's figure 2c (from memory)::

                   t=0              t=1
        worker 0   F0 F1 B1 B0 U1   F2 F3 B3 B2 U3
        worker 1   F0 F1 B1 B0 U1   F2 F3 B3 B2 U3

    Args:
        num_stages: number of stages K >= 1.
        micro_batches: micro-batches m >= 1 per iteration; None takes K.
        replay: keep only the stages' inputs and run them forward again (the paper's
            re-materialization).

    >>> print(gpipe(2, micro_batches=2))
    gpipe stages=2 sync=none activations=graph jacobian=stashed samples=2
    worker 0: F0(2t) F0(2t+1) B0(2t+1) B0(2t) U0(2t+1)
    worker 1: F1(2t) F1(2t+1) B1(2t+1) B1(2t) U1(2t+1)
    """
    m = _micro_batches(num_stages, micro_batches)

    def program(k: int) -> list[OpTemplate]:
        body = [forward(k, j) for j in range(m)]
        for j in reversed(range(m)):
            body += [recompute(k, j)] * replay + [backward(k, j)]
        return [*body, update(k, m - 1)]

    rule = Rule(Activations.INPUT) if replay else Rule()
    return periodic("gpipe", num_stages, program, rule=rule, samples=m)


def one_f_one_b(num_stages: int, micro_batches: int | None = None) -> Schedule:
    """1F1B with a flush: DAPPLE (Fan et al., PPoPP 2021), PipeDream-Flush (arXiv 2006.09503).

    GPipe's updates and, with equal stages, its time, but stage k (0-based) holds at most K - k
    micro-batches: after K-1-k forward passes it runs one forward and one backward in turn (order
    from memory)::

                   t=0                    t=1
        worker 0   F0 F1 F2 B0 B1 B2 U2   F3 F4 F5 B3 B4 B5 U5
        worker 1   F0 F1 B0 F2 B1 B2 U2   F3 F4 B3 F5 B4 B5 U5
        worker 2   F0 B0 F1 B1 F2 B2 U2   F3 B3 F4 B4 F5 B5 U5

    Args:
        num_stages: number of stages K >= 1.
        micro_batches: micro-batches m >= 1 per iteration; None takes K.

    >>> print(one_f_one_b(2, micro_batches=2))
    1f1b stages=2 sync=none activations=graph jacobian=stashed samples=2
    worker 0: F0(2t) F0(2t+1) B0(2t) B0(2t+1) U0(2t+1)
    worker 1: F1(2t) B1(2t) F1(2t+1) B1(2t+1) U1(2t+1)
    """
    m = _micro_batches(num_stages, micro_batches)

    def program(k: int) -> list[OpTemplate]:
        warm_up = num_stages - 1 - k
        forwards, backwards = [forward(k, j) for j in range(m)], [backward(k, j) for j in range(m)]
        return [*_in_turn(forwards, backwards, warm_up), update(k, m - 1)]

    return periodic("1f1b", num_stages, program, samples=m)


def interleaved(
    num_stages: int, micro_batches: int | None = None, chunks: int | None = None
) -> Schedule:
    """Interleaved 1F1B (Narayanan et al., SC 2021, arXiv 2104.04473): v stages per worker.

    Stage k lives on worker k mod W, W = K/v. With equal stages the bubble shrinks to
    (W-1)/(v m + W-1). Worker i runs 2(W-1-i) + (v-1)W forward passes before its first backward
    pass; forward passes take W micro-batches through its first stage, then through its second and
    so on, backward passes in reverse (order from memory of Megatron-LM's schedule). With v = 1 it
    is 1F1B, which runs W-1-i forward passes first::

                   t=0
        worker 0   F0/0 F1/0 F0/2 F1/2 B0/2 B1/2 B0/0 B1/0 U1/0 U1/2
        worker 1   F0/1 F1/1 F0/3 B0/3 F1/3 B1/3 B0/1 B1/1 U1/1 U1/3

    Args:
        num_stages: number of stages K, a multiple of ``chunks``.
        micro_batches: micro-batches m per iteration, a multiple of W; None takes W.
        chunks: stages per worker v >= 1; None takes 2.

    Raises:
        ValueError: naming the argument that is not such a multiple.

    >>> print(interleaved(2, micro_batches=1, chunks=2))
    interleaved stages=2 sync=none activations=graph jacobian=stashed samples=1
    worker 0: F0(t) F1(t) B1(t) B0(t) U0(t) U1(t)
    """
    v = at_least("chunks", 2 if chunks is None else chunks, 1)
    if num_stages % v or num_stages < 1:
        raise ValueError(f"num_stages must be a multiple of chunks={v}, got {num_stages}")
    count = num_stages // v
    m = _micro_batches(count, micro_batches)
    if m % count:
        raise ValueError(f"micro_batches must be a multiple of the {count} workers, got {m}")
    rounds = range(0, m, count)
    # (chunk, micro-batch): W micro-batches through a chunk, then through the next.
    turns = [(chunk, j + i) for j in rounds for chunk in range(v) for i in range(count)]

    def program(worker: int) -> list[OpTemplate]:
        warm_up = min((1 + (v > 1)) * (count - 1 - worker) + (v - 1) * count, v * m)
        forwards = [forward(chunk * count + worker, j) for chunk, j in turns]
        backwards = [backward((v - 1 - chunk) * count + worker, j) for chunk, j in turns]
        updates = [update(chunk * count + worker, m - 1) for chunk in range(v)]
        return [*_in_turn(forwards, backwards, warm_up), *updates]

    return periodic("interleaved", num_stages, program, workers=count, samples=m)


def zb_h1(num_stages: int, micro_batches: int | None = None) -> Schedule:
    """ZB-H1 (Qi et al., ICLR 2024, arXiv 2401.10241): 1F1B with backward passes in two halves.

    The gradient of the input (I) is sent on at once; the gradient of the weights (W) of stage k
    (0-based) comes k micro-batches late and fills what was the bubble at the end. As many
    micro-batches are held as by stage 1 of 1F1B. With equal stages and m >= K the bubble is
    (K-1)(i + max(0, f - w)) seconds: the paper's (K-1)(f + i - w) if f >= w, a third of 1F1B's if
    f = i = w; with f < w the first error cannot be back earlier. (Checked on public pages about
    the paper: the third, and that W is delayed by the warm-up. The order and the case f < w are
    derived here.)::

                   t=0
        worker 0   F0 F1 F2 I0 W0 I1 W1 I2 W2 U2
        worker 1   F0 F1 I0 F2 I1 W0 I2 W1 W2 U2
        worker 2   F0 I0 F1 I1 F2 I2 W0 W1 W2 U2

    Args:
        num_stages: number of stages K >= 1.
        micro_batches: micro-batches m >= 1 per iteration; None takes K.

    >>> print(zb_h1(2, micro_batches=2))
    zb-h1 stages=2 sync=none activations=graph jacobian=stashed samples=2
    worker 0: F0(2t) F0(2t+1) I0(2t) W0(2t) I0(2t+1) W0(2t+1) U0(2t+1)
    worker 1: F1(2t) I1(2t) F1(2t+1) I1(2t+1) W1(2t) W1(2t+1) U1(2t+1)
    """
    m = _micro_batches(num_stages, micro_batches)

    def program(k: int) -> list[OpTemplate]:
        warm_up = num_stages - 1 - k
        body = [forward(k, j) for j in range(min(warm_up, m))]
        for j in range(m):
            body += [forward(k, warm_up + j)] * (warm_up + j < m) + [backward_input(k, j)]
            body += [backward_weight(k, j - k)] * (j >= k)
        late = range(max(0, m - k), m)
        return [*body, *(backward_weight(k, j) for j in late), update(k, m - 1)]

    return periodic("zb-h1", num_stages, program, samples=m)


def _micro_batches(workers: int, given: int | None) -> int:
    return at_least("micro_batches", max(1, workers) if given is None else given, 1)


def _in_turn(
    forwards: list[OpTemplate], backwards: list[OpTemplate], warm_up: int
) -> list[OpTemplate]:
    """``warm_up`` forward passes, then one forward and one backward in turn, then the rest."""
    body = forwards[:warm_up]
    for place, its_backward in enumerate(backwards, start=warm_up):
        body += [*forwards[place : place + 1], its_backward]
    return body
