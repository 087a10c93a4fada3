"""Exact times of a deterministic schedule from its event graph, without simulating.

`evaluate` runs the max-plus recursion, `cycle_time` computes its eigenvalue, the steady-state
period: the largest ratio, over all cycles, of the cycle's seconds to its tokens (Reiter 1968). A
cycle that attains it is critical: nothing but speeding up one of its members shortens the period.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from fractions import Fraction

from ddg_sim.costs import Costs
from ddg_sim.dependencies import Node, template_at
from ddg_sim.eventgraph import Arc, Event, EventGraph, event_graph, existence, unroll
from ddg_sim.explain import explain_cycle
from ddg_sim.lowering import Message
from ddg_sim.schedule import Schedule
from ddg_sim.timeline import Span, Timeline, message_span, op_span, worker_lane


def evaluate(schedule: Schedule, costs: Costs, iterations: int, drain: bool = True) -> Timeline:
    """Compute the timeline that `simulate` simulates, by the max-plus recursion.

    An operation that is skipped (warm-up, drain) takes no time, but keeps its place in program
    order and at barriers; data is waited for only where its producer exists.

    Args:
        schedule: a valid schedule.
        costs: seconds, for the same number of stages.
        iterations: iterations of samples that are fed.
        drain: whether to go on until all samples are used everywhere.

    Raises:
        ScheduleError: if, without draining, an operation needs what would be produced only after
            the end.
        ValueError: if the costs are for another number of stages.

    >>> from ddg_sim.costs import costs
    >>> from ddg_sim.methods import ddg
    >>> evaluate(ddg(2), costs(2, comm=0.5), iterations=2).makespan
    10.0
    """
    graph = event_graph(schedule, costs)
    ticks = schedule.num_ticks(iterations, drain)
    takes_place = existence(graph, iterations)
    if not drain:  # what nobody will receive is not sent
        for index, event in enumerate(graph.events):
            late = max(0, event.message.tokens) if event.message is not None else 0
            takes_place[index] = range(takes_place[index].start, ticks - late)
    starts = [[0.0] * ticks for _ in graph.events]
    ends = [[0.0] * ticks for _ in graph.events]
    for index, tick, waits in unroll(graph, iterations, drain):
        start = max([ends[source][then] for source, then in waits], default=0.0)
        starts[index][tick] = start
        ends[index][tick] = start + (
            graph.events[index].duration if tick in takes_place[index] else 0.0
        )
    at = {event.node: index for index, event in enumerate(graph.events) if event.node is not None}
    spans: list[Span] = []
    for worker in range(len(schedule.workers)):
        lane = worker_lane(schedule, worker)
        places = [at[Node(worker, position)] for position in range(len(schedule.workers[worker]))]
        for tick, ops in enumerate(schedule.ticks(worker, iterations, drain)):
            for index, op in zip(places, ops, strict=True):
                if op is not None:
                    spans.append(op_span(lane, op, starts[index][tick], ends[index][tick]))
    for index, event in enumerate(graph.events):
        if event.message is not None and event.duration > 0:
            for tick in takes_place[index]:
                message = _message(schedule, event, tick)
                spans.append(message_span(message, starts[index][tick], ends[index][tick]))
    return Timeline(schedule, iterations, tuple(spans), deterministic=True)


def _message(schedule: Schedule, event: Event, tick: int) -> Message:
    assert event.message is not None
    source = template_at(schedule, event.message.source)
    target = template_at(schedule, event.message.consumer)
    sample = schedule.sample_of(source, tick)
    return Message(event.message.relation, source.stage, target.stage, sample)


@dataclass(frozen=True, slots=True)
class CycleTime:
    """The steady-state period of a schedule, and a cycle that attains it.

    Args:
        schedule: what was analysed.
        period: seconds per iteration: ``seconds / tokens``.
        seconds: sum of the durations on the critical cycle.
        tokens: iterations that the critical cycle spans.
        cycle: its events, in the order in which they wait for one another.
    """

    schedule: Schedule
    period: float
    seconds: float
    tokens: int
    cycle: tuple[Event, ...]

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
        return explain_cycle(self.schedule, self.cycle, self.seconds, self.tokens)


def cycle_time(schedule: Schedule, costs: Costs) -> CycleTime:
    """Compute the exact steady-state period and what bounds it.

    Newton's iteration on the ratio (Dinkelbach 1967): as long as some cycle beats the best ratio so
    far, take that cycle's. Bellman and Ford's algorithm finds the cycles, in integer arithmetic, so
    that no tolerance is needed and the cycle it ends with is critical. If a worker's own loop body
    is critical too, that one is reported: it is the easiest to act on.

    Raises:
        ValueError: if the costs are for another number of stages.

    >>> from ddg_sim.costs import costs
    >>> from ddg_sim.methods import ddg
    >>> cycle_time(ddg(4), costs(4)).period
    3.0
    """
    graph = event_graph(schedule, costs)
    weights = [Fraction(event.duration) for event in graph.events]
    cycle = max(_own_loops(graph), key=lambda loop: _ratio(weights, loop))
    while better := _better_cycle(graph, weights, cycle):
        cycle = better
    ratio = _ratio(weights, cycle)
    seconds = sum((weights[arc.source] for arc in cycle), Fraction(0))
    tokens = sum(arc.tokens for arc in cycle)
    events = [graph.events[arc.source] for arc in cycle]
    first = min(range(len(events)), key=lambda place: _rank(schedule, events[place]))
    ordered = tuple(events[first:] + events[:first])
    return CycleTime(schedule, float(ratio), float(seconds), tokens, ordered)


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


def _ratio(weights: list[Fraction], cycle: list[Arc]) -> Fraction:
    seconds = sum((weights[arc.source] for arc in cycle), Fraction(0))
    return seconds / sum(arc.tokens for arc in cycle)


def _better_cycle(graph: EventGraph, weights: list[Fraction], cycle: list[Arc]) -> list[Arc] | None:
    """A cycle with a larger ratio of seconds to tokens, or None if there is none.

    An arc counts its source's seconds minus the ratio for each token; a cycle with a positive sum
    is better. Longest paths that never settle run into such a cycle.
    """
    ratio = _ratio(weights, cycle)
    scale = math.lcm(ratio.denominator, *(weight.denominator for weight in weights))
    each = int(ratio * scale)
    lengths = [
        (arc, arc.source, arc.target, int(weights[arc.source] * scale) - each * arc.tokens)
        for arc in graph.arcs
    ]
    longest = [0] * len(graph.events)
    because: dict[int, Arc] = {}
    while True:
        settled = True
        for arc, source, target, length in lengths:
            reached = longest[source] + length
            if reached > longest[target]:
                longest[target] = reached
                because[target] = arc
                settled = False
        if settled:
            return None
        found = _cycles(because)
        if found:
            return max(found, key=lambda cycle: _ratio(weights, cycle))


def _cycles(because: dict[int, Arc]) -> list[list[Arc]]:
    """All cycles of a graph in which no event has more than one arc in."""
    cycles = []
    visited: dict[int, int] = {}
    for walk, start in enumerate(because):
        event = start
        while event in because and event not in visited:
            visited[event] = walk
            event = because[event].source
        if visited.get(event) == walk and event in because:
            cycle = [because[event]]
            while cycle[-1].source != event:
                cycle.append(because[cycle[-1].source])
            cycles.append(cycle[::-1])
    return cycles
