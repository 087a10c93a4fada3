"""A schedule with costs as an event graph: what happens once per iteration, and what waits for it.

Events are operations, transfers and barriers; an arc carries as many tokens as there are
iterations between its ends (a timed event graph, or timed marked graph: Baccelli, Cohen, Olsder,
Quadrat, "Synchronization and Linearity", 1992). Barriers are events of their own, so that a graph
of K workers has O(K) arcs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from graphlib import CycleError, TopologicalSorter

import numpy as np
import numpy.typing as npt

from ddg_sim.costs import Costs
from ddg_sim.dependencies import (
    Dependency,
    Node,
    Relation,
    barrier_indices,
    dependencies,
    template_at,
)
from ddg_sim.network import FREE, Network
from ddg_sim.schedule import OpTemplate, Schedule, ScheduleError
from ddg_sim.times import mean

Integers = npt.NDArray[np.int_]


@dataclass(frozen=True, slots=True)
class Event:
    """An operation (at ``node``), the transfer of a ``message``, or else a barrier.

    ``sample`` is the sample offset of the operation, or of the one whose output is transferred:
    the event exists only where that sample exists. ``template`` and ``messages`` are the operation,
    and how many messages it sends and receives. ``ends`` are the stages that a message connects.
    """

    name: str
    node: Node | None = None
    message: Dependency | None = None
    sample: int | None = None
    template: OpTemplate | None = None
    messages: int = 0
    ends: tuple[int, int] = (-1, -1)

    def seconds(self, costs: Costs) -> float:
        """Mean duration with these costs, in seconds.

        >>> from ddg_sim.costs import costs
        >>> from ddg_sim.methods import bp
        >>> event_graph(bp(1)).events[1].seconds(costs(1, backward=3.0))
        3.0
        """
        if self.template is not None:
            return costs.duration(self.template.kind, self.template.stage, self.messages)
        if self.message is not None:
            return mean(costs.transfer(self.message.relation, *self.ends))
        return mean(costs.barrier)

    def host_seconds(self, costs: Costs) -> float:
        """Mean seconds of it that the host spends on messages and per operation.

        >>> from ddg_sim.costs import costs
        >>> from ddg_sim.methods import ddg
        >>> event_graph(ddg(2)).events[0].host_seconds(costs(2, overhead=0.5, message=0.25))
        0.75
        """
        if self.template is None:
            return 0.0
        free = replace(costs, overhead=(), message=())
        stage, kind = self.template.stage, self.template.kind
        return self.seconds(costs) - free.duration(kind, stage)


@dataclass(frozen=True, slots=True)
class Arc:
    """Event ``target`` of iteration t starts only after ``source`` of iteration t - tokens.

    An arc with ``data`` binds only where its source exists.
    """

    source: int
    target: int
    tokens: int
    data: bool = False


@dataclass(frozen=True, eq=False)
class EventGraph:
    """The events of a schedule and its arcs; arcs refer to events by index."""

    schedule: Schedule
    events: tuple[Event, ...]
    arcs: tuple[Arc, ...]

    @cached_property
    def columns(self) -> tuple[Integers, Integers, Integers]:
        """Source, target and tokens of the arcs, sorted by target."""
        table = np.array([(arc.source, arc.target, arc.tokens) for arc in self.arcs], dtype=int)
        table = table[np.argsort(table[:, 1], kind="stable")]
        return table[:, 0], table[:, 1], table[:, 2]


@lru_cache(maxsize=256)  # many costs are tried on few schedules
def event_graph(schedule: Schedule, network: Network = FREE) -> EventGraph:
    """Build the event graph of a valid schedule.

    Transfers on one directed link (source worker, target worker) follow one another in the order
    in which the source's loop body produces them. Dependencies inside a worker need no arcs:
    program order implies them.

    Raises:
        ValueError: for a network with buses, on which the order of transfers depends on times.

    >>> from ddg_sim.methods import ddg
    >>> [event.name for event in event_graph(ddg(2)).events]
    ['F0', 'B0', 'U0', 'F1', 'B1', 'U1', 'gradient 1→0', 'activation 0→1']
    """
    if network.buses:
        raise ValueError(
            "network has buses, on which the order of transfers depends on times: this schedule"
            " can be simulated (engine 'des'), but not evaluated"
        )
    edges = dependencies(schedule)
    messages: dict[Node, int] = defaultdict(int)
    for edge in edges:
        if edge.travels:
            messages[edge.source] += 1
            messages[edge.consumer] += 1
    events: list[Event] = []
    arcs: list[Arc] = []
    index: dict[Node, int] = {}
    for worker, body in enumerate(schedule.workers):
        for position, template in enumerate(body):
            node = Node(worker, position)
            index[node] = len(events)
            name = f"{template.kind.value}{template.stage}"
            events.append(
                Event(
                    name,
                    node=node,
                    sample=template.sample,
                    template=template,
                    messages=messages[node],
                )
            )
    links: dict[tuple[int, int], list[int]] = defaultdict(list)
    for edge in edges:
        if edge.relation is Relation.PROGRAM:
            arcs.append(Arc(index[edge.source], index[edge.target], edge.tokens))
        elif edge.is_message:
            transfer = len(events)
            events.append(_transfer(schedule, edge))
            arcs.append(Arc(index[edge.source], transfer, 0))
            arcs.append(Arc(transfer, index[edge.target], edge.tokens, data=True))
            if edge.travels:
                links[edge.source.worker, edge.target.worker].append(transfer)
    for transfers in links.values():
        transfers.sort(key=lambda transfer: _message(events[transfer]).source.position)
        arcs.extend(_link_order(transfers))
    barriers = _add_barriers(schedule, index, events, arcs)
    if network.blocking:
        for transfers in links.values():
            arcs.extend(_blocking(schedule, events, index, barriers, transfers))
    return EventGraph(schedule, tuple(events), tuple(arcs))


def check_stages(schedule: Schedule, costs: Costs) -> None:
    """Check that costs and schedule speak of the same number of stages.

    Raises:
        ValueError: naming both numbers.

    >>> from ddg_sim.costs import costs
    >>> from ddg_sim.methods import ddg
    >>> check_stages(ddg(2), costs(3))
    Traceback (most recent call last):
    ...
    ValueError: costs are for 3 stages, but schedule 'ddg' has 2: give costs for 2 stages
    """
    if costs.num_stages != schedule.num_stages:
        raise ValueError(
            f"costs are for {costs.num_stages} stages, but schedule {schedule.method!r} has"
            f" {schedule.num_stages}: give costs for {schedule.num_stages} stages"
        )


def shares_cores(schedule: Schedule, costs: Costs) -> bool:
    """Whether there are fewer cores than workers, so that these take turns.

    >>> from ddg_sim.costs import costs
    >>> from ddg_sim.methods import ddg
    >>> [shares_cores(ddg(3), costs(3, cores=cores)) for cores in (None, 3, 2)]
    [False, False, True]
    """
    return costs.cores is not None and costs.cores < len(schedule.workers) * schedule.replicas


def only_simulated(schedule: Schedule, costs: Costs) -> bool:
    """Whether what happens first depends on times: where links share a bus, or workers cores.

    Then `cycletime` cannot evaluate it, and `simulate` can.
    """
    return bool(costs.network.buses) or shares_cores(schedule, costs)


def check_cores(schedule: Schedule, costs: Costs) -> None:
    """Refuse costs under which workers share cores.

    Raises:
        ValueError: saying what to do.

    >>> from ddg_sim.costs import costs
    >>> from ddg_sim.methods import ddg
    >>> check_cores(ddg(3), costs(3, cores=2))
    Traceback (most recent call last):
    ...
    ValueError: cores is 2 for 3 workers, who then take turns: this can be simulated (engine 'des'), but not evaluated
    """  # noqa: E501
    if shares_cores(schedule, costs):
        workers = len(schedule.workers) * schedule.replicas
        raise ValueError(
            f"cores is {costs.cores} for {workers} workers, who then take turns: this can be"
            " simulated (engine 'des'), but not evaluated"
        )


def _transfer(schedule: Schedule, edge: Dependency) -> Event:
    source = template_at(schedule, edge.source)
    target = template_at(schedule, edge.consumer)
    name = f"{edge.relation.value} {source.stage}→{target.stage}"
    return Event(name, message=edge, sample=source.sample, ends=(source.stage, target.stage))


def _message(event: Event) -> Dependency:
    assert event.message is not None
    return event.message


def _link_order(ordered: list[int]) -> list[Arc]:
    """One transfer at a time, in the order of production, which repeats every iteration."""
    return [
        Arc(before, ordered[(place + 1) % len(ordered)], int(place + 1 == len(ordered)))
        for place, before in enumerate(ordered)
    ]


def _blocking(
    schedule: Schedule,
    events: list[Event],
    index: dict[Node, int],
    barriers: dict[Node, int],
    transfers: list[int],
) -> list[Arc]:
    """The sender goes on when its message has arrived."""
    arcs = []
    for transfer in transfers:
        worker, position = source = _message(events[transfer]).source
        length = len(schedule.workers[worker])
        if source in barriers:
            arcs.append(Arc(transfer, barriers[source], 0, data=True))
        else:
            after = index[Node(worker, (position + 1) % length)]
            arcs.append(Arc(transfer, after, int(position + 1 == length), data=True))
    return arcs


def _add_barriers(
    schedule: Schedule, index: dict[Node, int], events: list[Event], arcs: list[Arc]
) -> dict[Node, int]:
    """Add barriers; returns the barrier that follows each operation that one follows."""
    found: dict[Node, int] = {}
    meetings = [barrier_indices(schedule, worker) for worker in range(len(schedule.workers))]
    for group in zip(*meetings, strict=True):
        barrier = len(events)
        events.append(Event(f"barrier {len(set(found.values())) + 1}"))
        for worker, position in enumerate(group):
            length = len(schedule.workers[worker])
            after = index[Node(worker, (position + 1) % length)]
            found[Node(worker, position)] = barrier
            arcs.append(Arc(index[Node(worker, position)], barrier, 0))
            arcs.append(Arc(barrier, after, int(position + 1 == length)))
    return found


def retiming(graph: EventGraph) -> tuple[int, ...]:
    """Per event the round r <= 0 relative to its iteration in which it can be computed.

    With these, event e of iteration t needs only events of round t + r[e] or earlier, although
    single arcs may carry negative tokens (Leiserson and Saxe 1991).

    Raises:
        ScheduleError: if a cycle carries too few tokens (a deadlock).

    >>> from ddg_sim.methods import ddg
    >>> set(retiming(event_graph(ddg(3))))
    {0}
    """
    rounds = [0] * len(graph.events)
    for _ in range(len(graph.events) + 1):
        changed = False
        for arc in graph.arcs:
            reached = rounds[arc.target] + arc.tokens
            if reached < rounds[arc.source]:
                rounds[arc.source] = reached
                changed = True
        if not changed:
            return tuple(rounds)
    raise ScheduleError("deadlock: a cycle of operations carries fewer than no tokens")


def existence(graph: EventGraph, iterations: int) -> list[range]:
    """Per event the iterations in which its sample exists; a barrier is in every one of the run.

    >>> from ddg_sim.methods import ddg
    >>> existence(event_graph(ddg(2)), iterations=5)[:2]
    [range(0, 5), range(1, 6)]
    """
    m = graph.schedule.samples_per_iteration
    every = range(graph.schedule.num_ticks(iterations))
    lags = [None if event.sample is None else -(event.sample // m) for event in graph.events]
    return [every if lag is None else range(lag, iterations + lag) for lag in lags]


def takes_place(graph: EventGraph, iterations: int, drain: bool = True) -> list[range]:
    """Per event the iterations in which it happens; what nobody will receive is not sent.

    A message sent in iteration t is received in iteration t + tokens, if the run gets that far.

    >>> from ddg_sim.methods import ddg
    >>> takes_place(event_graph(ddg(2)), iterations=5, drain=False)[:2]
    [range(0, 5), range(1, 5)]
    """
    ticks = graph.schedule.num_ticks(iterations, drain)
    found = []
    for event, exists in zip(graph.events, existence(graph, iterations), strict=True):
        late = max(0, event.message.tokens) if event.message is not None else 0
        found.append(range(exists.start, max(exists.start, min(exists.stop, ticks - late))))
    return found


def unroll(
    graph: EventGraph, iterations: int, drain: bool = True
) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Walk a run: event, iteration, and the (event, iteration) pairs that it waits for.

    Whatever an event waits for comes before it. Data is waited for only where it exists; program
    order and barriers bind always.

    Raises:
        ScheduleError: if, without draining, something waits for what comes after the end.

    >>> from ddg_sim.methods import ddg
    >>> for event, tick, waits in unroll(event_graph(ddg(1)), iterations=2):
    ...     print(event, tick, waits)
    0 0 []
    1 0 [(0, 0)]
    2 0 [(1, 0)]
    0 1 [(2, 0)]
    1 1 [(0, 1)]
    2 1 [(1, 1)]
    """
    ticks = graph.schedule.num_ticks(iterations, drain)
    exists = existence(graph, iterations)
    rounds = retiming(graph)
    order: TopologicalSorter[int] = TopologicalSorter()
    before: dict[int, list[tuple[int, int, range]]] = defaultdict(list)
    for arc in graph.arcs:
        binds = exists[arc.source] if arc.data else range(ticks)
        before[arc.target].append((arc.source, arc.tokens, binds))
        order.add(arc.target)
        if arc.tokens + rounds[arc.target] == rounds[arc.source]:
            order.add(arc.target, arc.source)
    try:
        plan = [(event, rounds[event], before[event]) for event in order.static_order()]
    except CycleError as error:
        names = " waits for ".join(graph.events[event].name for event in reversed(error.args[1]))
        raise ScheduleError(f"deadlock: {names}, all in the same iteration") from None
    for now in range(min(rounds), ticks + max(rounds)):
        for event, ahead, waits in plan:
            tick = now - ahead
            if not 0 <= tick < ticks:
                continue
            found = [
                (source, tick - tokens) for source, tokens, binds in waits if tick - tokens in binds
            ]
            late = [(source, then) for source, then in found if then >= ticks]
            if late:
                raise ScheduleError(
                    f"deadlock: without draining, {graph.events[event].name} of iteration {tick}"
                    f" waits for {graph.events[late[0][0]].name} of iteration {late[0][1]},"
                    " after the end"
                )
            yield event, tick, found


def state_ticks(graph: EventGraph) -> int:
    """Consecutive iterations whose start times determine all that follow.

    >>> from ddg_sim.methods import ddg
    >>> state_ticks(event_graph(ddg(3)))
    2
    """
    rounds = retiming(graph)
    most = max(arc.tokens + rounds[arc.target] - rounds[arc.source] for arc in graph.arcs)
    return most + 1 + max(rounds) - min(rounds)
