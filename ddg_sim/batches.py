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

from ddg_sim.costs import Costs
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

    def search(index: int, near: bool) -> None:
        found[batches[index]] = cutter.cut(batches[index], near)

    for index in {0, len(batches) - 1} if batches else ():
        search(index, near=False)
    spans = [(0, len(batches) - 1)]
    while spans:
        low, high = spans.pop()
        if high - low < 2:
            continue
        ends = [(batches[index], found[batches[index]]) for index in (low, high)]
        if not _same_cycle(cutter.costs, *ends):
            pivot = bisect(batches, _crossing(cutter.costs, *ends), low + 1, high - 1)
        else:
            for pivot in range(low + 1, high):
                between = _between(cutter, batches[pivot], ends[0][1])
                if between is None:
                    break
                found[batches[pivot]] = between
            else:
                continue
        search(pivot, near=True)
        spans += [(low, pivot), (pivot, high)]
    return found


_Point = tuple[float, Partition]


def _line(costs: CutCosts, point: _Point, batch: float) -> float:
    """What the critical cycle of one batch, with its cuts, makes of another batch's period."""
    cycle = point[1].cycle
    row = costs.cycle_row(cycle.cycle, cycle.tokens)
    return costs.at(batch).value(row, point[1].cuts) / cycle.tokens


def _same_cycle(costs: CutCosts, low: _Point, high: _Point) -> bool:
    """Whether one cycle, with the same cuts, bounds both batches, and so all between."""
    if low[1].cuts != high[1].cuts:
        return False
    return math.isclose(_line(costs, low, high[0]), high[1].period, rel_tol=TOLERANCE / 10)


def _crossing(costs: CutCosts, low: _Point, high: _Point) -> float:
    """The batch at which the critical cycle of the larger one overtakes that of the smaller."""
    ahead = low[1].period - _line(costs, high, low[0])
    behind = high[1].period - _line(costs, low, high[0])
    share = ahead / (ahead + behind) if min(ahead, behind) > 0 else 0.5
    return low[0] + share * (high[0] - low[0])


def _between(cutter: Cutter, batch: float, neighbour: Partition) -> Partition | None:
    """The neighbour's partition for this batch, which its cycle bounds; None: search anew."""
    costs = cutter.costs.at(batch)
    problem = cutter.problem(costs)
    cuts = neighbour.cuts
    seconds = costs.costs(cuts)
    cycle = _timed(neighbour.cycle, seconds)
    period = cycle.period
    if not problem.within_limits(cuts):
        return None
    if few(costs):
        bound = enumerate_all(problem, problem.level).value
        if bound < period * (1 - 2 * TOLERANCE):
            return None
    else:
        bound, less = problem.known_bound(), period * (1 - TOLERANCE)
        if bound < less and neighbour.exact and problem.excludes(less):
            bound = less
        if bound < less:
            promised = min(map(problem.level, problem.relaxed), default=less)
            promised = min(promised, levels_around(problem, cuts)[0].min(initial=less))
            if not cutter.quick or promised < less:
                return None
    return Partition(cuts, seconds, cycle, min(bound, period), costs.memory(cuts))


def _timed(cycle: CycleTime, costs: Costs) -> CycleTime:
    """The same cycle at other costs of the network, but with the same host."""
    durations = tuple(event.seconds(costs) for event in cycle.cycle)
    seconds = math.fsum(durations)
    return replace(cycle, period=seconds / cycle.tokens, seconds=seconds, durations=durations)
