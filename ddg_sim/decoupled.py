"""Methods that break the locks: forward, backward and update of different samples side by side.

Most let a sample take one tick per hop, forth and back (`periodic.round_trip`): with free
communication an iteration takes as long as the slowest stage, max_k (F_k + B_k + U_k).
"""

from __future__ import annotations

from collections.abc import Sequence

from ddg_sim.periodic import at_least, periodic, round_trip
from ddg_sim.rule import Activations, Gradient, Jacobian, Rule, Transform, TransformKind
from ddg_sim.schedule import OpTemplate, Schedule, backward, forward, recompute, update


def fdg(num_stages: int, shrink: float = 1.0) -> Schedule:
    """Fully decoupled training with delayed gradients (Zhuang et al., arXiv 1906.09108).

    In tick t stage k (1-based) runs backward and updates with sample t-2K+k+1, then forward with
    sample t-k+1; the last stage runs forward first. Its gradients are 2(K-k)-1 updates old, the
    last one's 0 (order read in the authors' code; the paper's arXiv number is from memory)::

                   t=0        t=1        t=2        t=3        t=4        t=5
        worker 0   F0         F1         F2         F3         B0 U0 F4   B1 U1 F5
        worker 1              F0         F1         B0 U0 F2   B1 U1 F3   B2 U2 F4
        worker 2                         F0 B0 U0   F1 B1 U1   F2 B2 U2   F3 B3 U3

    Args:
        num_stages: number of stages K >= 1.
        shrink: factor β in (0, 1] on the error per hop (gradient shrinking); 1 leaves it out.

    Raises:
        ValueError: if ``shrink`` is not in (0, 1].

    >>> print(fdg(2, shrink=0.9))
    fdg stages=2 sync=none activations=graph jacobian=stashed samples=1 shrink=0.9
    worker 0: B0(t-2) U0(t-2) F0(t)
    worker 1: F1(t-1) B1(t-1) U1(t-1)
    """
    if not 0 < shrink <= 1:
        raise ValueError(f"shrink must be in (0, 1], got {shrink}")

    def program(k: int) -> list[OpTemplate]:
        ahead, *behind = round_trip(num_stages, k)
        return [ahead, *behind] if k == num_stages - 1 else [*behind, ahead]

    transforms = () if shrink == 1 else (Transform(TransformKind.SHRINK, (shrink,)),)
    return periodic("fdg", num_stages, program, rule=Rule(transforms=transforms))


def adl(num_stages: int, accumulate: int | None = None) -> Schedule:
    """Accumulated decoupled learning (Zhuang, Lin, Toh, arXiv 2012.03747): M gradients an update.

    A tick is forward, backward and, after M of them, an update with their mean, which divides the
    staleness 2(K-k) of stage k (1-based) by about M. (Order read in the authors' code, its mode A;
    mode B runs backward first, as FDG does. Staleness for K=3 as published: 2,2 / 1,1 / 0,0 for
    M=2 and 1,1,1,1 / 1,1,0,0 / 0,0,0,0 for M=4.) For K=2, M=2::

                   t=0              t=1              t=2
        worker 0   F0 F1            F2 B0 F3 B1 U1   F4 B2 F5 B3 U3
        worker 1   F0 B0            F1 B1 U1 F2 B2   F3 B3 U3 F4 B4

    Args:
        num_stages: number of stages K >= 1.
        accumulate: samples per update M >= 1, also those of an iteration; None takes 2.

    >>> print(adl(2, accumulate=2))
    adl stages=2 sync=none activations=graph jacobian=stashed samples=2
    worker 0: F0(2t) B0(2t-2) F0(2t+1) B0(2t-1) U0(2t-1)
    worker 1: F1(2t-1) B1(2t-1) U1(2t-1) F1(2t) B1(2t)
    """
    m = at_least("accumulate", 2 if accumulate is None else accumulate, 1)
    return periodic("adl", num_stages, lambda k: round_trip(num_stages, k, m), samples=m)


def dsp(
    num_stages: int, lags: Sequence[int] | None = None, delays: Sequence[int] | None = None
) -> Schedule:
    """Diversely stale parameters (Xu, Huo, Huang, CVPR 2020, arXiv 1909.02625): DSP(p; m).

    Stage k runs forward p_k iterations before stage k+1 does, and backward, recomputing from its
    stored input at the weights of now, with the sample of m_k iterations before. The paper's
    example DSP(1,1,0; 4,2,0) is what is drawn and what None gives for K=3 (checked: figure 2 and
    its caption as retold on a public page; the versions are from memory)::

                   t=0           t=1           t=2           t=3           t=4
        worker 0   F0            F1            F2            F3            F4 R0 B0 U0
        worker 1                 F0            F1            F2 R0 B0 U0   F3 R1 B1 U1
        worker 2                               F0 R0 B0 U0   F1 R1 B1 U1   F2 R2 B2 U2

    Args:
        num_stages: number of stages K >= 1.
        lags: p_0, …, p_{K-1}, the last of no effect; None takes 1, …, 1, 0.
        delays: m_0, …, m_{K-1}; None takes 2(K-1), …, 2, 0.

    Raises:
        ValueError: if there are not K lags or delays, or one is negative.
        ScheduleError: if the stages would wait for one another.

    >>> print(dsp(2))
    dsp stages=2 sync=none activations=input jacobian=current samples=1
    worker 0: F0(t) R0(t-2) B0(t-2) U0(t-2)
    worker 1: F1(t-1) R1(t-1) B1(t-1) U1(t-1)
    """
    at_least("num_stages", num_stages, 1)
    last = num_stages - 1
    p = (1,) * last + (0,) if lags is None else tuple(lags)
    delay = tuple(range(2 * last, -1, -2)) if delays is None else tuple(delays)
    for name, values in {"lags": p, "delays": delay}.items():
        if len(values) != num_stages or min(values) < 0:
            raise ValueError(f"{name} must be {num_stages} numbers, at least 0, got {values}")

    def program(k: int) -> list[OpTemplate]:
        newest = -sum(p[:k])
        sample = newest - delay[k]
        return [forward(k, newest), recompute(k, sample), backward(k, sample), update(k, sample)]

    rule = Rule(Activations.INPUT, Jacobian.CURRENT)
    return periodic("dsp", num_stages, program, rule=rule)


def dgl(num_stages: int, buffer: int = 0) -> Schedule:
    """Decoupled greedy learning (Belilovsky, Eickenberg, Oyallon, ICML 2020, arXiv 1901.08164).

    Every stage minimises a local loss of an auxiliary network on its own output, so there is no
    error to wait for and no delay; the activation sent on is the one before the update (from the
    authors' code). The auxiliary network's time belongs into the stage's backward time. At most two
    activations wait between stages: enough for the period max_k (F_k + B_k + U_k), derived here::

                   t=0        t=1        t=2
        worker 0   F0 B0 U0   F1 B1 U1   F2 B2 U2
        worker 1   F0 B0 U0   F1 B1 U1   F2 B2 U2

    Args:
        num_stages: number of stages K >= 1.
        buffer: 0 is the synchronous algorithm. b > 0 stands for the asynchronous one: a stage
            trains on what the one before it put into the replay buffer b iterations ago. The
            original draws at random from a buffer, and may use an activation several times or
            never; here each is used once, in order.

    >>> print(dgl(2, buffer=1))
    dgl stages=2 sync=none activations=graph jacobian=stashed samples=1 gradient=local queue=3
    worker 0: F0(t) B0(t) U0(t)
    worker 1: F1(t-1) B1(t-1) U1(t-1)
    """
    at_least("buffer", buffer, 0)

    def program(k: int) -> list[OpTemplate]:
        sample = -buffer * k
        return [forward(k, sample), backward(k, sample), update(k, sample)]

    rule = Rule(gradient=Gradient.LOCAL)
    return periodic("dgl", num_stages, program, rule=rule, queue=2 + buffer)


def stale(num_stages: int) -> Schedule:
    """Pipelined training with stale weights (Zhang, Abdelrahman, arXiv 1912.12675).

    A backward pass uses the activations that its forward pass kept, and the weights of now: nothing
    is stashed. The paper gives forward and backward stages their own accelerators, as it says its
    GPU implementation does not; here both of a stage share a worker. Its hybrid (switch to
    backpropagation late) is two runs. From memory::

                   t=0        t=1        t=2        t=3        t=4
        worker 0   F0         F1         F2         F3         F4 B0 U0
        worker 1              F0         F1         F2 B0 U0   F3 B1 U1
        worker 2                         F0 B0 U0   F1 B1 U1   F2 B2 U2

    >>> print(stale(2))
    stale stages=2 sync=none activations=graph jacobian=current samples=1
    worker 0: F0(t) B0(t-2) U0(t-2)
    worker 1: F1(t-1) B1(t-1) U1(t-1)
    """
    rule = Rule(jacobian=Jacobian.CURRENT)
    return periodic("stale", num_stages, lambda k: round_trip(num_stages, k), rule=rule)


def pipelined_backprop(num_stages: int, spike: bool = False, predict: bool = False) -> Schedule:
    """Pipelined backpropagation with mitigation (Kosson et al., MLSys 2021, arXiv 2003.11666).

    `stale`'s program, operation by operation (derived here), with D_k = 2(K-k) updates (k
    1-based) between forward pass and update, against which there are two corrections (from
    memory)::

                   t=0        t=1        t=2        t=3        t=4
        worker 0   F0         F1         F2         F3         F4 B0 U0
        worker 1              F0         F1         F2 B0 U0   F3 B1 U1
        worker 2                         F0 B0 U0   F1 B1 U1   F2 B2 U2

    Args:
        num_stages: number of stages K >= 1.
        spike: compensate the delay in the update: `TransformKind.SPIKE`.
        predict: forward passes read linearly predicted weights, D_k updates ahead.

    >>> print(str(pipelined_backprop(3, spike=True, predict=True)).splitlines()[0])
    pb stages=3 sync=none activations=graph jacobian=current samples=1
    spike=4,2,0 predict-forward=4,2,0
    """
    delays = tuple(2 * (num_stages - 1 - k) for k in range(num_stages))
    wanted = {TransformKind.SPIKE: spike, TransformKind.PREDICT_FORWARD: predict}
    transforms = tuple(Transform(kind, delays) for kind, yes in wanted.items() if yes)
    rule = Rule(jacobian=Jacobian.CURRENT, transforms=transforms)
    return periodic("pb", num_stages, lambda k: round_trip(num_stages, k), rule=rule)


def pipemare(
    num_stages: int,
    micro_batches: int | None = None,
    anneal: float = 0.0,
    decay: float = 0.0,
) -> Schedule:
    """PipeMare (Yang et al., MLSys 2021, arXiv 1910.05124): stale forward, current backward.

    N micro-batches per update pass through the pipeline without a flush. τ_k = (2(K-k)+1)/N (k
    1-based) is the paper's mean forward delay in updates (from memory). Its synchronous warm-up
    (T3) is another schedule, to be run first. For K=2, N=2::

                   t=0              t=1              t=2
        worker 0   F0 F1            F2 B0 F3 B1 U1   F4 B2 F5 B3 U3
        worker 1   F0 B0            F1 B1 U1 F2 B2   F3 B3 U3 F4 B4

    Args:
        num_stages: number of stages K >= 1.
        micro_batches: micro-batches per update N >= 1; None takes 2.
        anneal: updates T over which the learning rate is rescaled (T1); 0 leaves it out.
        decay: D in (0, 1) of the discrepancy correction (T2); 0 leaves it out.

    Raises:
        ValueError: naming an argument out of its range.

    >>> print(str(pipemare(2, micro_batches=2, anneal=100, decay=0.5)).splitlines()[0])
    pipemare stages=2 sync=none activations=graph jacobian=current samples=2
    rate=100,1.5,0.5 discrepancy=0.5,1.5,0.5
    """
    m = at_least("micro_batches", 2 if micro_batches is None else micro_batches, 1)
    if anneal < 0:
        raise ValueError(f"anneal must be at least 0, got {anneal}")
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}")
    delays = tuple((2 * (num_stages - 1 - k) + 1) / m for k in range(num_stages))
    numbers = {TransformKind.RATE: anneal, TransformKind.DISCREPANCY: decay}
    transforms = tuple(Transform(kind, (x, *delays)) for kind, x in numbers.items() if x)
    rule = Rule(jacobian=Jacobian.CURRENT, transforms=transforms)
    return periodic(
        "pipemare", num_stages, lambda k: round_trip(num_stages, k, m), rule=rule, samples=m
    )


def sideways(num_stages: int) -> Schedule:
    """Sideways (Malinowski, Swirszcz, Carreira, Patraucean, CVPR 2020, arXiv 2001.06232).

    For video: neighbouring samples resemble each other, so a stage keeps nothing, and the error of
    an older sample is propagated through the activations of the newest (from memory). The order is
    that of `stale`::

                   t=0        t=1        t=2        t=3        t=4
        worker 0   F0         F1         F2         F3         F4 B0 U0
        worker 1              F0         F1         F2 B0 U0   F3 B1 U1
        worker 2                         F0 B0 U0   F1 B1 U1   F2 B2 U2

    >>> print(str(sideways(2)).splitlines()[0])
    sideways stages=2 sync=none activations=newest jacobian=current samples=1
    """
    rule = Rule(Activations.NEWEST, Jacobian.CURRENT)
    return periodic("sideways", num_stages, lambda k: round_trip(num_stages, k), rule=rule)


def petra(num_stages: int, accumulate: int | None = None) -> Schedule:
    """PETRA (Rivaud et al., ICLR 2025, arXiv 2406.02052): reversible stages keep nothing.

    The next stage sends its reconstructed input along with the error, from which a stage
    reconstructs its own input and differentiates at the weights of now; so a gradient message is
    about twice as large. A tick is forward, backward, update (from the authors' code)::

                   t=0        t=1        t=2        t=3        t=4
        worker 0   F0         F1         F2         F3         F4 B0 U0
        worker 1              F0         F1         F2 B0 U0   F3 B1 U1
        worker 2                         F0 B0 U0   F1 B1 U1   F2 B2 U2

    Args:
        num_stages: number of stages K >= 1.
        accumulate: samples per update >= 1; None takes 1.

    >>> print(str(petra(2)).splitlines()[0])
    petra stages=2 sync=none activations=reconstruct jacobian=current samples=1
    """
    m = at_least("accumulate", 1 if accumulate is None else accumulate, 1)
    rule = Rule(Activations.RECONSTRUCT, Jacobian.CURRENT)
    return periodic(
        "petra", num_stages, lambda k: round_trip(num_stages, k, m), rule=rule, samples=m
    )


def ouroboros(num_stages: int) -> Schedule:
    """Ouroboros (Yang, Huo, Wang, Huang, Carin, NeurIPS 2019, arXiv 1909.06695).

    `ddg` for language models whose first and last stage share the embedding: K stages on K-1
    workers, these two on one (checked on public pages; the delays K-k and the order on that worker
    are from memory)::

                   t=0                   t=1
        worker 0   F0/0 F0/2 B0/2 U0/2   F1/0 F1/2 B1/2 U1/2
        worker 1   F0/1                  F1/1 B0/1 U0/1

    The first stage's next forward pass comes after the last stage's of this iteration, on the same
    worker, so the forward lock stays: the period is at least T_F + B_K (derived here), where the
    same delays on K workers allow max_k (F_k + B_k). The weights that both share get both updates,
    each of its own age.

    >>> print(ouroboros(2))
    ouroboros stages=2 sync=none activations=graph jacobian=stashed samples=1 tied=0,1
    worker 0: F0(t) B0(t-1) U0(t-1) F1(t) B1(t) U1(t)
    """
    last = num_stages - 1

    def stage(k: int) -> list[OpTemplate]:
        return [forward(k), backward(k, k - last), update(k, k - last)]

    def program(worker: int) -> list[OpTemplate]:
        return [*stage(0), *stage(last)] if worker == 0 < last else stage(worker)

    tied = (Transform(TransformKind.TIED, (0, last)),) if last > 0 else ()
    return periodic(
        "ouroboros", num_stages, program, workers=max(1, last), rule=Rule(transforms=tied)
    )


def pd_asgd(num_stages: int) -> Schedule:
    """PD-ASGD (Fokam et al., arXiv 2410.05985): forward and backward passes on two workers.

    One worker runs a sample forward through all stages while the other runs the sample before
    backward, updating every stage as soon as its gradient is there::

                   t=0                   t=1                   t=2
        worker 0   F0/0 F0/1             F1/0 F1/1             F2/0 F2/1
        worker 1                         B0/1 U0/1 B0/0 U0/0   B1/1 U1/1 B1/0 U1/0

    The original is lock-free: threads share the weights, so what a forward pass reads depends on
    timing, even within a tensor. Here it is definite: in iteration t a forward pass reads what
    iterations before t have produced (staleness 1), a backward pass the weights of now. The
    original's point, several forward threads per backward thread, needs several updates per
    iteration, which a `Schedule` cannot express: this is the ratio 1:1. Its replicas of the whole
    network, which average weights without waiting, are left out too. (Idea from the abstract.)

    >>> print(pd_asgd(2))
    pd-asgd stages=2 sync=none activations=graph jacobian=current samples=1
    worker 0: F0(t) F1(t)
    worker 1: B1(t-1) U1(t-1) B0(t-1) U0(t-1)
    """

    def program(worker: int) -> list[OpTemplate]:
        if worker == 0:
            return [forward(k) for k in range(num_stages)]
        down = reversed(range(num_stages))
        return [template for k in down for template in (backward(k, -1), update(k, -1))]

    rule = Rule(jacobian=Jacobian.CURRENT)
    return periodic("pd-asgd", num_stages, program, workers=2, rule=rule)
