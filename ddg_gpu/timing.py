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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ddg_gpu.data import Batches, Dataset
from ddg_gpu.distributed import dataset_values
from ddg_gpu.execute import CREDIT_SHAPE, Record, work
from ddg_gpu.job import Job, make_stage, message_shape, network
from ddg_gpu.machine import available_cores
from ddg_gpu.processes import Report, run_together
from ddg_sim.dependencies import Relation
from ddg_sim.lowering import Barrier, Instruction, Message, Receive, instructions
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
        ValueError: if the job cannot be run on the data.
        WorkerError: if a process fails.
    """
    schedule = job.schedule()
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

    def __init__(self, shape: Callable[[Message], torch.Size]) -> None:
        self._shape = shape
        self._known: dict[tuple[Relation, torch.Size], Tensor] = {}

    def send(self, message: Message, tensor: Tensor) -> None:
        """Throw it away."""

    def ready(self, instruction: Receive | Barrier) -> bool:
        """Always."""
        return True

    def receive(self, message: Message) -> Tensor:
        """Random numbers of a likely size, the same ones each time, in fresh memory."""
        key = message.relation, self._shape_of(message)
        if key not in self._known:
            scale = 1e-3 if message.relation is Relation.GRADIENT else 1.0
            self._known[key] = scale * torch.randn(key[1])
        return self._known[key].clone()

    def meet(self, barrier: Barrier) -> None:
        """Go on."""

    def _shape_of(self, message: Message) -> torch.Size:
        return CREDIT_SHAPE if message.relation is Relation.CREDIT else self._shape(message)


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
    total = settled + sum(turn.iterations for turn in mine)

    def paced() -> Iterator[Instruction]:
        """The program, with a barrier wherever turns change; all workers come to all of them."""
        program = instructions(schedule, rank, total, drain=False)
        upcoming = next(program, None)

        def iteration(number: int, one_by_one: bool = False) -> Iterator[Instruction]:
            nonlocal upcoming
            position = 0
            while upcoming is not None:
                if isinstance(upcoming, Op):
                    if upcoming.iteration > number:
                        break
                    while one_by_one and position % workers != rank:
                        dist.barrier()
                        position += 1
                    if one_by_one:
                        dist.barrier()
                        position += 1
                yield upcoming
                upcoming = next(program, None)
            while one_by_one and position < longest * workers:
                dist.barrier()
                position += 1

        done = 0
        for done in range(settled):
            yield from iteration(done)
        for turn in plan:
            dist.barrier()
            for _ in range(turn.iterations if rank in turn.who else 0):
                done += 1
                yield from iteration(done, turn.one_by_one)
        dist.barrier()

    spans = _run_alone(job, rank, Dataset(**given), paced())
    found: dict[str, Any] = defaultdict(lambda: [defaultdict(list) for _ in range(3)])
    numbers: list[int | None] = [None] * settled
    for turn in mine:
        way = 2 if turn.one_by_one else int(len(turn.who) > 1)
        numbers += [None, *[way] * turn.counted, *[None] * turn.extra]
    for op, start, end in spans:
        measured = numbers[op.iteration]
        if measured is not None:
            found[str(op.stage)][measured][op.kind.name].append(end - start)
    for ways in found.values():
        if not ways[1]:
            ways[1] = ways[0]
    return {stage: [dict(way) for way in ways] for stage, ways in found.items()}


def _run_alone(
    job: Job, rank: int, dataset: Dataset, program: Iterator[Instruction]
) -> list[tuple[Op, float, float]]:
    """Run a worker's program with made-up messages; gives (operation, start, end)."""
    schedule, parts = job.schedule(), network(job, dataset)
    batches = Batches(dataset, job.batch_size, job.seed)
    stages = {
        index: make_stage(job, schedule, parts, index)
        for index in range(schedule.num_stages)
        if schedule.worker_of(index) == rank
    }
    transport, record = _MadeUp(message_shape(parts.boundaries, batches)), Record()
    for _ in work(program, stages, transport, batches, record):
        raise RuntimeError("a worker that is alone has nobody to wait for")
    return record.spans
