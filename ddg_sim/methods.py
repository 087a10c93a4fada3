"""The training methods: each is a short function that returns its schedule, and nothing else.

The grids show, per worker (row) and iteration (column), which sample is run forward (F), backward
(B), recomputed (R) and applied (U).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from ddg_sim.dependencies import validate
from ddg_sim.schedule import (
    Activations,
    Jacobian,
    OpTemplate,
    Rule,
    Schedule,
    Sync,
    backward,
    forward,
    recompute,
    update,
)


class Semantics(Enum):
    """The three readings of "the delayed backward pass"; without delay they coincide."""

    #: Jacobians at the weights that the sample's forward pass read (the paper's rule).
    STASH = "stash"
    #: The retained graph with today's weights (what the released DDG code computed).
    CURRENT = "current"
    #: Forward again on the stored input with today's weights (Features Replay).
    REPLAY = "replay"


RULES = {
    Semantics.STASH: Rule(Activations.GRAPH, Jacobian.STASHED),
    Semantics.CURRENT: Rule(Activations.GRAPH, Jacobian.CURRENT),
    Semantics.REPLAY: Rule(Activations.INPUT, Jacobian.CURRENT),
}


def periodic(
    method: str,
    num_stages: int,
    program: Callable[[int], list[OpTemplate]],
    *,
    sync: Sync = Sync.NONE,
    rule: Rule | None = None,
) -> Schedule:
    """Build and validate the schedule whose worker k runs ``program(k)`` in every iteration.

    Raises:
        ValueError: if ``num_stages`` < 1.
        ScheduleError: if the schedule cannot be run; names the operation.

    >>> print(periodic("sgd", 1, lambda k: [forward(k), backward(k), update(k)]))
    sgd stages=1 sync=none activations=graph jacobian=stashed samples=1
    worker 0: F0(t) B0(t) U0(t)
    """
    if num_stages < 1:
        raise ValueError(f"num_stages must be at least 1, got {num_stages}")
    workers = tuple(tuple(program(stage)) for stage in range(num_stages))
    schedule = Schedule(method, num_stages, workers, sync, rule or Rule())
    validate(schedule)
    return schedule


def bp(num_stages: int) -> Schedule:
    """Backpropagation over K stages on K devices, one sample at a time (naive model parallelism).

    Every stage waits for the error to come back from the last one::

                   t=0        t=1        t=2
        worker 0   F0 B0 U0   F1 B1 U1   F2 B2 U2
        worker 1   F0 B0 U0   F1 B1 U1   F2 B2 U2

    >>> print(bp(1))
    bp stages=1 sync=none activations=graph jacobian=stashed samples=1
    worker 0: F0(t) B0(t) U0(t)
    """
    return periodic("bp", num_stages, lambda k: [forward(k), backward(k), update(k)])


def ddg(
    num_stages: int, sync: Sync = Sync.NONE, semantics: Semantics = Semantics.STASH
) -> Schedule:
    """Decoupled delayed gradients (Huo, Gu, Yang, Huang, ICML 2018, arXiv 1804.10574).

    Stage k (0-based) has delay d_k = K-1-k: in iteration t it applies the gradient of sample
    t - d_k, with the error that stage k+1 computed in iteration t-1::

                   t=0        t=1        t=2        t=3
        worker 0   F0         F1         F2 B0 U0   F3 B1 U1
        worker 1   F0         F1 B0 U0   F2 B1 U1   F3 B2 U2
        worker 2   F0 B0 U0   F1 B1 U1   F2 B2 U2   F3 B3 U3

    w_k^{t+1} = w_k^t - γ_t ∇_k f_{i(t-d_k)}(w^{t-d_k}); nothing is applied while t < d_k.

    Args:
        num_stages: number of stages K >= 1.
        sync: BARRIER is the paper's cost model, MAILBOX the released code's loop, NONE neither;
            the weights are the same bit for bit.
        semantics: at which weights the delayed sample is differentiated.

    >>> print(ddg(2, Sync.BARRIER, Semantics.REPLAY))
    ddg stages=2 sync=barrier activations=input jacobian=current samples=1
    worker 0: F0(t) R0(t-1) B0(t-1) U0(t-1)
    worker 1: F1(t) R1(t) B1(t) U1(t)
    """

    def program(k: int) -> list[OpTemplate]:
        sample = k - (num_stages - 1)
        replay = [recompute(k, sample)] if semantics is Semantics.REPLAY else []
        return [forward(k), *replay, backward(k, sample), update(k, sample)]

    return periodic("ddg", num_stages, program, sync=sync, rule=RULES[semantics])


METHODS = ("bp", "ddg")


def method(
    name: str,
    num_stages: int,
    sync: Sync | None = None,
    semantics: Semantics = Semantics.STASH,
) -> Schedule:
    """Schedule of the method called ``name``; ``sync`` None is the method's default.

    Raises:
        ValueError: for an unknown name, ``num_stages`` < 1, or a sync mode or semantics that the
            method lacks.

    >>> method("ddg", 4) == ddg(4)
    True
    """
    if name == "ddg":
        return ddg(num_stages, sync or Sync.NONE, semantics)
    if name == "bp":
        if sync not in (None, Sync.NONE):
            raise ValueError(f"sync {sync.value!r} does not apply to bp, which has no sync modes")
        if semantics is not Semantics.STASH:
            raise ValueError(
                f"semantics {semantics.value!r} does not apply to bp, which has no delay"
            )
        return bp(num_stages)
    raise ValueError(f"unknown method {name!r}; known methods: {', '.join(METHODS)}")
