"""More stages than devices: consecutive workers of a schedule that share one device."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from graphlib import TopologicalSorter

from ddg_sim.dependencies import Node, barrier_indices, dependencies, template_at, validate
from ddg_sim.periodic import at_least
from ddg_sim.schedule import OpKind, Schedule, ScheduleError


def fold(schedule: Schedule, workers_per_device: int) -> Schedule:
    """The same operations, with each group of so many consecutive workers made one.

    A worker that stands for several takes turns: its loop body has their operations in the order
    in which they could start at the earliest, if each took a tick, forward passes first. Every
    stage keeps the order of its own, and so its samples, versions and staleness.

    Args:
        schedule: a valid schedule.
        workers_per_device: at least 1, which changes nothing; the last group may be smaller.

    Raises:
        ValueError: if ``workers_per_device`` < 1.
        ScheduleError: for a stage that is on two workers, because what its forward pass reads
            depends on which.

    >>> from ddg_sim.methods import ddg
    >>> print(fold(ddg(4), 2))
    ddg stages=4 sync=none activations=graph jacobian=stashed samples=1
    worker 0: F0(t) F1(t) B0(t-3) U0(t-3) B1(t-2) U1(t-2)
    worker 1: F2(t) F3(t) B2(t-1) U2(t-1) B3(t) U3(t)
    """
    if at_least("workers_per_device", workers_per_device, 1) == 1:
        return schedule
    for stage in range(schedule.num_stages):
        if schedule.worker_of(stage) != schedule.worker_of(stage, OpKind.FORWARD):
            raise ScheduleError(
                f"{schedule.method} has stages on two workers each: they cannot share devices"
            )
    before: dict[Node, set[Node]] = {
        Node(worker, position): set()
        for worker, body in enumerate(schedule.workers)
        for position in range(len(body))
    }
    for edge in dependencies(schedule):
        if edge.tokens == 0:
            before[edge.target].add(edge.source)
    start: dict[Node, int] = {}
    for node in TopologicalSorter(before).static_order():
        start[node] = max((start[source] + 1 for source in before[node]), default=0)

    def rank(node: Node) -> tuple[bool, int, bool, Node]:
        barriers = barrier_indices(schedule, node.worker)
        later = bool(barriers) and node.position > barriers[0]
        return later, start[node], template_at(schedule, node).kind is not OpKind.FORWARD, node

    bodies = defaultdict(list)
    for node in sorted(before, key=rank):
        bodies[node.worker // workers_per_device].append(template_at(schedule, node))
    folded = replace(schedule, workers=tuple(tuple(bodies[device]) for device in sorted(bodies)))
    validate(folded)
    return folded
