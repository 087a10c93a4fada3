"""Exact times of a deterministic schedule from its event graph, without simulating.

`evaluate` runs the max-plus recursion, `cycle_time` computes its eigenvalue, the steady-state
period: the largest ratio, over all cycles, of the cycle's seconds to its tokens (Reiter 1968). A
cycle that attains it is critical: nothing but speeding up one of its members shortens the period.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ddg_sim.costs import Costs
from ddg_sim.dependencies import Node, template_at
from ddg_sim.draws import durations
from ddg_sim.eventgraph import (
    Arc,
    Event,
    EventGraph,
    Integers,
    check_cores,
    check_stages,
    event_graph,
    state_ticks,
    takes_place,
    unroll,
)
from ddg_sim.explain import explain_cycle
from ddg_sim.schedule import OpKind, Schedule, ScheduleError
from ddg_sim.timeline import Timeline, columns
from ddg_sim.times import Array

#: Periods and times that differ by less than this fraction count as equal.
ROUNDING = 1e-13
#: Policy iteration needs some ten turns; this many mean that something is wrong.
MOST_TURNS = 10_000


def evaluate(
    schedule: Schedule,
    costs: Costs,
    iterations: int,
    drain: bool = True,
    seed: int = 0,
    run: int = 0,
) -> Timeline:
    """Compute the timeline that `simulate` simulates, by the max-plus recursion.

    An operation that is skipped (warm-up, drain) takes no time, but keeps its place in program
    order and at barriers; data is waited for only where its producer exists.

    Args:
        schedule: a valid schedule.
        costs: seconds, for the same number of stages.
        iterations: iterations of samples that are fed.
        drain: whether to go on until all samples are used everywhere.
        seed: of the draws, where times vary.
        run: which of the seed's runs.

    Raises:
        ScheduleError: if, without draining, an operation needs what would be produced only after
            the end.
        ValueError: if the costs are for another number of stages, their network has buses, or
            workers share cores.

    >>> from ddg_sim.costs import costs
    >>> from ddg_sim.methods import ddg
    >>> evaluate(ddg(2), costs(2, comm=0.5), iterations=2).makespan
    10.0
    """
    check_stages(schedule, costs)
    check_cores(schedule, costs)
    graph = event_graph(schedule, costs.network)
    times = durations(graph, costs, iterations, seed, range(run, run + 1))
    ticks = schedule.num_ticks(iterations, drain)
    starts = np.zeros((len(graph.events), ticks))
    ends = np.zeros((len(graph.events), ticks))
    for index, tick, start, end in recursion(graph, times, iterations, drain):
        starts[index, tick] = start if isinstance(start, float) else start[0, 0]
        ends[index, tick] = end if isinstance(end, float) else end[0, 0]
    happens = takes_place(graph, iterations, drain)
    operations, transfers, channel = [], [], 0
    for index, event in enumerate(graph.events):
        place = happens[index]
        when = slice(place.start, place.stop)
        if event.node is not None:
            operations.append((*event.node, place, starts[index, when], ends[index, when]))
        elif event.message is not None:
            transfers.append((channel, 0, place, starts[index, when], ends[index, when]))
            channel += 1
    return Timeline(schedule, iterations, columns(operations), columns(transfers), not costs.random)


def completions(
    schedule: Schedule, costs: Costs, iterations: int, seed: int = 0, runs: range = range(1)
) -> Array:
    """When every iteration was complete on all workers, for many runs at once.

    Args:
        schedule: a valid schedule.
        costs: seconds, for the same number of stages.
        iterations: iterations of samples that are fed; the run is not drained.
        seed: of the draws.
        runs: which runs.

    Returns:
        Shape (iterations, runs), seconds; of all replicas.

    >>> from ddg_sim.costs import costs
    >>> from ddg_sim.methods import ddg
    >>> completions(ddg(2), costs(2), iterations=4)[:, 0].tolist()
    [4.0, 7.0, 10.0, 13.0]
    """
    check_stages(schedule, costs)
    check_cores(schedule, costs)
    graph = event_graph(schedule, costs.network)
    times = durations(graph, costs, iterations, seed, runs)
    # A worker has completed an iteration when it has ended the last operation of its loop body.
    ends = {Node(worker, len(body) - 1) for worker, body in enumerate(schedule.workers)}
    last = [event.node in ends for event in graph.events]
    found = np.zeros((iterations, len(runs), schedule.replicas))
    for index, tick, _, end in recursion(graph, times, iterations):
        if last[index] and tick < iterations:
            np.maximum(found[tick], end, out=found[tick])
    latest: Array = found.max(axis=2)
    return latest


def recursion(
    graph: EventGraph, times: list[float | Array], iterations: int, drain: bool = True
) -> Iterator[tuple[int, int, float | Array, float | Array]]:
    """Run the max-plus recursion; yields event, iteration, start and end, all runs at once.

    Where replicas meet (an all-reduce), all start when the last has come.

    Args:
        graph: the schedule's events.
        times: per event its duration, as `draws.durations` gives them.
        iterations: iterations of samples that are fed.
        drain: whether to go on until all samples are used everywhere.

    >>> from ddg_sim.methods import bp
    >>> list(recursion(event_graph(bp(1)), [1.0, 2.0, 0.5], iterations=1))
    [(0, 0, 0.0, 1.0), (1, 0, 1.0, 3.0), (2, 0, 3.0, 3.5)]
    """
    happens = takes_place(graph, iterations, drain)
    kept = state_ticks(graph)
    ends: list[list[float | Array]] = [[0.0] * kept for _ in graph.events]
    single = all(isinstance(time, float) for time in times)
    meets = [
        event.template is not None and event.template.kind is OpKind.ALL_REDUCE
        for event in graph.events
    ]
    for index, tick, waits in unroll(graph, iterations, drain):
        before = [ends[source][then % kept] for source, then in waits]
        start = max(before, default=0.0) if single else _latest(before)
        end = start
        if tick in happens[index]:
            if meets[index] and not isinstance(start, float):
                start = np.broadcast_to(start.max(axis=-1, keepdims=True), start.shape)
            time = times[index]
            end = start + (time if isinstance(time, float) else time[tick])
        ends[index][tick % kept] = end
        yield index, tick, start, end


def _latest(times: list[float | Array]) -> float | Array:
    if not times:
        return 0.0
    latest = times[0]
    for time in times[1:]:
        latest = np.maximum(latest, time)
    return latest


@dataclass(frozen=True, slots=True)
class CycleTime:
    """The steady-state period of a schedule, and a cycle that attains it.

    Args:
        schedule: what was analysed.
        period: seconds per iteration: ``seconds / tokens``.
        seconds: sum of the durations on the critical cycle.
        tokens: iterations that the critical cycle spans.
        cycle: its events, in the order in which they wait for one another.
        durations: seconds of each of them.
        host: seconds of the cycle that hosts spend on messages and per operation.
    """

    schedule: Schedule
    period: float
    seconds: float
    tokens: int
    cycle: tuple[Event, ...]
    durations: tuple[float, ...]
    host: float = 0.0

    @property
    def critical_cycle(self) -> tuple[str, ...]:
        """The critical cycle as text, stages counted from 0 as in operations.

        >>> from ddg_sim.costs import costs
        >>> from ddg_sim.methods import bp
        >>> cycle_time(bp(2), costs(2)).critical_cycle
        ('F0', 'activation 0→1', 'F1', 'B1', 'gradient 1→0', 'B0', 'U0')
        """
        return tuple(event.name for event in self.cycle)

    def explain(self) -> str:
        """Say in words what bounds the period, stages counted from 1.

        >>> from ddg_sim.costs import costs
        >>> from ddg_sim.methods import bp, ddg
        >>> from ddg_sim.schedule import Sync
        >>> print(cycle_time(bp(4), costs(4, comm=0.5)).explain())
        the round trip from stage 1 to stage 4 and back bounds you: 15 s per iteration,
        3 s of it in transfers
        >>> print(cycle_time(ddg(4), costs(4, forward=(1, 2, 1, 1))).explain())
        stage 2's own forward + backward bounds you: 4 s per iteration
        >>> print(cycle_time(ddg(4, Sync.BARRIER), costs(4, backward=(2, 2, 3, 2))).explain())
        all forwards, then the slowest backward (stage 3) between barriers bounds you:
        7 s per iteration
        """
        return explain_cycle(self.schedule, self.cycle, self.durations, self.tokens, self.host)


def cycle_time(schedule: Schedule, costs: Costs) -> CycleTime:
    """Compute the exact steady-state period, with mean times, and what bounds it.

    Howard's policy iteration (Cochet-Terrasson, Cohen, Gaubert, McGettrick, Quadrat 1998): every
    event holds on to one of those that it waits for; the cycles that result give a ratio and, at
    that ratio, every event a time; events change their mind while that makes them later. It ends
    with a cycle that no other beats by more than rounding. Where a worker's own loop body is
    critical too, that one is reported: it is the easiest to act on.

    Where times vary, the expected period is at least this one (Jensen's inequality: the recursion
    is convex in the times); `replicate` estimates it.

    Raises:
        ScheduleError: if a cycle never gets going (a deadlock, by a blocking network).
        ValueError: if the costs are for another number of stages, their network has buses, or
            workers share cores.

    >>> from ddg_sim.costs import costs
    >>> from ddg_sim.methods import ddg
    >>> cycle_time(ddg(4), costs(4)).period
    3.0
    """
    check_stages(schedule, costs)
    check_cores(schedule, costs)
    graph = event_graph(schedule, costs.network)
    seconds = np.array([event.seconds(costs) for event in graph.events])
    cycle = critical_cycle(graph, seconds)
    best = _ratio(graph, seconds, cycle)
    for loop in _own_loops(graph):
        if _ratio(graph, seconds, loop) >= best * (1 - ROUNDING):
            cycle = loop
            break
    events = [graph.events[arc.source] for arc in cycle]
    first = min(range(len(cycle)), key=lambda place: _rank(schedule, events[place]))
    order = [arc.source for arc in cycle[first:] + cycle[:first]]
    whole, tokens = math.fsum(seconds[order]), sum(arc.tokens for arc in cycle)
    return CycleTime(
        schedule,
        whole / tokens,
        whole,
        tokens,
        tuple(graph.events[index] for index in order),
        tuple(float(seconds[index]) for index in order),
        math.fsum(graph.events[index].host_seconds(costs) for index in order)
        if any((*costs.overhead, *costs.message))
        else 0.0,
    )


def _rank(schedule: Schedule, event: Event) -> tuple[int, int]:
    """Where to begin the telling of a cycle: at its first stage's first operation."""
    if event.node is None:
        return (schedule.num_stages, 0)
    return (template_at(schedule, event.node).stage, event.node.position)


def _own_loops(graph: EventGraph) -> list[list[Arc]]:
    """Per worker the arcs around its loop body."""
    loops: dict[int, list[Arc]] = defaultdict(list)
    for arc in graph.arcs:
        source, target = graph.events[arc.source].node, graph.events[arc.target].node
        if source is not None and target is not None:
            loops[source.worker].append(arc)
    return list(loops.values())


def _ratio(graph: EventGraph, seconds: Array, cycle: list[Arc]) -> float:
    return math.fsum(seconds[[arc.source for arc in cycle]]) / sum(arc.tokens for arc in cycle)


def critical_cycle(graph: EventGraph, seconds: Array) -> list[Arc]:
    """A cycle with the largest ratio of seconds to tokens, to rounding; see `cycle_time`.

    Args:
        graph: a schedule's events; each event waits for some other.
        seconds: shape (events,), their durations.

    Raises:
        ScheduleError: if a cycle without tokens takes time (a deadlock).

    >>> from ddg_sim.methods import bp
    >>> cycle = critical_cycle(event_graph(bp(1)), np.array([1.0, 2.0, 0.5]))
    >>> sum(arc.tokens for arc in cycle), len(cycle)
    (1, 3)
    """
    source, target, tokens = graph.columns
    first = np.searchsorted(target, np.arange(len(seconds)))  # each event's first arc in
    slack = ROUNDING * max(float(seconds.sum()), np.finfo(float).tiny)
    policy, time = first.copy(), np.zeros(len(seconds))
    for _ in range(MOST_TURNS):
        ratio, time, cycle = _follow(source, tokens, seconds, policy, time)
        # First towards larger ratios; only where there are none, towards later times.
        reached = ratio[source]
        if not _improve(policy, first, target, reached, ratio, slack):
            reached = time[source] + seconds[source] - ratio[target] * tokens
            if not _improve(policy, first, target, reached, time, slack):
                tight = np.flatnonzero(reached >= time[target] - slack)
                cycle = _within_one_iteration(graph, tight) or cycle[::-1]
                break
    else:
        raise RuntimeError(f"no critical cycle within {MOST_TURNS} turns of policy iteration")
    return [Arc(int(source[arc]), int(target[arc]), int(tokens[arc])) for arc in cycle]


def _within_one_iteration(graph: EventGraph, tight: Integers) -> list[int] | None:
    """Of the critical cycles one that spans a single iteration, for it is the easiest to tell.

    On arcs that are ``tight`` the later event starts as soon as the earlier one lets it, so every
    cycle of them is critical.
    """
    source, target, tokens = (column[tight].tolist() for column in graph.columns)
    onward: dict[int, list[int]] = defaultdict(list)
    for place, (event, count) in enumerate(zip(source, tokens, strict=True)):
        if count == 0:
            onward[event].append(place)
    for closing in (place for place, count in enumerate(tokens) if count == 1):
        came: dict[int, int] = {}  # event -> the arc by which it was reached
        queue = deque([target[closing]])
        while queue and source[closing] not in came and target[closing] != source[closing]:
            for place in onward[queue.popleft()]:
                if target[place] not in came and target[place] != target[closing]:
                    came[target[place]] = place
                    queue.append(target[place])
        if source[closing] in came or target[closing] == source[closing]:
            cycle, event = [closing], source[closing]
            while event != target[closing]:
                cycle.append(came[event])
                event = source[came[event]]
            return [int(tight[place]) for place in reversed(cycle)]
    return None


def _improve(
    policy: Integers, first: Integers, target: Integers, reached: Array, now: Array, slack: float
) -> bool:
    """Hold on to the arc that reaches most, where that is more than now; whether any does."""
    best = np.maximum.reduceat(reached, first)
    better = best > now + slack
    if not better.any():
        return False
    attains = np.flatnonzero((reached == best[target]) & better[target])
    policy[target[attains]] = attains
    return True


def _follow(
    source: Integers, tokens: Integers, seconds: Array, policy: Integers, earlier: Array
) -> tuple[Array, Array, list[int]]:
    """Per event the ratio of the cycle that it hangs on, its time then; the best cycle's arcs.

    An event of each cycle keeps its ``earlier`` time. If it began at 0 again, the times of several
    critical cycles could not be compared, and events might change between them for ever
    (Cochet-Terrasson, Cohen, Gaubert, McGettrick, Quadrat 1998).
    """
    before, spans = source[policy].tolist(), tokens[policy].tolist()
    size = len(before)
    ratio, time = [math.nan] * size, earlier.tolist()
    best, best_ratio = [0], -math.inf
    state = [0] * size  # 0 not seen, 1 on the present walk, 2 known
    for start in range(size):
        walk, event = [], start
        while state[event] == 0:
            state[event] = 1
            walk.append(event)
            event = before[event]
        if state[event] == 1:  # a new cycle: the walk from its first visit of this event on
            cycle = walk[walk.index(event) :]
            whole = math.fsum(seconds[before[member]] for member in cycle)
            span = sum(spans[member] for member in cycle)
            if span <= 0:
                raise ScheduleError("deadlock: a cycle of operations waits for itself")
            ratio[event], state[event] = whole / span, 2
            if ratio[event] > best_ratio:
                best, best_ratio = [int(policy[member]) for member in cycle], ratio[event]
        for member in reversed(walk):
            if state[member] == 1:
                source_event = before[member]
                ratio[member] = ratio[source_event]
                time[member] = (
                    time[source_event] + seconds[source_event] - ratio[member] * spans[member]
                )
                state[member] = 2
    return np.array(ratio), np.array(time), best
