"""Pipelines that never flush: one forward and one backward in turn, updates as gradients come.

In steady state stage k (0-based) of K runs the backward pass of the micro-batch that it ran
forward d_k = K-1-k micro-batches before. The methods differ in the weights that they use.
"""

from __future__ import annotations

from collections.abc import Callable

from ddg_sim.periodic import at_least, periodic
from ddg_sim.rule import Jacobian, Rule, Transform, TransformKind
from ddg_sim.schedule import OpTemplate, Schedule, backward, forward, update


def pipedream(num_stages: int, vertical_sync: bool = False) -> Schedule:
    """PipeDream (Harlap et al., arXiv 1806.03377; SOSP 2019): 1F1B with weight stashing.

    After d_k forward passes a stage runs forward, backward, update in turn, the backward pass at
    the weights of the sample's forward pass::

                   t=0        t=1        t=2        t=3
        worker 0   F0         F1         F2 B0 U0   F3 B1 U1
        worker 1   F0         F1 B0 U0   F2 B1 U1   F3 B2 U2
        worker 2   F0 B0 U0   F1 B1 U1   F2 B2 U2   F3 B3 U3

    This is the program of `ddg` without a barrier and with stashed weights, operation by operation
    (derived here): the two methods are one, found twice.

    Args:
        num_stages: number of stages K >= 1.
        vertical_sync: all stages use the version that the first stage used when the sample
            entered, w^{t-K+1} (from memory): stage k reads weights k updates older than its
            newest, staleness is K-1 everywhere, and every stage keeps K versions.

    >>> print(pipedream(2, vertical_sync=True))
    pipedream stages=2 sync=none activations=graph jacobian=stashed samples=1
    worker 0: F0(t) B0(t-1) U0(t-1)
    worker 1: F1(t)v-1 B1(t) U1(t)
    """

    def lag(k: int, j: int) -> int:
        return k if vertical_sync else 0

    return periodic("pipedream", num_stages, _one_f_one_b(num_stages, 1, lag))


def pipedream_2bw(num_stages: int, micro_batches: int | None = None) -> Schedule:
    """PipeDream-2BW (Narayanan et al., ICML 2021, arXiv 2006.09503): two weight versions.

    All m >= K micro-batches of iteration t run at version t-1 on all stages, so that
    w^{t+1} = w^t - γ ∇f(w^{t-1}): staleness 1, two versions, no flush (rule from the paper)::

                   t=0              t=1              t=2
        worker 0   F0 F1 B0         F2 B1 U1 F3 B2   F4 B3 U3 F5 B4
        worker 1   F0 B0 F1 B1 U1   F2 B2 F3 B3 U3   F4 B4 F5 B5 U5

    Args:
        num_stages: number of stages K >= 1.
        micro_batches: micro-batches m >= K per update; None takes K.

    >>> print(pipedream_2bw(2, micro_batches=2))
    pipedream-2bw stages=2 sync=none activations=graph jacobian=stashed samples=2
    worker 0: F0(2t) B0(2t-1) U0(2t-1) F0(2t+1)v-1 B0(2t)
    worker 1: F1(2t)v-1 B1(2t) F1(2t+1)v-1 B1(2t+1) U1(2t+1)
    """
    m = _at_least_stages(num_stages, micro_batches)

    def lag(k: int, j: int) -> int:  # before slot j of iteration t there are t + (j-d)//m updates
        return 1 + (j - (num_stages - 1 - k)) // m

    program = _one_f_one_b(num_stages, m, lag)
    return periodic("pipedream-2bw", num_stages, program, samples=m)


def spectrain(num_stages: int) -> Schedule:
    """SpecTrain (Chen, Yang, Cheng 2018, arXiv 1809.02839): PipeDream's order, predicted weights.

    Instead of stashing, stage k (0-based) computes at Ŵ = W - s γ v, the weights expected at the
    end of the sample's round trip: s = ⌊k/2⌋ + d_k forward, s = ⌊k/2⌋ backward (from the authors'
    code). The staleness that `schedule.staleness` counts is that of W, which the prediction is to
    undo::

                   t=0        t=1        t=2        t=3
        worker 0   F0         F1         F2 B0 U0   F3 B1 U1
        worker 1   F0         F1 B0 U0   F2 B1 U1   F3 B2 U2
        worker 2   F0 B0 U0   F1 B1 U1   F2 B2 U2   F3 B3 U3

    >>> print(str(spectrain(3)).splitlines()[0])
    spectrain stages=3 sync=none activations=graph jacobian=predicted samples=1
    predict-forward=2,1,1 predict-backward=0,0,1
    """
    stages = range(num_stages)
    ahead = Transform(
        TransformKind.PREDICT_FORWARD, tuple(k // 2 + num_stages - 1 - k for k in stages)
    )
    behind = Transform(TransformKind.PREDICT_BACKWARD, tuple(k // 2 for k in stages))
    rule = Rule(jacobian=Jacobian.PREDICTED, transforms=(ahead, behind))
    return periodic("spectrain", num_stages, _one_f_one_b(num_stages, 1), rule=rule)


def xpipe(num_stages: int, micro_batches: int | None = None) -> Schedule:
    """XPipe (Guan, Yin, Li, Lu 2019, arXiv 1911.04610): micro-batches share one prediction.

    Mini-batches of m micro-batches overlap in the pipeline. The first micro-batch of each (the
    bellwether) predicts, with Adam's direction, the weights that its update will apply to; the
    others use the same prediction, and backward passes the weights of now. Idea from the paper's
    abstract and from memory; the distance of the prediction, ⌈d_k/m⌉ updates, is derived here from
    the order of the operations::

                   t=0              t=1              t=2
        worker 0   F0 F1 B0         F2 B1 U1 F3 B2   F4 B3 U3 F5 B4
        worker 1   F0 B0 F1 B1 U1   F2 B2 F3 B3 U3   F4 B4 F5 B5 U5

    Args:
        num_stages: number of stages K >= 1.
        micro_batches: micro-batches m >= 1 per update; None takes K.

    >>> print(xpipe(2, micro_batches=2))
    xpipe stages=2 sync=none activations=graph jacobian=current samples=2 predict-forward=1,0
    worker 0: F0(2t) B0(2t-1) U0(2t-1) F0(2t+1)v-1 B0(2t)
    worker 1: F1(2t) B1(2t) F1(2t+1) B1(2t+1) U1(2t+1)
    """
    m = at_least("micro_batches", max(1, num_stages) if micro_batches is None else micro_batches, 1)

    def lag(k: int, j: int) -> int:  # updates since the bellwether's forward pass
        delay = num_stages - 1 - k
        return (j - delay) // m - -delay // m

    ahead = tuple(-(-(num_stages - 1 - k) // m) for k in range(num_stages))
    rule = Rule(
        jacobian=Jacobian.CURRENT,
        transforms=(Transform(TransformKind.PREDICT_FORWARD, ahead),),
    )
    program = _one_f_one_b(num_stages, m, lag)
    return periodic("xpipe", num_stages, program, rule=rule, samples=m)


def _one_f_one_b(
    num_stages: int, m: int, version_lag: Callable[[int, int], int] = lambda k, j: 0
) -> Callable[[int], list[OpTemplate]]:
    """Loop bodies of m forward and m backward passes in turn, and an update per m samples.

    ``version_lag(k, j)`` is that of stage k's j-th forward pass of an iteration.
    """

    def program(k: int) -> list[OpTemplate]:
        body = []
        for j in range(m):
            sample = j - (num_stages - 1 - k)
            body += [forward(k, j, version_lag(k, j)), backward(k, sample)]
            body += [update(k, sample)] * (sample % m == m - 1)
        return body

    return program


def _at_least_stages(num_stages: int, given: int | None) -> int:
    if given is not None and given < num_stages:
        raise ValueError(
            f"micro_batches must be at least the number of stages, {num_stages}, got {given}"
        )
    return max(1, num_stages) if given is None else given
