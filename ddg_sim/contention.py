"""Operations that slow each other down because they share a machine.

Cores share caches, memory and power, so an operation takes longer while other stages compute too,
and how much longer depends on what they compute: two backward passes at once may disturb each
other more than a forward and a backward pass. How often which operations overlap depends on the
schedule: hardly ever in backpropagation, always in DDG without a barrier, backward passes among
themselves in DDG with one. So a profile measures each stage alone and beside the others, and this
module finds durations that agree with the overlap they lead to.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ddg_sim.costs import Costs
from ddg_sim.cycletime import evaluate
from ddg_sim.schedule import OpKind, Schedule
from ddg_sim.simulate import simulate
from ddg_sim.timeline import Timeline
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
#: (own kind, the others' kind): how many times longer it takes while all others run that.
Slowdown = Mapping[tuple[OpKind, OpKind], float]
#: Per stage such factors, or one number for all kinds.
Contention = Sequence[float | Slowdown]


def contended(schedule: Schedule, costs: Costs, contention: Contention) -> Costs:
    """Costs of a schedule whose stages slow each other down.

    An operation of kind a that overlaps with a fraction p_b of the other workers' operations of
    kind b takes 1 + Σ_b p_b (c_ab - 1) times as long as alone: linear between the cases that were
    measured, and on average over an operation (derived here). Kinds that no factor is given for
    do not disturb; recomputing counts as forward, and half a backward pass as backward.

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
    play = simulate if costs.network.buses else evaluate
    for _ in range(TURNS):
        overlap = _overlap(play(schedule, slowed.means(), 3 * schedule.num_ticks(0) + 12))
        longer: dict[str, Any] = {
            name: tuple(
                scaled(time, 1 + _extra(contention[stage], kind, overlap[kind, stage]))
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
    own = LIKE.get(kind, kind)
    return sum(
        part * (given.get((own, LIKE.get(other, other)), 1.0) - 1)
        for other, part in overlap.items()
    )


Overlap = dict[tuple[OpKind, int], dict[OpKind, float]]


def _overlap(timeline: Timeline) -> Overlap:
    """Per kind and stage, the mean fraction of the other workers that run which kind meanwhile."""
    schedule = timeline.schedule
    spans = [(span, op) for span, op in timeline.operations if span.duration > 0]
    home = {
        (template.kind, template.stage): worker
        for worker, body in enumerate(schedule.workers)
        for template in body
    }
    others = len(schedule.workers) - 1
    lag = schedule.num_ticks(0)
    steady = range(lag, timeline.iterations - lag)  # neither warm-up nor drain
    shared: Overlap = defaultdict(lambda: defaultdict(float))
    total: dict[tuple[OpKind, int], float] = defaultdict(float)
    first = 0  # spans are sorted by start: those before it end too early to matter
    longest = max((span.duration for span, _ in spans), default=0.0)
    for span, op in spans:
        if op.iteration not in steady:
            continue
        while spans[first][0].start < span.start - longest:
            first += 1
        key = (op.kind if op.kind in FIELDS else LIKE.get(op.kind, op.kind), op.stage)
        for other, its_op in spans[first:]:
            if other.start >= span.end:
                break
            if home[its_op.kind, its_op.stage] != home[op.kind, op.stage]:
                common = min(span.end, other.end) - max(span.start, other.start)
                shared[key][its_op.kind] += max(0.0, common) / others
        total[key] += span.duration
    fractions: Overlap = defaultdict(dict)
    for key, seconds in total.items():
        fractions[key] = {other: part / seconds for other, part in shared[key].items()}
    return fractions
