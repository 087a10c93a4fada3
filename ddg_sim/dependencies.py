"""What every operation of a schedule waits for, and whether that can ever work.

A schedule's loop bodies and data dependencies form an event graph (marked graph): its nodes are
the operation templates, an edge carries as many tokens as there are iterations between producing
and consuming. Deadlock, memory bounds and the steady-state period are properties of that graph
(Commoner, Holt, Even, Pnueli 1971; Reiter 1968).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import johnson

from ddg_sim.schedule import Activations, OpKind, OpTemplate, Schedule, ScheduleError, Sync

BACKWARDS = (OpKind.BACKWARD, OpKind.BACKWARD_INPUT)


class Relation(Enum):
    """Why one operation waits for another."""

    PROGRAM = "program order"
    LOCAL = "data on the same worker"
    ACTIVATION = "activation"
    GRADIENT = "gradient"
    BARRIER = "barrier"


DATA = (Relation.LOCAL, Relation.ACTIVATION, Relation.GRADIENT)


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


def template_at(schedule: Schedule, node: Node) -> OpTemplate:
    """Template at a node.

    >>> from ddg_sim.methods import ddg
    >>> print(template_at(ddg(2), Node(0, 1)))
    B0(t-1)
    """
    return schedule.workers[node.worker][node.position]


def dependencies(schedule: Schedule) -> tuple[Dependency, ...]:
    """All dependencies of a schedule, with their token counts.

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
        for kinds, stage, relation in _needs(template, schedule.num_stages):
            found.extend(_data(schedule, producers, consumer, kinds, stage, relation))
    if schedule.sync is Sync.BARRIER:
        found.extend(_barriers(schedule))
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


def _program_order(schedule: Schedule) -> list[Dependency]:
    edges = []
    for worker, body in enumerate(schedule.workers):
        for index in range(len(body)):
            source, target = Node(worker, index), Node(worker, (index + 1) % len(body))
            tokens = int(index + 1 == len(body))
            edges.append(Dependency(source, target, tokens, Relation.PROGRAM, target))
    return edges


def _barriers(schedule: Schedule) -> list[Dependency]:
    """All-to-all edges: whatever precedes a barrier, before whatever follows it."""
    edges = []
    meetings = [barrier_indices(schedule, worker) for worker in range(len(schedule.workers))]
    if len({len(indices) for indices in meetings}) > 1:
        raise ScheduleError("sync 'barrier' needs the same number of barriers on every worker")
    for group in zip(*meetings, strict=True):
        for before, index in enumerate(group):
            for after, other in enumerate(group):
                body = len(schedule.workers[after])
                target = Node(after, (other + 1) % body)
                tokens = int(other + 1 == body)
                if before != after:
                    source = Node(before, index)
                    edges.append(Dependency(source, target, tokens, Relation.BARRIER, target))
    return edges


def _needs(template: OpTemplate, num_stages: int) -> list[tuple[tuple[OpKind, ...], int, Relation]]:
    """What a template consumes: alternative kinds of producer (first found), stage, relation."""
    stage = template.stage
    forward = ((OpKind.FORWARD,), stage - 1, Relation.ACTIVATION)
    gradient = (BACKWARDS, stage + 1, Relation.GRADIENT)
    if template.kind is OpKind.FORWARD:
        return [forward] if stage > 0 else []
    if template.kind in BACKWARDS:
        local = ((OpKind.RECOMPUTE, OpKind.FORWARD), stage, Relation.LOCAL)
        return [local, gradient] if stage < num_stages - 1 else [local]
    if template.kind is OpKind.RECOMPUTE:
        return [((OpKind.FORWARD,), stage, Relation.LOCAL)]
    if template.kind is OpKind.BACKWARD_WEIGHT:
        return [((OpKind.BACKWARD_INPUT,), stage, Relation.LOCAL)]
    return [((OpKind.BACKWARD_WEIGHT, OpKind.BACKWARD), stage, Relation.LOCAL)]


def _producers(schedule: Schedule) -> dict[tuple[OpKind, int], list[Node]]:
    table: dict[tuple[OpKind, int], list[Node]] = defaultdict(list)
    for node, template in _nodes(schedule):
        table[template.kind, template.stage].append(node)
    return table


def _data(
    schedule: Schedule,
    producers: dict[tuple[OpKind, int], list[Node]],
    consumer: Node,
    kinds: tuple[OpKind, ...],
    stage: int,
    relation: Relation,
) -> list[Dependency]:
    """Edges from the operations that produce what ``consumer`` uses."""
    m = schedule.samples_per_iteration
    template = template_at(schedule, consumer)
    candidates = next((found for kind in kinds if (found := producers.get((kind, stage)))), [])
    edges = []
    for source in candidates:
        ahead = template_at(schedule, source).sample - template.sample
        if template.kind in (OpKind.UPDATE, OpKind.ALL_REDUCE):
            tokens = -(-ahead // m)  # one edge per sample of the group that the update closes
        elif ahead % m == 0:
            tokens = ahead // m
        else:
            continue
        # A mailbox is emptied by a blocking receive before the iteration's first operation.
        early = schedule.sync is Sync.MAILBOX and source.worker != consumer.worker
        target = Node(consumer.worker, 0) if early else consumer
        edges.append(Dependency(source, target, tokens, relation, consumer))
    if not edges:
        wanted = " or ".join(f"{kind.value}{stage}" for kind in kinds)
        raise ScheduleError(f"{_where(schedule, consumer)}: no {wanted} produces its input")
    return edges


def _where(schedule: Schedule, node: Node) -> str:
    text = template_at(schedule, node).text(schedule.samples_per_iteration)
    return f"worker {node.worker}, operation {node.position} ({text})"


# --- Checks -------------------------------------------------------------------------------------


def validate(schedule: Schedule) -> None:
    """Check that a schedule can run: complete, free of deadlock, in bounded memory.

    Raises:
        ScheduleError: naming the offending operation.

    >>> from ddg_sim.schedule import parse
    >>> validate(parse('''x stages=1 sync=none activations=graph jacobian=stashed samples=1
    ... worker 0: B0(t) F0(t) U0(t)'''))
    Traceback (most recent call last):
    ...
    ddg_sim.schedule.ScheduleError: deadlock: worker 0, operation 0 (B0(t)) waits for worker 0, ...
    """
    _check_cells(schedule)
    edges = dependencies(schedule)
    _check_deadlock(schedule, edges)
    for edge, slots in zip(edges, token_bounds(schedule, edges), strict=True):
        if slots is None:
            raise ScheduleError(
                f"unbounded memory: {_where(schedule, edge.source)} may run ahead of"
                f" {_where(schedule, edge.target)} without limit"
            )


def _check_cells(schedule: Schedule) -> None:
    if schedule.num_stages < 1 or not schedule.workers or not all(schedule.workers):
        raise ScheduleError("a schedule needs at least one stage and no empty worker")
    if schedule.samples_per_iteration < 1:
        raise ScheduleError(
            f"samples_per_iteration must be at least 1, got {schedule.samples_per_iteration}"
        )
    home: dict[int, int] = {}
    seen: dict[tuple[OpKind, int, int], Node] = {}
    m = schedule.samples_per_iteration
    for node, template in _nodes(schedule):
        where = _where(schedule, node)
        if not 0 <= template.stage < schedule.num_stages:
            raise ScheduleError(f"{where}: stage must be in 0..{schedule.num_stages - 1}")
        if template.version_lag < 0:
            raise ScheduleError(f"{where}: no version is newer than the newest")
        if template.kind is OpKind.UPDATE and template.sample % m != m - 1:
            raise ScheduleError(f"{where}: an update must close a group of {m} samples")
        if template.sample >= m:
            raise ScheduleError(f"{where}: its sample has not entered yet (offset must be < {m})")
        if home.setdefault(template.stage, node.worker) != node.worker:
            raise ScheduleError(f"{where}: stage already lives on worker {home[template.stage]}")
        key = (template.kind, template.stage, template.sample % m)
        if key in seen:
            raise ScheduleError(f"{where}: repeats {_where(schedule, seen[key])}")
        seen[key] = node
    for stage in range(schedule.num_stages):
        found = Counter(kind for kind, its_stage, _ in seen if its_stage == stage)
        stored = schedule.rule.activations is Activations.INPUT
        needed = {
            OpKind.FORWARD: m,
            OpKind.BACKWARD: m - found[OpKind.BACKWARD_INPUT],
            OpKind.BACKWARD_WEIGHT: found[OpKind.BACKWARD_INPUT],
            OpKind.RECOMPUTE: m if stored else found[OpKind.RECOMPUTE],
            OpKind.UPDATE: 1,
        }
        for kind, count in needed.items():
            if found[kind] != count:
                raise ScheduleError(
                    f"stage {stage}: has {found[kind]} {kind.value} operations per iteration,"
                    f" needs {count}"
                )


def _check_deadlock(schedule: Schedule, edges: tuple[Dependency, ...]) -> None:
    """A cycle without a token is a set of operations that wait for one another for ever."""
    nodes = [node for node, _ in _nodes(schedule)]
    # With these weights a cycle is negative exactly when its tokens are not positive.
    distance = dict.fromkeys(nodes, 0)
    because: dict[Node, Dependency] = {}
    changed: Node | None = None
    for _ in range(len(nodes) + 1):
        changed = None
        for edge in edges:
            reached = distance[edge.source] + edge.tokens * (len(nodes) + 1) - 1
            if reached < distance[edge.target]:
                distance[edge.target] = reached
                because[edge.target] = edge
                changed = edge.target
        if changed is None:
            return
    assert changed is not None
    for _ in nodes:  # walk back into the cycle itself
        changed = because[changed].source
    edge = because[changed]
    raise ScheduleError(
        f"deadlock: {_where(schedule, edge.target)} waits for {_where(schedule, edge.source)}"
        f" ({edge.relation.value}), which waits for it in turn"
    )


def token_bounds(schedule: Schedule, edges: tuple[Dependency, ...]) -> list[int | None]:
    """Most tokens an edge can ever hold, per edge; None if there is no bound.

    It is the least number of tokens on a cycle through the edge (Commoner et al. 1971), as long as
    all edges bind. Where samples do not exist, data edges do not: `rings.ring_slots` counts the
    buffers that a message stream needs in warm-up and drain as well.

    >>> from ddg_sim.methods import ddg
    >>> edges = dependencies(ddg(4))
    >>> [slots for edge, slots in zip(edges, token_bounds(ddg(4), edges))
    ...  if edge.is_message and edge.relation is Relation.ACTIVATION]
    [2, 2, 2]
    """
    index = {node: i for i, (node, _) in enumerate(_nodes(schedule))}
    size = len(index)
    weight: dict[tuple[int, int], int] = {}
    for edge in edges:
        key = (index[edge.source], index[edge.target])
        weight[key] = min(weight.get(key, edge.tokens), edge.tokens)
    rows, columns = zip(*weight, strict=True)
    # Shortest paths with strictly ordered weights: tokens first, then the number of edges, so that
    # no weight is zero (a sparse graph cannot hold one).
    scaled = np.array([tokens * (size + 1) + 1 for tokens in weight.values()], dtype=float)
    distance = johnson(csr_array((scaled, (rows, columns)), shape=(size, size)))
    bounds: list[int | None] = []
    for edge in edges:
        back = distance[index[edge.target], index[edge.source]]
        bounds.append(None if np.isinf(back) else edge.tokens + int(back // (size + 1)))
    return bounds
