"""What every operation of a schedule waits for, and whether that can ever work.

A schedule's loop bodies and data dependencies form an event graph (marked graph): its nodes are
the operation templates, an edge carries as many tokens as there are iterations between producing
and consuming. Deadlock, memory bounds and the steady-state period are properties of that graph
(Commoner, Holt, Even, Pnueli 1971; Reiter 1968).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from ddg_sim.rule import Activations, Gradient
from ddg_sim.schedule import OpKind, OpTemplate, Schedule, ScheduleError, Sync

BACKWARDS = (OpKind.BACKWARD, OpKind.BACKWARD_INPUT)
_PER_GROUP = (OpKind.UPDATE, OpKind.ALL_REDUCE)


class Relation(Enum):
    """Why one operation waits for another."""

    PROGRAM = "program order"
    LOCAL = "local"  # what the stage itself left behind: activations, gradients of its weights
    ACTIVATION = "activation"
    GRADIENT = "gradient"
    WEIGHTS = "weights"  # of a stage whose forward passes run on another worker than its updates
    CREDIT = "credit"  # the next stage has taken an activation: there is room for another
    BARRIER = "barrier"


DATA = (
    Relation.LOCAL,
    Relation.ACTIVATION,
    Relation.GRADIENT,
    Relation.WEIGHTS,
    Relation.CREDIT,
)


TRAVELS = (Relation.ACTIVATION, Relation.GRADIENT)


class Node(NamedTuple):
    """A template's place: its worker, and its position in that worker's loop body."""

    worker: int
    position: int


@dataclass(frozen=True, slots=True)
class Dependency:
    """In iteration t, ``target`` starts only after ``source`` of iteration ``t - tokens``.

    Between different workers, a data dependency is a message, whose transfer takes time too.
    ``consumer`` is the operation that uses the data; it differs from ``target`` where the
    schedule's synchronisation receives earlier than needed (mailboxes). A data dependency binds
    only where its source exists (is not skipped in warm-up or drain).
    """

    source: Node
    target: Node
    tokens: int
    relation: Relation
    consumer: Node

    @property
    def is_message(self) -> bool:
        """Whether data crosses from one worker to another."""
        return self.relation in DATA and self.source.worker != self.target.worker

    @property
    def travels(self) -> bool:
        """Whether it is a message that takes a link: data between two stages."""
        return self.is_message and self.relation in TRAVELS


def template_at(schedule: Schedule, node: Node) -> OpTemplate:
    """Template at a node.

    >>> from ddg_sim.methods import ddg
    >>> print(template_at(ddg(2), Node(0, 1)))
    B0(t-1)
    """
    return schedule.workers[node.worker][node.position]


def dependencies(schedule: Schedule) -> tuple[Dependency, ...]:
    """All dependencies of a schedule between two operations, with their token counts.

    A barrier is a dependency between all workers: see `barrier_indices`.

    Raises:
        ScheduleError: naming an operation whose input nobody produces.

    >>> from ddg_sim.methods import ddg
    >>> for edge in dependencies(ddg(2)):
    ...     if edge.is_message:
    ...         print(edge.relation.value, *edge.source, "->", *edge.target, edge.tokens)
    gradient 1 1 -> 0 1 1
    activation 0 0 -> 1 0 0
    """
    found = list(_program_order(schedule))
    producers = _producers(schedule)
    for consumer, template in _nodes(schedule):
        for kinds, stage, relation in _needs(schedule, template):
            if template.kind in _PER_GROUP:
                found.extend(_of_group(schedule, producers, consumer, kinds))
            else:
                found.append(_of_sample(schedule, producers, consumer, kinds, stage, relation))
    found.extend(_weights(schedule, producers))
    if schedule.queue:
        found.extend(_credits(schedule, producers))
    return tuple(found)


def barrier_indices(schedule: Schedule, worker: int) -> tuple[int, ...]:
    """Indices of a worker's loop body after which all workers meet; empty without barriers.

    >>> from ddg_sim.methods import ddg
    >>> from ddg_sim.schedule import Sync
    >>> barrier_indices(ddg(2, Sync.BARRIER), 0)
    (0, 2)
    """
    if schedule.sync is not Sync.BARRIER:
        return ()
    body = schedule.workers[worker]
    forwards = [index for index, template in enumerate(body) if template.kind is OpKind.FORWARD]
    last = len(body) - 1
    return (forwards[-1], last) if forwards and forwards[-1] != last else (last,)


def _nodes(schedule: Schedule) -> list[tuple[Node, OpTemplate]]:
    return [
        (Node(worker, index), template)
        for worker, body in enumerate(schedule.workers)
        for index, template in enumerate(body)
    ]


def _program_order(schedule: Schedule) -> Iterator[Dependency]:
    for worker, body in enumerate(schedule.workers):
        for index in range(len(body)):
            source, target = Node(worker, index), Node(worker, (index + 1) % len(body))
            tokens = int(index + 1 == len(body))
            yield Dependency(source, target, tokens, Relation.PROGRAM, target)


def _needs(
    schedule: Schedule, template: OpTemplate
) -> list[tuple[tuple[OpKind, ...], int, Relation]]:
    """What a template consumes: alternative kinds of producer, stage, relation."""
    stage = template.stage
    if template.kind is OpKind.FORWARD:
        return [((OpKind.FORWARD,), stage - 1, Relation.ACTIVATION)] if stage > 0 else []
    if template.kind in BACKWARDS:
        local = ((OpKind.RECOMPUTE, OpKind.FORWARD), stage, Relation.LOCAL)
        if stage == schedule.num_stages - 1 or schedule.rule.gradient is Gradient.LOCAL:
            return [local]
        return [local, (BACKWARDS, stage + 1, Relation.GRADIENT)]
    if template.kind is OpKind.RECOMPUTE:
        return [((OpKind.FORWARD,), stage, Relation.LOCAL)]
    if template.kind is OpKind.BACKWARD_WEIGHT:
        return [((OpKind.BACKWARD_INPUT,), stage, Relation.LOCAL)]
    gradients = ((OpKind.BACKWARD_WEIGHT, OpKind.BACKWARD), stage, Relation.LOCAL)
    reduced = ((OpKind.ALL_REDUCE,), stage, Relation.LOCAL)
    return [gradients, reduced] if template.kind is OpKind.UPDATE else [gradients]


_Producers = dict[tuple[OpKind, int], dict[int, Node]]  # by kind and stage, then by sample mod m


def _producers(schedule: Schedule) -> _Producers:
    table: _Producers = defaultdict(dict)
    for node, template in _nodes(schedule):
        sample = template.sample % schedule.samples_per_iteration
        table[template.kind, template.stage][sample] = node
    return table


def _of_sample(
    schedule: Schedule,
    producers: _Producers,
    consumer: Node,
    kinds: tuple[OpKind, ...],
    stage: int,
    relation: Relation,
) -> Dependency:
    """Edge from the operation that produces what ``consumer`` needs of its sample.

    Of several kinds of producer the first one that has the sample counts.
    """
    m, template = schedule.samples_per_iteration, template_at(schedule, consumer)
    for kind in kinds:
        source = producers.get((kind, stage), {}).get(template.sample % m)
        if source is not None:
            tokens = (template_at(schedule, source).sample - template.sample) // m
            # A mailbox is emptied by a blocking receive before the iteration's first operation.
            early = schedule.sync is Sync.MAILBOX and source.worker != consumer.worker
            target = Node(consumer.worker, 0) if early else consumer
            return Dependency(source, target, tokens, relation, consumer)
    wanted = " or ".join(f"{kind.value}{stage}" for kind in kinds)
    raise ScheduleError(f"{_where(schedule, consumer)}: no {wanted} produces its input")


def _of_group(
    schedule: Schedule, producers: _Producers, consumer: Node, kinds: tuple[OpKind, ...]
) -> list[Dependency]:
    """Edges from all gradients of the group of samples that ``consumer`` closes."""
    m, template = schedule.samples_per_iteration, template_at(schedule, consumer)
    sources = [
        node for kind in kinds for node in producers.get((kind, template.stage), {}).values()
    ]
    if not sources and OpKind.ALL_REDUCE not in kinds:
        wanted = " or ".join(f"{kind.value}{template.stage}" for kind in kinds)
        raise ScheduleError(f"{_where(schedule, consumer)}: no {wanted} produces its input")
    return [
        Dependency(
            source,
            consumer,
            -((template.sample - template_at(schedule, source).sample) // m),
            Relation.LOCAL,
            consumer,
        )
        for source in sources
    ]


def _weights(schedule: Schedule, producers: _Producers) -> Iterator[Dependency]:
    """Where forward passes run on a worker of their own: from the update they read, to the first.

    In iteration t they read what iterations before t have produced.
    """
    for stage in range(schedule.num_stages):
        updates = producers.get((OpKind.UPDATE, stage), {})
        forwards = producers.get((OpKind.FORWARD, stage), {})
        for source in updates.values():
            first = min(forwards.values(), default=source)
            if first.worker != source.worker:
                lags = (template_at(schedule, node).version_lag for node in forwards.values())
                yield Dependency(source, first, 1 + min(lags), Relation.WEIGHTS, first)


def _credits(schedule: Schedule, producers: _Producers) -> Iterator[Dependency]:
    """A stage may start a sample once the next stage has taken the one ``queue`` before it."""
    m = schedule.samples_per_iteration
    for stage in range(schedule.num_stages - 1):
        takes = producers.get((OpKind.FORWARD, stage + 1), {})
        for target in producers.get((OpKind.FORWARD, stage), {}).values():
            sample = template_at(schedule, target).sample - schedule.queue
            source = takes[sample % m]
            if source.worker != target.worker:
                tokens = (template_at(schedule, source).sample - sample) // m
                yield Dependency(source, target, tokens, Relation.CREDIT, target)


def _where(schedule: Schedule, node: Node) -> str:
    text = template_at(schedule, node).text(schedule.samples_per_iteration)
    return f"worker {node.worker}, operation {node.position} ({text})"


# --- Checks -------------------------------------------------------------------------------------


def validate(schedule: Schedule) -> None:
    """Check that a schedule can run: complete, free of deadlock, in bounded memory.

    Raises:
        ScheduleError: naming the offending operation.

    >>> from ddg_sim.notation import parse
    >>> validate(parse('''x stages=1 sync=none activations=graph jacobian=stashed samples=1
    ... worker 0: B0(t) F0(t) U0(t)'''))
    Traceback (most recent call last):
    ...
    ddg_sim.schedule.ScheduleError: deadlock: worker 0, operation 0 (B0(t)) waits for worker 0, ...
    """
    _check_cells(schedule)
    edges = dependencies(schedule)
    arcs = _arcs(schedule, edges)
    _check_deadlock(schedule, arcs)
    _check_bounded(schedule, edges, arcs)


def _check_cells(schedule: Schedule) -> None:
    m = schedule.samples_per_iteration
    if schedule.num_stages < 1 or not schedule.workers:
        raise ScheduleError("a schedule needs at least one stage and one worker")
    for worker, body in enumerate(schedule.workers):
        if not body:
            raise ScheduleError(
                f"worker {worker} has no operations: leave it out (a device on which nothing runs"
                " belongs to the cluster, not to the schedule)"
            )
    least = {"samples_per_iteration": (m, 1), "replicas": (schedule.replicas, 1)}
    for name, (value, bound) in {**least, "queue": (schedule.queue, 0)}.items():
        if value < bound:
            raise ScheduleError(f"{name} must be at least {bound}, got {value}")
    home: dict[tuple[int, bool], int] = {}  # (stage, whether forward) -> worker
    seen: dict[tuple[OpKind, int, int], Node] = {}
    for node, template in _nodes(schedule):
        where = _where(schedule, node)
        if not 0 <= template.stage < schedule.num_stages:
            raise ScheduleError(f"{where}: stage must be in 0..{schedule.num_stages - 1}")
        if template.version_lag < 0:
            raise ScheduleError(f"{where}: no version is newer than the newest")
        if template.kind in _PER_GROUP and template.sample % m != m - 1:
            noun = "an update" if template.kind is OpKind.UPDATE else "an all-reduce"
            raise ScheduleError(f"{where}: {noun} must close a group of {m} samples")
        if template.sample >= m:
            raise ScheduleError(f"{where}: its sample has not entered yet (offset must be < {m})")
        part = (template.stage, template.kind is OpKind.FORWARD)
        if home.setdefault(part, node.worker) != node.worker:
            raise ScheduleError(f"{where}: stage already lives on worker {home[part]}")
        key = (template.kind, template.stage, template.sample % m)
        if key in seen:
            raise ScheduleError(f"{where}: repeats {_where(schedule, seen[key])}")
        seen[key] = node
    counts = Counter((stage, kind) for kind, stage, _ in seen)
    for stage in range(schedule.num_stages):
        found = {kind: counts[stage, kind] for kind in OpKind}
        stored = schedule.rule.activations is Activations.INPUT
        needed = {
            OpKind.FORWARD: m,
            OpKind.BACKWARD: m - found[OpKind.BACKWARD_INPUT],
            OpKind.BACKWARD_WEIGHT: found[OpKind.BACKWARD_INPUT],
            OpKind.RECOMPUTE: m if stored else found[OpKind.RECOMPUTE],
            OpKind.ALL_REDUCE: 1 if schedule.replicas > 1 else found[OpKind.ALL_REDUCE],
            OpKind.UPDATE: 1,
        }
        for kind, count in needed.items():
            if found[kind] != count:
                raise ScheduleError(
                    f"stage {stage}: has {found[kind]} {kind.value} operations per iteration,"
                    f" needs {count}"
                )
        for sample in range(m if found[OpKind.BACKWARD_INPUT] else 0):
            whole = (OpKind.BACKWARD, stage, sample) in seen
            for half in (OpKind.BACKWARD_INPUT, OpKind.BACKWARD_WEIGHT):
                if ((half, stage, sample) in seen) is whole:
                    text = OpTemplate(half, stage, sample).text(m)
                    reason = "repeats a whole backward pass" if whole else "is missing"
                    raise ScheduleError(f"stage {stage}: {text} {reason}")


class _Arc(NamedTuple):
    """A dependency between two nodes by number; barriers are nodes of their own, after all."""

    source: int
    target: int
    tokens: int
    edge: Dependency | None = None


def _arcs(schedule: Schedule, edges: tuple[Dependency, ...]) -> list[_Arc]:
    index = {node: number for number, (node, _) in enumerate(_nodes(schedule))}
    arcs = [_Arc(index[edge.source], index[edge.target], edge.tokens, edge) for edge in edges]
    meetings = [barrier_indices(schedule, worker) for worker in range(len(schedule.workers))]
    if len({len(indices) for indices in meetings}) > 1:
        raise ScheduleError("sync 'barrier' needs the same number of barriers on every worker")
    for number, group in enumerate(zip(*meetings, strict=True), start=len(index)):
        for worker, position in enumerate(group):
            length = len(schedule.workers[worker])
            after = index[Node(worker, (position + 1) % length)]
            arcs.append(_Arc(index[Node(worker, position)], number, 0))
            arcs.append(_Arc(number, after, int(position + 1 == length)))
    return arcs


def _check_deadlock(schedule: Schedule, arcs: list[_Arc]) -> None:
    """A cycle without a token is a set of operations that wait for one another for ever.

    Shifting operations by whole iterations makes all tokens non-negative (a retiming), unless a
    cycle has a negative sum; then a cycle without a token is one of arcs without tokens.
    """
    shift: dict[int, int] = defaultdict(int)
    because: dict[int, _Arc] = {}
    changed: int | None = None
    for _ in range(2 + max(max(arc.source, arc.target) for arc in arcs)):
        changed = None
        for arc in arcs:
            reached = shift[arc.source] + arc.tokens
            if reached < shift[arc.target]:
                shift[arc.target], because[arc.target] = reached, arc
                changed = arc.target
        if changed is None:
            break
    if changed is not None:
        for _ in arcs:  # walk back into the cycle itself
            changed = because[changed].source
        cycle = [because[changed]]
        while cycle[-1].source != changed:
            cycle.append(because[cycle[-1].source])
        _raise_deadlock(schedule, cycle)
    tight = {
        (arc.source, arc.target): arc
        for arc in arcs
        if shift[arc.source] + arc.tokens == shift[arc.target]
    }
    order: TopologicalSorter[int] = TopologicalSorter()
    for source, target in tight:
        order.add(target, source)
    try:
        order.prepare()
    except CycleError as error:
        nodes = error.args[1]
        ends = zip(nodes, nodes[1:], strict=False)
        _raise_deadlock(schedule, [tight[end] for end in ends])


def _raise_deadlock(schedule: Schedule, cycle: list[_Arc]) -> None:
    edges = [arc.edge for arc in cycle if arc.edge is not None]
    # Data says more than program order.
    edge = next((edge for edge in edges if edge.relation in DATA), edges[0])
    raise ScheduleError(
        f"deadlock: {_where(schedule, edge.target)} waits for {_where(schedule, edge.source)}"
        f" ({edge.relation.value}), which waits for it in turn"
    )


def _check_bounded(schedule: Schedule, edges: tuple[Dependency, ...], arcs: list[_Arc]) -> None:
    """Tokens on an edge are bounded exactly if it lies on a cycle (Commoner et al. 1971)."""
    size = 1 + max(max(arc.source, arc.target) for arc in arcs)
    ends = ([arc.source for arc in arcs], [arc.target for arc in arcs])
    graph = csr_array((np.ones(len(arcs)), ends), shape=(size, size))
    _, component = connected_components(graph, directed=True, connection="strong")
    for edge, arc in zip(edges, arcs, strict=False):  # the arcs of the edges come first
        if component[arc.source] != component[arc.target]:
            raise ScheduleError(
                f"unbounded memory: {_where(schedule, edge.source)} may run ahead of"
                f" {_where(schedule, edge.target)} without limit"
            )
