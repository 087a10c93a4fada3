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

import numpy as np
from numpy.typing import NDArray

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
                scaled(time, 1 + _extra(contention[stage], kind, overlap.get((kind, stage), {})))
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
    """Per kind and stage, the mean fraction of the other workers that run which kind meanwhile.

    Between two moments at which something starts or ends, the number of workers that run a kind
    stays the same; so the seconds shared since the beginning are one sum over these moments.
    """
    schedule = timeline.schedule
    table = timeline.op_columns[timeline.op_columns["end"] > timeline.op_columns["start"]]
    templates = list(schedule.templates())
    before = np.cumsum([0, *map(len, schedule.workers)])  # templates of earlier workers
    place = before[table["lane"]] + table["position"]
    moments = np.unique([table["start"], table["end"]])
    first, last = (np.searchsorted(moments, table[side]) for side in ("start", "end"))
    lag = schedule.num_ticks(0)  # warm-up and drain do not count
    steady = (table["iteration"] >= lag) & (table["iteration"] < timeline.iterations - lag)

    def per_place(seconds: NDArray[np.float64]) -> list[float]:
        found: list[float] = np.bincount(place, seconds * steady, len(templates)).tolist()
        return found

    def since_start(running: NDArray[np.int_]) -> NDArray[np.float64]:
        return np.concatenate([[0.0], np.cumsum(running * np.diff(moments))])

    total: dict[tuple[OpKind, int], float] = defaultdict(float)
    shared: Overlap = defaultdict(lambda: defaultdict(float))
    keys = [
        (
            template.kind if template.kind in FIELDS else LIKE.get(template.kind, template.kind),
            template.stage,
        )
        for template in templates
    ]
    for key, seconds in zip(keys, per_place(table["end"] - table["start"]), strict=True):
        total[key] += seconds
    for kind in dict.fromkeys(template.kind for template in templates):
        same = np.array([template.kind is kind for template in templates])[place]
        starts, ends = (np.bincount(at[same], minlength=moments.size) for at in (first, last))
        running = np.cumsum(starts - ends)[:-1]
        anyone, others = since_start(running), since_start(np.maximum(running - 1, 0))
        meanwhile = np.where(same, others[last] - others[first], anyone[last] - anyone[first])
        for key, overlap in zip(keys, per_place(meanwhile), strict=True):
            shared[key][kind] += overlap / (len(schedule.workers) - 1)
    return {
        key: {kind: overlap / seconds for kind, overlap in shared[key].items()}
        for key, seconds in total.items()
        if seconds > 0
    }
