"""What one schedule costs on a cluster: one point of a plan, for several sizes of the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ddg_sim.batches import Cut, partitions
from ddg_sim.cluster import Cluster
from ddg_sim.cutcosts import CutCosts
from ddg_sim.cycletime import CycleTime
from ddg_sim.layers import LayerGraph
from ddg_sim.partition import Partition
from ddg_sim.placement import Placement, place
from ddg_sim.replicate import replicate
from ddg_sim.schedule import Schedule
from ddg_sim.simulate import SteadyStateError, simulate, steady_period
from ddg_sim.times import Array, Time

#: Steady iterations of each run where times vary.
STEADY = 100
#: Iterations after which a simulation of shared buses stops looking for its steady state.
LONGEST = 1024


@dataclass(frozen=True, slots=True)
class Setting:
    """What all points of a plan share; see `plan.plan`.

    ``optimizer_state`` is bytes of gradients and optimizer state per byte of parameters.
    """

    graph: LayerGraph
    cluster: Cluster | None = None
    optimizer_state: float = 1.0
    jitter: Time = 1.0
    precision: float = 0.01
    seed: int = 0
    exact: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a schedule costs with one batch.

    Args:
        cuts: first layer of stages 1..K-1.
        periods: seconds per iteration of every random run; a single one where nothing varies.
        lower_bound: seconds; no cuts have a shorter period, with mean times.
        memory: peak bytes per worker.
        missing: why it does not fit into memory; None if it does.
        bound: in a few words, what bounds the period.
        bound_by: the same in a sentence.
    """

    cuts: tuple[int, ...]
    periods: Array
    lower_bound: float
    memory: tuple[float, ...]
    missing: str | None
    bound: str
    bound_by: str


def outcomes(setting: Setting, schedule: Schedule, factors: Sequence[float]) -> list[Outcome]:
    """Cut, time and weigh a schedule, for several batches.

    Args:
        setting: the network and the devices.
        schedule: a valid schedule.
        factors: samples per update over all replicas, in batches of the profile. Seconds and bytes
            of layers are taken as proportional to the samples of an operation.

    Raises:
        ClusterError: if the cluster cannot hold the schedule, whatever the batch.
        ValueError: for more stages than layers.

    >>> from ddg_sim.layers import Layer
    >>> from ddg_sim.methods import ddg
    >>> pair = LayerGraph((Layer("a", 1, 2, 8, 4), Layer("b", 1, 2, 8, 4)), ((0, 1),))
    >>> for found in outcomes(Setting(pair), ddg(2), [1.0, 2.0]):
    ...     print(found.cuts, found.periods, found.memory, found.bound)
    (1,) [3.] (28.0, 24.0) stage 1
    (1,) [6.] (44.0, 40.0) stage 1
    """
    placement = place(schedule, setting.cluster)
    schedule = replace(schedule, queue=placement.queue)
    operations = schedule.samples_per_iteration * schedule.replicas
    scales = [factor / operations for factor in factors]
    costs = CutCosts(
        setting.graph,
        schedule,
        speeds=placement.speeds,
        latency=placement.latency,
        bandwidth=placement.bandwidth,
        capacities=placement.capacities,
        optimizer_state=setting.optimizer_state,
        all_reduce_latency=placement.all_reduce_latency,
        all_reduce_rate=placement.all_reduce_rate,
        overhead=placement.overhead,
        message=placement.message,
        network=replace(placement.network, buses=()),  # best as long as no bus is shared
    )
    if not _proportional(placement):
        found = partitions(costs, scales, quick=not setting.exact)
        return [_outcome(setting, placement, schedule, found[scale]) for scale in scales]
    # All seconds are proportional to the batch: the best cuts are the same, and so is the cycle.
    unit = partitions(costs, [1.0], quick=not setting.exact)[1.0].partition
    values = _periods(setting, placement, schedule, unit)
    kept = costs.at(0.0).memory(unit.cuts)
    return [
        Outcome(
            unit.cuts,
            values * scale,
            unit.lower_bound * scale,
            tuple(a + scale * (b - a) for a, b in zip(kept, unit.memory, strict=True)),
            None,
            _short(unit.cycle),
            _times(unit.cycle, scale).explain(),
        )
        for scale in scales
    ]


def _proportional(placement: Placement) -> bool:
    """Whether nothing but what is proportional to the batch takes time, or sets a limit."""
    fixed = (*placement.latency, *placement.all_reduce_latency, *placement.all_reduce_rate)
    host = (placement.overhead, placement.message)
    unlimited = all(map(math.isinf, placement.capacities))
    return unlimited and not any(fixed) and not any(host)


def _outcome(setting: Setting, placement: Placement, schedule: Schedule, cut: Cut) -> Outcome:
    found = cut.partition
    values = _periods(setting, placement, schedule, found)
    bound_by = found.cycle.explain()
    if placement.network.buses:
        more = float(values.mean()) / found.period - 1 if found.period else 0.0
        bound_by += f"; sharing buses adds {100 * more:.3g} %"
    return Outcome(
        found.cuts,
        values,
        found.lower_bound,
        found.memory,
        cut.missing,
        _short(found.cycle),
        bound_by,
    )


def _periods(setting: Setting, placement: Placement, schedule: Schedule, found: Partition) -> Array:
    """Seconds per iteration, of many runs where times vary."""
    if setting.jitter == 1 and not placement.network.buses:
        return np.array([found.period])
    costs = replace(
        found.costs, jitter=(setting.jitter,) * schedule.num_stages, network=placement.network
    )
    if costs.random:
        length = STEADY + 2 * schedule.num_ticks(0)
        case = {"": (schedule, costs)}
        return replicate(case, length, setting.precision, seed=setting.seed)[""]
    try:
        return np.array([steady_period(schedule, costs, LONGEST)])
    except SteadyStateError:
        return np.array([simulate(schedule, costs, LONGEST).period])


def _times(cycle: CycleTime, scale: float) -> CycleTime:
    return replace(
        cycle,
        period=cycle.period * scale,
        seconds=cycle.seconds * scale,
        durations=tuple(duration * scale for duration in cycle.durations),
    )


def _short(cycle: CycleTime) -> str:
    """What bounds the period, in a few words; stages count from 1."""
    templates = [event.template for event in cycle.cycle if event.template is not None]
    if not templates:
        return "a link"
    if any(event.node is None and event.message is None for event in cycle.cycle):
        return "barriers"
    stages = sorted({template.stage + 1 for template in templates})
    workers = {event.node.worker for event in cycle.cycle if event.node is not None}
    if len(stages) == 1:
        return f"stage {stages[0]}"
    if len(workers) == 1:
        return f"worker {min(workers) + 1}"
    return f"round trip {stages[0]}-{stages[-1]}"
