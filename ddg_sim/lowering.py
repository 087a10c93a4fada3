"""From a schedule to what a worker executes: operations, sends, receives and barriers.

Every executor (the simulator, torch in one process, torch in many) runs these instructions, so
none of them knows a method. Messages carry the ring slot they use.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, permutations

from ddg_sim.dependencies import (
    Dependency,
    Node,
    Relation,
    barrier_indices,
    dependencies,
    template_at,
    validate,
)
from ddg_sim.eventgraph import event_graph, takes_place
from ddg_sim.rings import ring_slots
from ddg_sim.rule import Activations, Rule
from ddg_sim.schedule import Op, OpKind, OpTemplate, Schedule


@dataclass(frozen=True, slots=True)
class Message:
    """What crosses from one stage to its neighbour: an activation, or the gradient of one."""

    relation: Relation
    source: int
    target: int
    sample: int

    def __str__(self) -> str:
        return f"{self.relation.value} {self.source}→{self.target} ({self.sample})"


@dataclass(frozen=True, slots=True)
class Send:
    """Hand a message to the link; returns at once. ``slot`` is the sender's buffer."""

    message: Message
    slot: int


@dataclass(frozen=True, slots=True)
class Receive:
    """Wait until a message is there. ``slot`` is the receiver's buffer."""

    message: Message
    slot: int


@dataclass(frozen=True, slots=True)
class Barrier:
    """Wait until every worker has come to its barrier with this number."""

    number: int


Instruction = Op | Send | Receive | Barrier


@dataclass(frozen=True, slots=True)
class Channel:
    """A stream of messages from an operation of stage ``source`` to one of stage ``target``."""

    number: int
    dependency: Dependency
    source: int
    target: int

    @property
    def relation(self) -> Relation:
        """Whether activations or gradients flow."""
        return self.dependency.relation


@lru_cache(maxsize=32)  # every worker of a run asks for the same
def channels(schedule: Schedule) -> tuple[Channel, ...]:
    """The message streams of a schedule; each sent message is received by exactly one operation.

    >>> from ddg_sim.methods import ddg
    >>> for channel in channels(ddg(2)):
    ...     print(channel.number, channel.relation.value, channel.source, channel.target)
    0 gradient 1 0
    1 activation 0 1
    """
    validate(schedule)
    messages = [edge for edge in dependencies(schedule) if edge.is_message]
    return tuple(
        Channel(
            number,
            edge,
            template_at(schedule, edge.source).stage,
            template_at(schedule, edge.consumer).stage,
        )
        for number, edge in enumerate(messages)
    )


@lru_cache(maxsize=32)
def slots(schedule: Schedule) -> tuple[int, ...]:
    """Buffers that each message stream needs, in the order of `channels`.

    >>> from ddg_sim.methods import ddg
    >>> slots(ddg(2))
    (2, 2)
    """
    found = ring_slots(schedule)
    return tuple(found[channel.dependency] for channel in channels(schedule))


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a worker's loop body: what is received before it, and sent after it.

    ``barrier`` is the barrier that follows (0 for the first of an iteration), or None.
    """

    template: OpTemplate
    incoming: tuple[Channel, ...]
    outgoing: tuple[Channel, ...]
    barrier: int | None


@lru_cache(maxsize=32)
def bodies(schedule: Schedule) -> tuple[tuple[Place, ...], ...]:
    """Every worker's loop body with its messages and barriers: what all executors walk.

    >>> from ddg_sim.methods import ddg
    >>> for place in bodies(ddg(2))[1]:
    ...     print(place.template, len(place.incoming), len(place.outgoing))
    F1(t) 1 0
    B1(t) 0 1
    U1(t) 0 0
    """
    incoming: dict[Node, list[Channel]] = defaultdict(list)
    outgoing: dict[Node, list[Channel]] = defaultdict(list)
    for channel in channels(schedule):
        incoming[channel.dependency.target].append(channel)
        outgoing[channel.dependency.source].append(channel)

    def place(worker: int, index: int, meetings: tuple[int, ...]) -> Place:
        node = Node(worker, index)
        return Place(
            schedule.workers[worker][index],
            tuple(incoming[node]),
            tuple(outgoing[node]),
            meetings.index(index) if index in meetings else None,
        )

    return tuple(
        tuple(place(worker, index, barrier_indices(schedule, worker)) for index in range(len(body)))
        for worker, body in enumerate(schedule.workers)
    )


def instructions(
    schedule: Schedule, worker: int, iterations: int, drain: bool = True
) -> Iterator[Instruction]:
    """Lower a worker's program, lazily, to operations, sends, receives and barriers.

    Args:
        schedule: a valid schedule.
        worker: index of the worker.
        iterations: iterations of samples that are fed.
        drain: whether to go on until all samples are used everywhere.

    >>> from ddg_sim.methods import ddg
    >>> for instruction in instructions(ddg(2), 1, iterations=1):
    ...     print(type(instruction).__name__, getattr(instruction, "message", instruction))
    Receive activation 0→1 (0)
    Op F1(0)v0@0
    Op B1(0)v0@0
    Send gradient 1→0 (0)
    Op U1(0)v1@0
    """
    return chain.from_iterable(instruction_ticks(schedule, worker, iterations, drain))


def instruction_ticks(
    schedule: Schedule, worker: int, iterations: int, drain: bool = True, start: int = 0
) -> Iterator[tuple[Instruction, ...]]:
    """The instructions of `instructions`, tick by tick from tick ``start`` on.

    >>> from ddg_sim.methods import ddg
    >>> for tick in instruction_ticks(ddg(2), 0, iterations=2, start=2):
    ...     print(*(type(instruction).__name__ for instruction in tick), tick[1])
    Receive Op Op B0(1)v0@2
    """
    body = bodies(schedule)[worker]
    rings = slots(schedule)
    barriers = sum(place.barrier is not None for place in body)
    sent_in = _sent_in(schedule, iterations, drain)
    for iteration, tick in enumerate(schedule.ticks(worker, iterations, drain, start), start):
        found: list[Instruction] = []
        for place, op in zip(body, tick, strict=True):
            for channel in place.incoming:
                sent = iteration - channel.dependency.tokens
                if sent in sent_in[channel.number]:
                    message = message_of(schedule, channel, sent)
                    found.append(Receive(message, sent % rings[channel.number]))
            if op is not None:
                found.append(op)
                for channel in place.outgoing:
                    if iteration in sent_in[channel.number]:
                        message = message_of(schedule, channel, iteration)
                        found.append(Send(message, iteration % rings[channel.number]))
            if place.barrier is not None:
                found.append(Barrier(iteration * barriers + place.barrier))
        yield tuple(found)


def _sent_in(schedule: Schedule, iterations: int, drain: bool) -> list[range]:
    """Per channel, the iterations in which its message is sent."""
    happens = takes_place(event_graph(schedule), iterations, drain)
    return happens[sum(map(len, schedule.workers)) :]  # operations come first, then messages


def in_flight(
    schedule: Schedule, worker: int, tick: int, iterations: int, drain: bool = True
) -> tuple[Message, ...]:
    """Messages to a worker that were sent before ``tick`` and are received in it or later.

    All workers are thought to stand before that tick, as they do for a checkpoint.

    >>> from ddg_sim.methods import ddg
    >>> print(*in_flight(ddg(2), 0, tick=3, iterations=10))
    gradient 1→0 (2)
    """
    sent_in = _sent_in(schedule, iterations, drain)
    return tuple(
        message_of(schedule, channel, sent)
        for place in bodies(schedule)[worker]
        for channel in place.incoming
        for sent in range(max(0, tick - channel.dependency.tokens), tick)
        if sent in sent_in[channel.number]
    )


def message_of(schedule: Schedule, channel: Channel, iteration: int) -> Message:
    """The message that the channel's source sends in ``iteration``.

    >>> from ddg_sim.methods import ddg
    >>> print(message_of(ddg(2), channels(ddg(2))[0], 4))
    gradient 1→0 (4)
    """
    source: Node = channel.dependency.source
    sample = schedule.sample_of(template_at(schedule, source), iteration)
    return Message(channel.relation, channel.source, channel.target, sample)


@dataclass(frozen=True, slots=True)
class StageMemory:
    """The most a stage ever holds at once, in samples and in copies of its weights."""

    activations: int
    weight_versions: int


def stage_memory(ops: Iterable[Op], rule: Rule) -> StageMemory:
    """Peak live activations and weight versions of one stage whose operations run in this order.

    A sample is live from the start of its forward pass to the end of its backward pass; where a
    stage keeps nothing of it in between, or only of the newest, one at a time is. A version is
    live from the update that produces it to the last operation that reads it, and as the newest.

    >>> from ddg_sim.methods import ddg
    >>> stage_memory(ddg(3).program(0, 10), ddg(3).rule)
    StageMemory(activations=3, weight_versions=3)
    """
    ops = list(ops)
    last_read = {op.version: index for index, op in enumerate(ops) if op.kind in _READS}
    keeps = rule.activations in (Activations.GRAPH, Activations.INPUT)
    live: set[int] = set()
    newest, held = 0, 1
    activations = versions = 0
    for index, op in enumerate(ops):
        if op.kind is OpKind.FORWARD:
            if not keeps:
                live.clear()
            live.add(op.sample)
        elif op.kind is OpKind.UPDATE:
            # The one that is overtaken stays only if something still reads it.
            held += last_read.get(newest, -1) >= index
            newest = op.version
        activations = max(activations, len(live))
        versions = max(versions, held)
        if op.kind in (OpKind.BACKWARD, OpKind.BACKWARD_WEIGHT):
            live.discard(op.sample)
        if op.kind in _READS and op.version != newest and last_read[op.version] == index:
            held -= 1
    return StageMemory(activations, versions)


_READS = frozenset(OpKind) - {OpKind.UPDATE, OpKind.ALL_REDUCE}


@lru_cache(maxsize=256)  # a plan asks for every batch
def memory(schedule: Schedule) -> tuple[StageMemory, ...]:
    """Peak live activations and weight versions per stage, in steady state.

    >>> from ddg_sim.methods import bp, ddg
    >>> [(stage.activations, stage.weight_versions) for stage in memory(ddg(3))]
    [(3, 3), (2, 2), (1, 1)]
    >>> [(stage.activations, stage.weight_versions) for stage in memory(bp(2))]
    [(1, 1), (1, 1)]
    """
    programs: list[list[list[Op]]] = [[] for _ in range(schedule.num_stages)]  # stage, worker
    oldest = [0] * schedule.num_stages  # how far back, in iterations, a stage's operations reach
    for template in schedule.templates():
        behind = -(template.sample // schedule.samples_per_iteration) + template.version_lag
        oldest[template.stage] = max(oldest[template.stage], behind)
    for worker, body in enumerate(schedule.workers):
        # What is read was produced a delay ago and is used a delay later: so it is in the middle.
        iterations = 3 * max(oldest[template.stage] for template in body) + 2
        mine: dict[int, list[Op]] = {template.stage: [] for template in body}
        for op in schedule.program(worker, iterations, drain=False):
            mine[op.stage].append(op)
        for stage, ops in mine.items():
            programs[stage].append(ops)
    return tuple(_most(found, schedule.rule) for found in programs)


def _most(programs: list[list[Op]], rule: Rule) -> StageMemory:
    """Peaks of a stage; if it lives on two workers, either may be first in an iteration."""
    found = []
    for order in permutations(programs):
        together = sorted(chain.from_iterable(order), key=lambda op: op.iteration)
        found.append(stage_memory(together, rule))
    return StageMemory(
        max(stage.activations for stage in found), max(stage.weight_versions for stage in found)
    )
