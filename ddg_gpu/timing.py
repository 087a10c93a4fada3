"""How long operations, messages and barriers take, timed in one process per worker.

A worker's process runs the training loop on the program of the method that is predicted, with the
method's rule: what a rule costs beyond a plain pass (copies of weights, heads, halves, means of
gradients, activations that wait in memory) is in its operations. But it runs alone: messages are
made up, and the others wait for their turn, or run their own programs without a word between
them. So no schedule is run, and what is predicted is a prediction. Messages and barriers are timed
apart, in `machine`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ddg_gpu.data import Batches, Dataset
from ddg_gpu.distributed import dataset_values
from ddg_gpu.execute import CREDIT_SHAPE, Execution
from ddg_gpu.job import Job, make_stage, network
from ddg_gpu.machine import available_cores
from ddg_gpu.messages import message_buffer
from ddg_gpu.processes import Report, run_together
from ddg_gpu.transport import require_processes
from ddg_gpu.value import Value, like, members
from ddg_sim.dependencies import Relation
from ddg_sim.lowering import Barrier, Message, Receive
from ddg_sim.schedule import Op, OpKind

#: Iterations that are run before anything is timed (allocators and caches settle).
WARM_UP = 2
#: Turns of each kind while a method's operations are timed: the machine's speed drifts.
TURNS = 1
#: Seconds of every operation of a kind that was timed.
Durations = dict[OpKind, list[float]]


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds of one stage's operations.

    Args:
        alone: each right after another one, while the other workers wait.
        beside: the same while as many others as there are cores for compute, too; where there
            are no others, as alone.
        waited: after all others have had an operation, in turns; empty if it was not asked for.
    """

    alone: Durations
    beside: Durations
    waited: Durations


def time_operations(
    job: Job, dataset: Dataset, samples: int, waits: bool = False
) -> list[StageTimes]:
    """Time the operations of a job's method: per stage, alone and beside others.

    Args:
        job: what to time.
        dataset: the data.
        samples: mini-batches, or micro-batches, to time at least, each way.
        waits: whether to time operations after a wait, too.

    Raises:
        ValueError: if the job cannot be run on the data, or not in several processes.
        WorkerError: if a process fails.
    """
    schedule = job.schedule()
    require_processes(schedule)
    given = {**dataset_values(dataset), "samples": samples, "waits": waits}
    timed = run_together(partial(_operations, job), len(schedule.workers), given)
    return [
        StageTimes(
            *(
                {OpKind[kind]: seconds for kind, seconds in durations.items()}
                for durations in of_worker[str(stage)]
            )
        )
        for stage in range(job.stages)
        for of_worker in timed
        if str(stage) in of_worker
    ]


# --- The operations of a method -----------------------------------------------------------------


class _MadeUp:
    """A transport for a worker that is alone: messages have the right shape, and no sender."""

    def __init__(self, buffer: Callable[[Message], Value]) -> None:
        self._buffer = buffer
        self._known: dict[tuple[Relation, Any], Value] = {}

    def expect(self, messages: Iterator[Message]) -> None:
        """Nothing will come."""

    def send(self, message: Message, value: Value) -> None:
        """Throw it away."""

    def ready(self, instruction: Receive | Barrier) -> bool:
        """Always."""
        return True

    def receive(self, message: Message) -> Value:
        """Random numbers of a likely size, the same ones each time, in fresh memory."""
        if message.relation is Relation.CREDIT:
            return torch.empty(CREDIT_SHAPE)
        empty = self._buffer(message)
        key = message.relation, tuple(tensor.shape for tensor in members(empty))
        if key not in self._known:
            scale = 1e-3 if message.relation is Relation.GRADIENT else 1.0
            self._known[key] = like(
                tuple(
                    scale * torch.randn_like(tensor)
                    if tensor.is_floating_point()
                    else torch.zeros_like(tensor)
                    for tensor in members(empty)
                ),
                empty,
            )
        known = self._known[key]
        return like(tuple(tensor.clone() for tensor in members(known)), known)

    def peek(self, message: Message) -> Value:
        """The same."""
        return self.receive(message)

    def preload(self, messages: Mapping[Message, Value]) -> None:
        """Nothing was sent earlier."""

    def meet(self, barrier: Barrier) -> None:
        """Go on."""

    def close(self) -> None:
        """Nothing is kept."""


@dataclass(frozen=True, slots=True)
class _Turn:
    """Iterations of a program that some workers run at the same time, while the others wait.

    The first iteration does not count, as its first operation comes after a wait, nor do the last
    ``extra`` ones: who is beside another must not leave it alone. ``one_by_one``: everybody runs
    it, but the workers take turns operation by operation.
    """

    who: frozenset[int]
    counted: int
    extra: int = 0
    one_by_one: bool = False

    @property
    def iterations(self) -> int:
        return 1 + self.counted + self.extra


def _plan(workers: int, counted: int, waits: bool) -> list[_Turn]:
    """Every worker alone, then beside others, then all in turns operation by operation."""
    most = min(workers, available_cores())
    alone = [_Turn(frozenset({worker}), counted) for worker in range(workers)]
    firsts = range(workers if 1 < most < workers else 1)
    together = [
        _Turn(frozenset((first + place) % workers for place in range(most)), counted, extra=1)
        for first in firsts
    ]
    in_turns = [_Turn(frozenset(range(workers)), counted, one_by_one=True)]
    return TURNS * [*alone, *(together if most > 1 else []), *(in_turns if waits else [])]


def _operations(job: Job, rank: int, given: dict[str, Any], _report: Report) -> dict[str, Any]:
    """By stage, and then as in `StageTimes`, seconds of each operation by its kind's name."""
    samples, waits = given.pop("samples"), given.pop("waits")
    schedule = job.schedule()
    workers, longest = len(schedule.workers), max(map(len, schedule.workers))
    settled = schedule.num_ticks(0) + WARM_UP
    plan = _plan(workers, max(1, -(-samples // (TURNS * schedule.samples_per_iteration))), waits)
    mine = [turn for turn in plan if rank in turn.who]
    position, one_by_one = 0, False

    def take_turns(op: Op | None) -> None:
        """Where it goes one by one, wait until this worker may run an operation, or the end."""
        nonlocal position
        while one_by_one and (op is not None or position < longest * workers):
            dist.barrier()
            position += 1
            if op is not None and (position - 1) % workers == rank:
                break

    execution = _alone(job, rank, Dataset(**given), take_turns)
    execution.advance(settled)
    for turn in plan:
        dist.barrier()
        one_by_one = turn.one_by_one
        for _ in range(turn.iterations if rank in turn.who else 0):
            position = 0
            execution.advance(execution.tick + 1)
            take_turns(None)
    dist.barrier()
    found: dict[str, Any] = defaultdict(lambda: [defaultdict(list) for _ in range(3)])
    numbers: list[int | None] = [None] * settled
    for turn in mine:
        way = 2 if turn.one_by_one else int(len(turn.who) > 1)
        numbers += [None, *[way] * turn.counted, *[None] * turn.extra]
    for op, start, end in execution.records[rank].spans:
        measured = numbers[op.iteration]
        if measured is not None:
            found[str(op.stage)][measured][op.kind.name].append(end - start)
    for ways in found.values():
        if not ways[1]:
            ways[1] = ways[0]
    return {stage: [dict(way) for way in ways] for stage, ways in found.items()}


def _alone(job: Job, rank: int, dataset: Dataset, pace: Callable[[Op], None]) -> Execution:
    """A worker of a job, with made-up messages; ``pace`` is called before every operation."""
    schedule, parts = job.schedule(), network(job, dataset)
    batches = Batches(dataset, job.batch_size, job.seed)
    # Made-up activations are no data to learn from: with a usual rate the loss may overflow.
    job = replace(job, learning_rate=1e-12)
    stages = {
        index: make_stage(job, schedule, parts, index)
        for index in range(schedule.num_stages)
        if schedule.worker_of(index) == rank
    }
    transport = _MadeUp(message_buffer(schedule, parts.boundaries, batches.size))
    return Execution(schedule, [rank], stages, batches, transport, pace=pace)
