"""Operations that slow each other down because they share a machine.

Cores share caches, memory and power, so an operation takes longer while other stages compute too,
and how much longer depends on what they compute: two backward passes at once may disturb each
other more than a forward and a backward pass. How often which operations overlap depends on the
schedule: hardly ever in backpropagation, always in DDG without a barrier, backward passes among
themselves in DDG with one. And an operation that begins after a wait takes longer than one that
follows another: the core has gone to sleep, and its caches have been used by others. So a profile
measures each stage alone, beside the others and after a wait, and this module finds durations that
agree with the overlap and the waits that they lead to.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddg_sim.costs import Costs
from ddg_sim.cycletime import evaluate
from ddg_sim.eventgraph import only_simulated
from ddg_sim.schedule import OpKind, Schedule
from ddg_sim.simulate import simulate
from ddg_sim.timeline import Columns, Timeline
from ddg_sim.times import scaled

#: Times that overlap and durations are computed in turn; both change little after two.
TURNS = 4
FIELDS = {
    OpKind.FORWARD: "forward",
    OpKind.BACKWARD: "backward",
    OpKind.UPDATE: "update",
    OpKind.RECOMPUTE: "recompute",
}
#: What else behaves like a measured kind of operation.
LIKE = {
    OpKind.RECOMPUTE: OpKind.FORWARD,
    OpKind.BACKWARD_INPUT: OpKind.BACKWARD,
    OpKind.BACKWARD_WEIGHT: OpKind.BACKWARD,
}
#: (own kind, the others' kind): how many times longer it takes while all others run that. (own
#: kind, None): how many times longer it takes after waiting while the others had their turn.
Slowdown = Mapping[tuple[OpKind, OpKind | None], float]
#: Per stage such factors, or one number for all kinds.
Contention = Sequence[float | Slowdown]


def contended(schedule: Schedule, costs: Costs, contention: Contention) -> Costs:
    """Costs of a schedule whose stages slow each other down.

    An operation of kind a that overlaps with a fraction p_b of the other workers' operations of
    kind b, and before which its worker waited for a fraction q of the time that one operation of
    each other worker takes (at most 1), takes 1 + Σ_b p_b (c_ab - 1) + q (c_a,None - 1) times as
    long as alone: linear between the cases that were measured, and on average over an operation
    (derived here). Kinds that no factor is given for do not disturb; recomputing counts as forward,
    and half a backward pass as backward.

    On C cores that n > C operations share, each has C - 1 others beside it, not n - 1, and the
    factors are those of C - 1 others.

    Args:
        schedule: what runs.
        costs: seconds of every operation alone; where they vary, the means decide the overlap.
        contention: per stage, how many times longer it takes while all others compute, c >= 1.

    Raises:
        ValueError: for a wrong number of factors, or one below 1 or not finite.

    >>> from ddg_sim.costs import costs
    >>> from ddg_sim.methods import bp, ddg
    >>> alone = costs(2, forward=1.0, backward=2.0)
    >>> contended(bp(2), alone, [1.5, 1.5]) == alone  # nothing overlaps
    True
    >>> contended(ddg(2), alone, [1.5, 1.5]).backward  # everything does
    (3.0, 3.0)
    >>> pairs = {(OpKind.BACKWARD, OpKind.BACKWARD): 1.5}
    >>> from ddg_sim.schedule import Sync
    >>> contended(ddg(2, Sync.BARRIER), alone, [pairs, pairs]).backward
    (3.0, 3.0)
    """
    if len(contention) != schedule.num_stages:
        raise ValueError(
            f"contention has {len(contention)} values, but there are {schedule.num_stages} stages"
        )
    factors = [
        list(given.values()) if isinstance(given, Mapping) else [given] for given in contention
    ]
    if not all(math.isfinite(factor) and factor >= 1 for given in factors for factor in given):
        raise ValueError(f"contention must be finite and at least 1, got {list(contention)}")
    if len(schedule.workers) == 1 or all(factor == 1 for given in factors for factor in given):
        return costs
    slowed = costs
    play = simulate if only_simulated(schedule, costs) else evaluate
    for _ in range(TURNS):
        timeline = play(schedule, slowed.means(), 3 * schedule.num_ticks(0) + 12)
        overlap, waits = _overlap(timeline, slowed.cores), _waits(timeline)
        longer: dict[str, Any] = {
            name: tuple(
                scaled(
                    time,
                    1
                    + _extra(contention[stage], kind, overlap.get((kind, stage), {}))
                    + waits.get((kind, stage), 0.0) * _after_wait(contention[stage], kind),
                )
                for stage, time in enumerate(getattr(costs, name))
            )
            for kind, name in FIELDS.items()
        }
        slowed = replace(costs, **longer)
    return slowed


def _extra(given: float | Slowdown, kind: OpKind, overlap: Mapping[OpKind, float]) -> float:
    """By which fraction an operation takes longer, given what overlaps with it how much."""
    if not isinstance(given, Mapping):
        return sum(overlap.values()) * (given - 1)
    return sum(part * (_factor(given, kind, other) - 1) for other, part in overlap.items())


def _after_wait(given: float | Slowdown, kind: OpKind) -> float:
    """By which fraction an operation takes longer if its worker waited before it."""
    return _factor(given, kind, None) - 1 if isinstance(given, Mapping) else 0.0


def _factor(given: Slowdown, own: OpKind, other: OpKind | None) -> float:
    """What was measured, or else what was measured of kinds that are like these."""
    likes = LIKE.get(own, own), None if other is None else LIKE.get(other, other)
    for pair in ((own, other), (own, likes[1]), likes):
        if pair in given:
            return given[pair]
    return 1.0


def _steady(timeline: Timeline) -> tuple[Columns, NDArray[np.int_], NDArray[np.bool_]]:
    """Operations that take time, in the order of their starts; the template of each; whether it
    is of an iteration after the warm-up and before the drain.
    """
    schedule = timeline.schedule
    table = timeline.op_columns[timeline.op_columns["end"] > timeline.op_columns["start"]]
    table = table[np.argsort(table["start"], kind="stable")]
    before = np.cumsum([0, *map(len, schedule.workers)])  # templates of earlier workers
    lag = schedule.num_ticks(0)
    counts = (table["iteration"] >= lag) & (table["iteration"] < timeline.iterations - lag)
    return table, before[table["lane"]] + table["position"], counts


def _keys(schedule: Schedule) -> list[tuple[OpKind, int]]:
    """Per template the entry of the costs, as a kind, and the stage."""
    return [
        (
            template.kind if template.kind in FIELDS else LIKE.get(template.kind, template.kind),
            template.stage,
        )
        for template in schedule.templates()
    ]


def _waits(timeline: Timeline) -> dict[tuple[OpKind, int], float]:
    """Per kind and stage, the mean wait before it, by what one operation of each other takes."""
    table, place, counts = _steady(timeline)
    seconds = table["end"] - table["start"]
    workers = range(len(timeline.schedule.workers))
    mine = [table["lane"] == worker for worker in workers]
    typical = [float(seconds[own].mean()) if own.any() else 0.0 for own in mine]
    share = np.zeros(len(table))
    for worker in workers:
        others = sum(typical) - typical[worker]
        if others > 0:
            gaps = table["start"][mine[worker]][1:] - table["end"][mine[worker]][:-1]
            share[np.flatnonzero(mine[worker])[1:]] = np.clip(gaps / others, 0.0, 1.0)
        counts[np.flatnonzero(mine[worker])[:1]] = False  # nothing is before it
    found: dict[tuple[OpKind, int], list[float]] = defaultdict(list)
    keys = _keys(timeline.schedule)
    for which, waited in zip(place[counts].tolist(), share[counts].tolist(), strict=True):
        found[keys[which]].append(waited)
    return {key: sum(waited) / len(waited) for key, waited in found.items()}


Overlap = dict[tuple[OpKind, int], dict[OpKind, float]]


def _overlap(timeline: Timeline, cores: int | None) -> Overlap:
    """Per kind and stage, the mean fraction of the other workers that run which kind meanwhile.

    Of more operations than cores, as many as there are cores run at any time.

    Between two moments at which something starts or ends, the number of workers that run a kind
    stays the same; so the seconds shared since the beginning are one sum over these moments.
    """
    schedule = timeline.schedule
    table, place, steady = _steady(timeline)
    templates, keys = list(schedule.templates()), _keys(schedule)
    most = len(schedule.workers) if cores is None else min(cores, len(schedule.workers))
    if most == 1:
        return {}
    moments = np.unique([table["start"], table["end"]])
    first, last = (np.searchsorted(moments, table[side]) for side in ("start", "end"))
    running = np.cumsum(
        np.bincount(first, minlength=moments.size) - np.bincount(last, minlength=moments.size)
    )[:-1]
    # Of n - 1 others, as many run as there are cores for.
    lengths = np.diff(moments) * np.where(
        running > most, (most - 1) / np.maximum(running - 1, 1), 1.0
    )

    def per_place(seconds: NDArray[np.float64]) -> list[float]:
        found: list[float] = np.bincount(place, seconds * steady, len(templates)).tolist()
        return found

    def since_start(running: NDArray[np.int_]) -> NDArray[np.float64]:
        return np.concatenate([[0.0], np.cumsum(running * lengths)])

    total: dict[tuple[OpKind, int], float] = defaultdict(float)
    shared: Overlap = defaultdict(lambda: defaultdict(float))
    for key, seconds in zip(keys, per_place(table["end"] - table["start"]), strict=True):
        total[key] += seconds
    for kind in dict.fromkeys(template.kind for template in templates):
        same = np.array([template.kind is kind for template in templates])[place]
        starts, ends = (np.bincount(at[same], minlength=moments.size) for at in (first, last))
        running = np.cumsum(starts - ends)[:-1]
        anyone, others = since_start(running), since_start(np.maximum(running - 1, 0))
        meanwhile = np.where(same, others[last] - others[first], anyone[last] - anyone[first])
        for key, overlap in zip(keys, per_place(meanwhile), strict=True):
            shared[key][kind] += overlap / (most - 1)
    return {
        key: {kind: overlap / seconds for kind, overlap in shared[key].items()}
        for key, seconds in total.items()
        if seconds > 0
    }
