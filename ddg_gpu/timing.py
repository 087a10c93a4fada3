"""How long operations, messages and barriers take, timed in one process per worker.

A worker's process runs the training loop on the program of the method that is predicted, with the
method's rule: what a rule costs beyond a plain pass (copies of weights, heads, halves, means of
gradients, activations that wait in memory) is in its operations. But it runs alone: messages are
made up, and the others wait for their turn. So no schedule is run, and what is predicted is a
prediction. What the machine does to all methods is timed apart, in `machine`.
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
from ddg_gpu.processes import Report, run_together
from ddg_sim.dependencies import Relation
from ddg_sim.lowering import Barrier, Instruction, Message, Receive, instructions
from ddg_sim.schedule import Op, OpKind

#: Iterations that are run before anything is timed (allocators and caches settle).
WARM_UP = 2
#: Turns that every worker has while a method's operations are timed: the machine's speed drifts.
TURNS = 2
#: Per stage, the seconds of every operation of a kind that was timed.
Durations = list[dict[OpKind, list[float]]]


def time_operations(job: Job, dataset: Dataset, samples: int) -> Durations:
    """Time the operations of a job's method, each worker alone.

    Args:
        job: what to time.
        dataset: the data.
        samples: mini-batches, or micro-batches, to time at least.

    Raises:
        ValueError: if the job cannot be run on the data.
        WorkerError: if a process fails.
    """
    schedule = job.schedule()
    given = {**dataset_values(dataset), "samples": samples}
    timed = run_together(partial(_operations, job), len(schedule.workers), given)
    return [
        {OpKind[kind]: seconds for kind, seconds in of_worker[str(stage)].items()}
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


@dataclass(slots=True)
class _Turns:
    """Who may compute: all come to numbered barriers, and know how many come before what."""

    met: int = 0

    def wait(self, until: int) -> None:
        while self.met < until:
            dist.barrier()
            self.met += 1


def _run_alone(
    job: Job, rank: int, dataset: Dataset, iterations: int, due: Callable[[int, int], int]
) -> list[tuple[Op, float, float]]:
    """Run a worker's program with made-up messages; gives (operation, start, end).

    Args:
        job: gives the schedule.
        rank: which worker.
        dataset: the data.
        iterations: how many.
        due: (iteration, position in it) -> how many barriers come before that operation.
    """
    schedule, parts = job.schedule(), network(job, dataset)
    batches = Batches(dataset, job.batch_size, job.seed)
    stages = {
        index: make_stage(job, schedule, parts, index)
        for index in range(schedule.num_stages)
        if schedule.worker_of(index) == rank
    }
    turns, record = _Turns(), Record()

    def paced() -> Iterator[Instruction]:
        iteration = position = 0
        for instruction in instructions(schedule, rank, iterations, drain=False):
            if isinstance(instruction, Op):
                same = instruction.iteration == iteration
                iteration, position = instruction.iteration, (position + 1 if same else 0)
                turns.wait(due(iteration, position))
            yield instruction

    transport = _MadeUp(message_shape(parts.boundaries, batches))
    for _ in work(paced(), stages, transport, batches, record):
        raise RuntimeError("a worker that is alone has nobody to wait for")
    turns.wait(due(iterations, 0))
    return record.spans


def _operations(job: Job, rank: int, given: dict[str, Any], _report: Report) -> dict[str, Any]:
    """Seconds of each operation of one worker, by stage and kind's name.

    The workers take turns. The first operation of a turn comes after a wait and does not count.
    """
    samples = given.pop("samples")
    schedule = job.schedule()
    settled = schedule.num_ticks(0) + WARM_UP
    each = 1 + max(1, -(-samples // (TURNS * schedule.samples_per_iteration)))
    workers = len(schedule.workers)

    def due(iteration: int, _: int) -> int:
        turn = (iteration - settled) // each
        if turn < 0:
            return 0
        return turn * workers + rank + 1 if turn < TURNS else TURNS * workers

    spans = _run_alone(job, rank, Dataset(**given), settled + TURNS * each, due)
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for op, start, end in spans:
        if op.iteration >= settled and (op.iteration - settled) % each:
            found[str(op.stage)][op.kind.name].append(end - start)
    return {stage: dict(kinds) for stage, kinds in found.items()}
