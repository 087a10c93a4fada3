"""Cutting a network into stages so that a schedule's own period is least.

The period of a schedule is the largest ratio of seconds to tokens over the cycles of its event
graph (`cycle_time`), and the seconds of a cycle are a sum of functions of single cuts
(`ddg_sim.separable`). So every schedule is partitioned by the same three steps, whatever its
method: cut so that the cycles known so far are short enough, ask `cycle_time` what bounds these
cuts, remember that cycle. A cycle exists for all cuts: the known ones give a lower bound, and when
`cycle_time` agrees with it the partition is optimal (cutting planes; derived here).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ddg_sim.costs import Costs
from ddg_sim.cutcosts import CutCosts
from ddg_sim.cycletime import CycleTime, cycle_time
from ddg_sim.descent import descend, enumerate_all
from ddg_sim.labels import TooManyLabelsError
from ddg_sim.layers import LayerGraph
from ddg_sim.network import FREE, Network
from ddg_sim.schedule import Schedule
from ddg_sim.separable import NEAR, TOLERANCE, Cuts, Minimum, Row, minimise
from ddg_sim.times import Array

#: So many possible cuts are all looked at.
FEW = 20_000


class DoesNotFitError(ValueError):
    """No partition fits into the devices' memory; the message names a device."""


@dataclass(frozen=True, slots=True)
class Partition:
    """A network cut into the stages of a schedule.

    Args:
        cuts: first layer of stages 1..K-1 (stages and layers count from 0).
        network: what any cuts of it cost.
        cycle: the period, and what bounds it.
        lower_bound: seconds; no partition that fits has a shorter period.
    """

    cuts: tuple[int, ...]
    network: CutCosts
    cycle: CycleTime
    lower_bound: float

    @property
    def costs(self) -> Costs:
        """Seconds of the stages and links."""
        return self.network.costs(self.cuts)

    @property
    def memory(self) -> tuple[float, ...]:
        """Peak bytes per worker."""
        return self.network.memory(self.cuts)

    @property
    def period(self) -> float:
        """Steady-state seconds per iteration."""
        return self.cycle.period

    @property
    def exact(self) -> bool:
        """Whether the partition is known to be optimal, to rounding."""
        return Minimum(self.cuts, self.period, self.lower_bound).exact


def partition(
    graph: LayerGraph,
    schedule: Schedule,
    *,
    speeds: float | Iterable[float] = 1.0,
    latency: float | Iterable[float] = 0.0,
    bandwidth: float | Iterable[float] = math.inf,
    capacities: float | Iterable[float] = math.inf,
    optimizer_state: float = 1.0,
    barrier: float = 0.0,
    all_reduce_latency: float | Iterable[float] = 0.0,
    all_reduce_rate: float | Iterable[float] = 0.0,
    overhead: float = 0.0,
    message: float = 0.0,
    network: Network = FREE,
    quick: bool = False,
) -> Partition:
    """Cut a network into contiguous stages with the least period of this schedule.

    Optimal among all cuts of the layers' topological order, as `Partition.exact` says; of
    partitions whose periods agree to nine digits the one with the earliest cuts
    (lexicographically), so the same question has the same answer every time.

    The time for it depends on how many cycles bound partitions that are nearly as good. Where
    many do and the devices differ (barriers above all), it stops after some seconds: then
    `Partition.lower_bound` says how much better a partition could be at most.

    Peak memory of a stage: parameters times (weight versions + ``optimizer_state``), and per live
    sample the output of each of its layers and what came in; where the method does not keep them
    (recomputed, reconstructed, or only the newest sample's), those of one sample. A stage on
    several workers counts on the one that runs its updates.

    Args:
        graph: L layers; seconds and bytes are those of one sample of the schedule (a micro-batch
            where an iteration takes several).
        schedule: a valid schedule of K stages.
        speeds: of the schedule's workers; a layer takes its seconds divided by the speed.
        latency: seconds per message, one number or one per link; link k joins stages k and k+1.
        bandwidth: bytes per second, likewise.
        capacities: bytes of memory, of the schedule's workers.
        optimizer_state: bytes of gradients and optimizer state per byte of parameters: 1 for
            plain SGD (the gradient), 2 with momentum, 3 for Adam.
        barrier: seconds from the last worker's coming to a barrier until all go on.
        all_reduce_latency: seconds of an all-reduce whatever its size, one number or per stage.
        all_reduce_rate: its seconds per byte of parameters, likewise.
        overhead: host seconds that every operation costs on top.
        message: host seconds that an operation spends on each message it sends or receives.
        network: how messages travel; it has no buses.
        quick: whether, where there are many cuts and enough memory, to be content with those that
            moving a single one does not improve; `Partition.exact` says whether they are known to
            be optimal.

    Raises:
        DoesNotFitError: naming a device, what it needs and has, if nothing fits.
        ValueError: naming the argument, for fewer layers than stages, a wrong number of values,
            or a value out of range; from `Costs`, for operations without a known cost
            (all-reduce).

    >>> from ddg_sim.layers import Layer
    >>> from ddg_sim.methods import bp, ddg
    >>> layers = tuple(Layer(f"layer{n}", 1, 2, output_bytes=100 - n) for n in range(6))
    >>> chain = LayerGraph(layers, tuple((n, n + 1) for n in range(5)))
    >>> partition(chain, ddg(3)).cuts, partition(chain, ddg(3)).period
    ((2, 4), 6.0)
    >>> partition(chain, bp(3), bandwidth=1000).cuts  # cuts where least crosses
    (4, 5)
    >>> partition(chain, bp(3), capacities=250)
    Traceback (most recent call last):
    ...
    ddg_sim.partition.DoesNotFitError: does not fit: stage 2 needs 294 B of 250 B, ...
    """
    costs = CutCosts(
        graph,
        schedule,
        speeds=speeds,
        latency=latency,
        bandwidth=bandwidth,
        capacities=capacities,
        optimizer_state=optimizer_state,
        barrier=barrier,
        all_reduce_latency=all_reduce_latency,
        all_reduce_rate=all_reduce_rate,
        overhead=overhead,
        message=message,
        network=network,
    )
    return Cutter(costs, quick).cut(1.0)


class Cutter:
    """Cuts one network for one schedule; what one batch teaches makes the next one quicker.

    Args:
        costs: of the network on the schedule's devices.
        quick: see `partition`.
    """

    def __init__(self, costs: CutCosts, quick: bool) -> None:
        self.costs, self.quick = costs, quick
        self.rows: list[Row] = list(costs.loops)  # cycles hold for every batch
        self.points: list[tuple[int, ...]] = []  # cuts that may be good for another batch
        self.weights: list[Array] = []  # of rows: each gives a lower bound for every batch

    def problem(self, costs: CutCosts) -> Cuts:
        """Everything known about the periods of cuts, for a batch."""
        rows = [*costs.limits(), *self.rows]
        return Cuts(costs.basis, costs.totals, rows, self.points, self.weights)

    def cut(self, batch: float, near: bool = False) -> Partition:
        """The best cuts for a batch, see `partition`.

        Args:
            batch: in batches of the network's.
            near: whether a quick search begins at cuts of other batches only.

        Raises:
            DoesNotFitError: if nothing fits into memory.
        """
        costs = self.costs.at(batch)
        problem = self.problem(costs)
        cycles: dict[tuple[int, ...], CycleTime] = {}

        def period(cuts: tuple[int, ...]) -> float:
            if cuts not in cycles:
                bound = cycles[cuts] = cycle_time(costs.schedule, costs.costs(cuts))
                if bound.period > problem.level(cuts) * (1 + TOLERANCE / 10):  # else it is known
                    row = costs.cycle_row(bound.cycle, bound.tokens)
                    problem.add(row)
                    self.rows.append(row)
                    # Else it would be found again and again: the row says what the cycle says.
                    assert problem.level(cuts) >= bound.period * (1 - TOLERANCE)
            return cycles[cuts].period

        best = self._best(costs, problem, period, near)
        period(best.cuts)
        self.points = list(dict.fromkeys([*problem.relaxed, best.cuts]))
        self.weights = problem.weights
        return Partition(best.cuts, costs, cycles[best.cuts], best.lower_bound)

    def _best(
        self,
        costs: CutCosts,
        problem: Cuts,
        period: Callable[[tuple[int, ...]], float],
        near: bool,
    ) -> Minimum:
        start = min(filter(problem.within_limits, self.points), key=problem.level, default=None)
        if start is None:
            start = fitting(costs)
        if start is None:
            raise DoesNotFitError(misfit(costs))
        if few(costs):
            return enumerate_all(problem, period)
        starts = [start]
        if not near:
            starts += [costs.even_cuts(), *(costs.bottleneck_cuts(w) for w in (0, 1, 2))]
        best = descend(problem, period, starts)
        if not self.quick:
            return minimise(problem, period, best.cuts)
        better = [cuts for cuts in problem.relaxed if problem.level(cuts) < best.value]
        if best.exact or all(map(problem.within_limits, [*starts, *better])):
            return best
        # Where memory is short, single moves lead nowhere, but there are fewer cuts to choose from.
        return minimise(problem, period, best.cuts, NEAR if near else TOLERANCE)


def few(costs: CutCosts) -> bool:
    """Whether there are so few cuts that all are looked at."""
    return math.comb(costs.basis.shape[2] - 2, costs.basis.shape[0]) <= FEW


def fitting(costs: CutCosts) -> tuple[int, ...] | None:
    """Some cuts that fit into memory, if any are found.

    There may be some all the same where memory is so short, and devices are so different, that
    looking for them would take too long.
    """
    problem = Cuts(costs.basis, costs.totals, costs.limits())
    start = costs.even_cuts()
    if problem.within_limits(start):
        return start
    try:
        return problem.earliest(0.0)
    except TooManyLabelsError:
        shares = _shares(costs)
        shared = minimise(shares, shares.level, _shared_out(shares, costs).cuts)
        return shared.cuts if problem.within_limits(shared.cuts) else None


def _shares(costs: CutCosts) -> Cuts:
    """The problem of sharing memory out: the level is the largest share of a device's memory."""
    rows = [replace(row, rate=row.limit, limit=0.0) for row in costs.limits()]
    return Cuts(costs.basis, costs.totals, rows)


def _shared_out(shares: Cuts, costs: CutCosts) -> Minimum:
    return descend(shares, shares.level, [costs.even_cuts()])


def misfit(costs: CutCosts) -> str:
    """Say which device is overfull where memory is shared out as well as was found."""
    shares = _shares(costs)
    shared = enumerate_all(shares, shares.level) if few(costs) else _shared_out(shares, costs)
    needs, sizes = costs.memory(shared.cuts), costs.capacities
    worker = max(range(len(sizes)), key=lambda w: needs[w] / sizes[w])
    stages = [
        str(stage + 1)
        for stage in range(costs.schedule.num_stages)
        if costs.schedule.worker_of(stage) == worker
    ]
    where = f"stage{'s' if len(stages) > 1 else ''} {', '.join(stages)}"
    best = "best" if shared.exact else "as well as was found"
    return (
        f"does not fit: {where} need{'' if len(stages) > 1 else 's'} {bytes_text(needs[worker])}"
        f" of {bytes_text(sizes[worker])}, even where memory is shared out {best}"
        f" (cuts {list(shared.cuts)}): give larger capacities or more stages"
    )


def bytes_text(size: float) -> str:
    """Bytes as a person would write them, to three digits.

    >>> bytes_text(18.2e9), bytes_text(16e9), bytes_text(500), bytes_text(0)
    ('18.2 GB', '16 GB', '500 B', '0 B')
    """
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.3g} B"
