"""Cutting one network for many sizes of the batch, at little more than the price of a few.

With given cuts, the seconds of every cycle of a schedule are an affine function of the batch, and
the period, the largest of them, is convex. So where the cycle that is critical for a small batch is
as critical for a large one, it is for all between, and none of those needs `cycle_time`. Nor do
they need a search, where what is known from their neighbours proves their cuts best, or at least as
good as a search would leave them (derived here).
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ddg_sim.cutcosts import CutCosts
from ddg_sim.cycletime import CycleTime
from ddg_sim.descent import enumerate_all, levels_around
from ddg_sim.partition import Cutter, Partition, few, fitting, misfit
from ddg_sim.separable import TOLERANCE


@dataclass(frozen=True, slots=True)
class Cut:
    """The partition for one batch; where nothing fits, the one with unlimited memory.

    ``missing`` says why it does not fit into memory; None if it does.
    """

    partition: Partition
    missing: str | None


def partitions(costs: CutCosts, batches: Sequence[float], quick: bool = True) -> dict[float, Cut]:
    """Cut a network for each of several batches, as `partition.partition` does it for one.

    Of cuts that are equally good, a batch gets those that its neighbours have.

    Args:
        costs: of the network on the schedule's devices.
        batches: in batches of the network's.
        quick: whether to be content with cuts that moving a single one does not improve;
            `Partition.exact` says whether they are known to be optimal.

    >>> from ddg_sim.layers import Layer, LayerGraph
    >>> from ddg_sim.methods import fdg
    >>> layers = tuple(Layer(f"layer{n}", 1, 2, 10 * n) for n in range(6))
    >>> chain = LayerGraph(layers, tuple((n, n + 1) for n in range(5)))
    >>> costs = CutCosts(chain, fdg(2), latency=5.0)
    >>> for batch, cut in partitions(costs, [1, 2, 3]).items():
    ...     print(batch, cut.partition.cuts, cut.partition.period)
    1 (2,) 14.0
    2 (3,) 23.0
    3 (3,) 32.0
    """
    order = sorted(set(batches))
    fits = order  # what does not fit does not with a larger batch either
    if fitting(costs.at(order[-1])) is None:
        fits = order[: bisect(order, False, key=lambda batch: fitting(costs.at(batch)) is None)]
    found = {batch: Cut(each, None) for batch, each in _sweep(Cutter(costs, quick), fits).items()}
    unlimited = Cutter(costs.unlimited(), quick)
    for batch, each in _sweep(unlimited, order[len(fits) :]).items():
        found[batch] = Cut(each, misfit(costs.at(batch)))
    return {batch: found[batch] for batch in batches}


def _sweep(cutter: Cutter, batches: Sequence[float]) -> dict[float, Partition]:
    """Cut for the smallest and the largest, and between them as often as there are changes."""
    found: dict[float, Partition] = {}
    for index in {0, len(batches) - 1} if batches else ():
        found[batches[index]] = cutter.cut(batches[index])
    spans = [(0, len(batches) - 1)]
    while spans:
        first, last = spans.pop()
        if last - first < 2:
            continue
        span = _Span(batches[first], batches[last], found[batches[first]], found[batches[last]])
        if span.one_cycle:
            for pivot in range(first + 1, last):
                between = span.at(batches[pivot], cutter)
                if between is None:
                    break
                found[batches[pivot]] = between
            else:
                continue
        else:
            pivot = bisect(batches, span.change, first + 1, last - 1)
        found[batches[pivot]] = cutter.cut(batches[pivot], near=True)
        spans += [(first, pivot), (pivot, last)]
    return found


class _Span:
    """What the partitions for two batches say about the batches between."""

    def __init__(self, low: float, high: float, first: Partition, last: Partition) -> None:
        self.ends, self.first, self.last = (low, high), first, last
        self.later = _timed(first, last.network)  # the first one's critical cycle at the last

    @property
    def one_cycle(self) -> bool:
        """Whether one cycle, with the same cuts, bounds both ends, and so all between."""
        later = math.fsum(self.later) / self.first.cycle.tokens
        near = math.isclose(later, self.last.period, rel_tol=TOLERANCE / 10)
        return near and self.first.cuts == self.last.cuts

    @property
    def change(self) -> float:
        """The batch at which the critical cycle of the last one overtakes that of the first."""
        earlier = math.fsum(_timed(self.last, self.first.network)) / self.last.cycle.tokens
        ahead = self.first.period - earlier
        behind = self.last.period - math.fsum(self.later) / self.first.cycle.tokens
        share = ahead / (ahead + behind) if min(ahead, behind) > 0 else 0.5
        return self.ends[0] + share * (self.ends[1] - self.ends[0])

    def at(self, batch: float, cutter: Cutter) -> Partition | None:
        """The partition of both ends for a batch between them; None: it needs a search."""
        costs = cutter.costs.at(batch)
        problem = cutter.problem(costs)
        cuts = self.first.cuts
        cycle = self._cycle(batch)
        if not problem.within_limits(cuts):
            return None
        less = cycle.period * (1 - TOLERANCE)
        if few(costs):
            bound = enumerate_all(problem, problem.level).value
            if bound < less:
                return None
        else:
            bound = problem.known_bound()
            if bound < less and self.first.exact and problem.excludes(less):
                bound = less
            if bound < less:
                promised = min(map(problem.level, problem.relaxed), default=less)
                promised = min(promised, levels_around(problem, cuts)[0].min(initial=less))
                if not cutter.quick or promised < less:
                    return None
        return Partition(cuts, costs, cycle, min(bound, cycle.period))

    def _cycle(self, batch: float) -> CycleTime:
        low, high = self.ends
        share = (batch - low) / (high - low)
        cycle = self.first.cycle
        durations = tuple(
            (1 - share) * early + share * late
            for early, late in zip(cycle.durations, self.later, strict=True)
        )
        seconds = math.fsum(durations)
        return replace(cycle, period=seconds / cycle.tokens, seconds=seconds, durations=durations)


def _timed(found: Partition, network: CutCosts) -> tuple[float, ...]:
    """Seconds of the critical cycle's events, with the same cuts for another batch."""
    costs = network.costs(found.cuts)
    return tuple(event.seconds(costs) for event in found.cycle.cycle)
