"""Operations that slow each other down because they share a machine.

Cores share caches, memory and power, so a stage computes more slowly while others compute too. How
often they do depends on the schedule: hardly ever in backpropagation, always in DDG without a
barrier. So a profile measures each stage alone and beside the others, and this module finds
durations that agree with the overlap they lead to.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ddg_sim.costs import Costs
from ddg_sim.cycletime import evaluate
from ddg_sim.schedule import OpKind, Schedule
from ddg_sim.timeline import Timeline

#: Times that overlap and durations are computed in turn; both change little after two.
TURNS = 4
FIELDS = {
    OpKind.FORWARD: "forward",
    OpKind.BACKWARD: "backward",
    OpKind.UPDATE: "update",
    OpKind.RECOMPUTE: "recompute",
}


def contended(schedule: Schedule, costs: Costs, contention: Sequence[float]) -> Costs:
    """Costs of a schedule whose stages slow each other down.

    An operation of stage k that overlaps with a fraction p of the other workers' computing takes
    1 + p (c_k - 1) times as long as alone: linear between the two cases that were measured, and on
    average over an operation (derived here).

    Args:
        schedule: what runs.
        costs: seconds of every operation alone.
        contention: per stage c_k >= 1, how many times longer it takes while all others compute.

    Raises:
        ValueError: for a wrong number of factors, or one below 1 or not finite.

    >>> from ddg_sim.costs import costs
    >>> from ddg_sim.methods import bp, ddg
    >>> alone = costs(2, forward=1.0, backward=2.0)
    >>> contended(bp(2), alone, [1.5, 1.5]) == alone  # nothing overlaps
    True
    >>> contended(ddg(2), alone, [1.5, 1.5]).backward  # everything does
    (3.0, 3.0)
    """
    if len(contention) != schedule.num_stages:
        raise ValueError(
            f"contention has {len(contention)} values, but there are {schedule.num_stages} stages"
        )
    if not all(math.isfinite(factor) and factor >= 1 for factor in contention):
        raise ValueError(f"contention must be finite and at least 1, got {list(contention)}")
    if len(schedule.workers) == 1 or all(factor == 1 for factor in contention):
        return costs
    slowed = costs
    for _ in range(TURNS):
        overlap = _overlap(evaluate(schedule, slowed, 3 * schedule.num_ticks(0) + 12))
        longer: dict[str, Any] = {
            name: tuple(
                seconds * (1 + overlap[kind, stage] * (contention[stage] - 1))
                for stage, seconds in enumerate(getattr(costs, name))
            )
            for kind, name in FIELDS.items()
        }
        slowed = replace(costs, **longer)
    return slowed


def _overlap(timeline: Timeline) -> dict[tuple[OpKind, int], float]:
    """Mean fraction of the other workers that compute during an operation, in steady state."""
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
    shared: dict[tuple[OpKind, int], float] = defaultdict(float)
    total: dict[tuple[OpKind, int], float] = defaultdict(float)
    first = 0  # spans are sorted by start: those before it end too early to matter
    longest = max((span.duration for span, _ in spans), default=0.0)
    for span, op in spans:
        if op.iteration not in steady:
            continue
        while spans[first][0].start < span.start - longest:
            first += 1
        common = 0.0
        for other, its_op in spans[first:]:
            if other.start >= span.end:
                break
            if home[its_op.kind, its_op.stage] != home[op.kind, op.stage]:
                common += max(0.0, min(span.end, other.end) - max(span.start, other.start))
        shared[op.kind, op.stage] += common / others
        total[op.kind, op.stage] += span.duration
    return defaultdict(float, {key: shared[key] / seconds for key, seconds in total.items()})
