"""The training methods: each is a short function that returns its schedule, and nothing else.

The grids show, per worker (row) and iteration (column), which sample is run forward (F), backward
(B, or its halves I and W), recomputed (R), averaged over replicas (A) and applied (U); behind a
slash the stage, where a worker holds several. Every docstring says which part of the method was
checked against what, and which is from memory.

Here are backpropagation, the method that this toolkit is named after, data parallelism, and the
catalogue of all methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import Enum
from inspect import signature
from itertools import pairwise

from ddg_sim.asynchronous import pipedream, pipedream_2bw, spectrain, xpipe
from ddg_sim.decoupled import (
    adl,
    dgl,
    dsp,
    fdg,
    ouroboros,
    pd_asgd,
    petra,
    pipelined_backprop,
    pipemare,
    sideways,
    stale,
)
from ddg_sim.dependencies import validate
from ddg_sim.periodic import at_least, periodic
from ddg_sim.rule import Activations, Jacobian, Rule
from ddg_sim.schedule import (
    OpKind,
    OpTemplate,
    Schedule,
    Sync,
    all_reduce,
    backward,
    forward,
    recompute,
    update,
)
from ddg_sim.synchronous import gpipe, interleaved, one_f_one_b, zb_h1


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
    num_stages: int,
    sync: Sync = Sync.NONE,
    semantics: Semantics = Semantics.STASH,
    delays: Sequence[int] | None = None,
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
        delays: d_0 >= ... >= d_{K-1} >= 0, in iterations; None takes K-1, ..., 0. They must not
            grow: a stage's error comes from the next one.

    Raises:
        ValueError: if there are not K delays, or they are not such.

    >>> print(ddg(2, delays=(3, 1)))
    ddg stages=2 sync=none activations=graph jacobian=stashed samples=1
    worker 0: F0(t) B0(t-3) U0(t-3)
    worker 1: F1(t) B1(t-1) U1(t-1)

    >>> print(ddg(2, Sync.BARRIER, Semantics.REPLAY))
    ddg stages=2 sync=barrier activations=input jacobian=current samples=1
    worker 0: F0(t) R0(t-1) B0(t-1) U0(t-1)
    worker 1: F1(t) R1(t) B1(t) U1(t)
    """

    lags = tuple(reversed(range(num_stages))) if delays is None else tuple(delays)
    if len(lags) != num_stages or any(a < b for a, b in pairwise((*lags, 0))):
        raise ValueError(
            f"delays must be {num_stages} numbers that do not grow, at least 0, got {lags}"
        )

    def program(k: int) -> list[OpTemplate]:
        sample = -lags[k]
        replay = [recompute(k, sample)] if semantics is Semantics.REPLAY else []
        return [forward(k), *replay, backward(k, sample), update(k, sample)]

    return periodic("ddg", num_stages, program, sync=sync, rule=RULES[semantics])


def fr(num_stages: int, sync: Sync = Sync.NONE) -> Schedule:
    """Features Replay (Huo, Gu, Huang, NeurIPS 2018, arXiv 1807.04511).

    `ddg` with the semantics "replay": stage k runs forward again on the stored input of sample
    t - d_k, at the weights of now, with the error of stage k+1's replay in the iteration before::

                   t=0           t=1           t=2           t=3
        worker 0   F0            F1            F2 R0 B0 U0   F3 R1 B1 U1
        worker 1   F0            F1 R0 B0 U0   F2 R1 B1 U1   F3 R2 B2 U2
        worker 2   F0 R0 B0 U0   F1 R1 B1 U1   F2 R2 B2 U2   F3 R3 B3 U3

    Args:
        num_stages: number of stages K >= 1.
        sync: BARRIER is the paper's cost model, with period T_F + max_k (F_k + B_k).

    >>> fr(3).workers == ddg(3, semantics=Semantics.REPLAY).workers
    True
    """
    return replace(ddg(num_stages, sync, Semantics.REPLAY), method="fr")


def dp(num_stages: int, replicas: int = 2) -> Schedule:
    """Plain synchronous data parallelism: every replica holds the whole network on one worker.

    The network may be described as K stages, so that the costs of a pipeline's stages serve both.
    The replicas meet once per stage, from the last to the first, after the backward pass; that
    all-reduce and backward pass overlap in real implementations is not modelled. For K=2::

                   t=0
        worker 0   F0/0 F0/1 B0/1 B0/0 A0/1 U0/1 A0/0 U0/0

    Args:
        num_stages: number of stages K >= 1.
        replicas: copies R >= 1 of the network.

    >>> dp(1, replicas=4).workers == data_parallel(bp(1), 4).workers
    True
    """

    def program(worker: int) -> list[OpTemplate]:
        stages = range(num_stages)
        forwards = [forward(k) for k in stages]
        return [*forwards, *map(backward, reversed(stages)), *map(update, reversed(stages))]

    return data_parallel(periodic("dp", num_stages, program, workers=1), replicas)


def data_parallel(schedule: Schedule, replicas: int) -> Schedule:
    """R replicas of a schedule, on R times as many samples, that share every update.

    All replicas run the same program; those of a stage meet at an all-reduce of its gradients just
    before its update, which then uses the mean over all. Versions and staleness stay.

    Args:
        schedule: what every replica runs; it has no replicas yet.
        replicas: R >= 1; with 1 the schedule stays as it is.

    Raises:
        ValueError: if ``replicas`` < 1, or the schedule has replicas already.

    >>> print(data_parallel(bp(1), replicas=4))
    bp stages=1 sync=none activations=graph jacobian=stashed samples=1 replicas=4
    worker 0: F0(t) B0(t) A0(t) U0(t)
    """
    at_least("replicas", replicas, 1)
    if schedule.replicas != 1:
        raise ValueError(f"schedule {schedule.method!r} has {schedule.replicas} replicas already")
    if replicas == 1:
        return schedule
    workers = []
    for body in schedule.workers:
        found: list[OpTemplate] = []
        for template in body:
            if template.kind is OpKind.UPDATE:
                found.append(all_reduce(template.stage, template.sample))
            found.append(template)
        workers.append(tuple(found))
    replicated = replace(schedule, workers=tuple(workers), replicas=replicas)
    validate(replicated)
    return replicated


#: Name to function, in the order in which help texts list them.
METHODS: dict[str, Callable[..., Schedule]] = {
    "bp": bp,
    "ddg": ddg,
    "fr": fr,
    "fdg": fdg,
    "adl": adl,
    "dsp": dsp,
    "dgl": dgl,
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zb-h1": zb_h1,
    "pipedream": pipedream,
    "pipedream-2bw": pipedream_2bw,
    "stale": stale,
    "pb": pipelined_backprop,
    "spectrain": spectrain,
    "xpipe": xpipe,
    "pipemare": pipemare,
    "sideways": sideways,
    "petra": petra,
    "ouroboros": ouroboros,
    "pd-asgd": pd_asgd,
    "dp": dp,
}


def method(
    name: str,
    num_stages: int,
    sync: Sync | None = None,
    semantics: Semantics | None = None,
    *,
    replicas: int | None = None,
    **options: object,
) -> Schedule:
    """Schedule of the method called ``name``; an option that is None takes the method's default.

    Args:
        name: one of `METHODS`.
        num_stages: number of stages K >= 1.
        sync: synchronisation; `Sync.NONE` is known to every method.
        semantics: at which weights a delayed sample is differentiated.
        replicas: data-parallel copies R >= 1, of any method.
        options: further arguments of the method's function.

    Raises:
        ValueError: for an unknown name, an option that the method lacks, or a value that it
            refuses; names it.

    >>> method("ddg", 4) == ddg(4)
    True
    >>> method("gpipe", 4, chunks=2)
    Traceback (most recent call last):
    ...
    ValueError: chunks 2 does not apply to gpipe, which takes micro_batches, replay, replicas
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known methods: {', '.join(METHODS)}")
    build = METHODS[name]
    given: dict[str, object] = {"sync": sync, "semantics": semantics, **options}
    known = [option for option in signature(build).parameters if option != "num_stages"]
    if "replicas" in known:
        given["replicas"], replicas = replicas, None
    else:
        known.append("replicas")
    chosen = {option: value for option, value in given.items() if value is not None}
    if "sync" not in known and sync is Sync.NONE:
        del chosen["sync"]
    for option, value in chosen.items():
        if option not in known:
            shown = repr(value.value if isinstance(value, Enum) else value)
            raise ValueError(
                f"{option} {shown} does not apply to {name}, which takes {', '.join(known)}"
            )
    schedule = build(num_stages, **chosen)
    return schedule if replicas is None else data_parallel(schedule, replicas)
