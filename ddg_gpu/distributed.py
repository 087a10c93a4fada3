"""The distributed executor: one process per worker, messages over gloo.

A run is started from here (processes on this machine) or by torchrun.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ddg_gpu.data import Batches, Dataset
from ddg_gpu.execute import Record, Samples, work
from ddg_gpu.job import Job, make_stage, message_shape, network, num_iterations, num_samples
from ddg_gpu.processes import Progress, Report, run_together
from ddg_gpu.stage import Stage
from ddg_gpu.transport import GlooTransport, Stream
from ddg_sim.lowering import Message, channels, instructions, slots
from ddg_sim.rule import Activations
from ddg_sim.schedule import OpKind, Schedule, ScheduleError


@dataclass(frozen=True, slots=True)
class WorkerOutcome:
    """What a worker hands back.

    Args:
        weights: parameters and buffers of its stages, by their names in the whole model.
        losses: (sample, loss) of the last stage; empty elsewhere.
        spans: (operation as text, start, end), seconds on this machine's monotonic clock.
    """

    weights: dict[str, Tensor]
    losses: list[tuple[int, float]]
    spans: list[tuple[str, float, float]]


def run_worker(
    job: Job,
    dataset: Dataset,
    rank: int,
    timeout: float,
    on_sample: Callable[[int], None] = lambda sample: None,
) -> WorkerOutcome:
    """Run one worker of a job; the process group must exist, with one rank per worker.

    Args:
        job: what to train; the same in every process.
        dataset: the data; the same in every process.
        rank: index of this worker.
        timeout: seconds that any wait for another worker may last.
        on_sample: called with each sample that the last stage has finished.
    """
    torch.set_num_threads(1)  # other thread counts give other bits
    schedule = job.schedule()
    parts = network(job, dataset)
    batches = Batches(dataset, job.batch_size, job.seed)
    stages = {
        index: make_stage(job, schedule, parts, index)
        for index in range(schedule.num_stages)
        if schedule.worker_of(index) == rank
    }
    reconstructs = schedule.rule.activations is Activations.RECONSTRUCT
    shape = message_shape(parts.boundaries, batches, reconstructs)
    iterations = num_iterations(job, batches)
    record = run_stages(schedule, rank, stages, batches, shape, iterations, timeout, on_sample)
    weights = {
        name: tensor
        for index, stage in stages.items()
        for name, tensor in _whole_model_names(
            stage.module.state_dict(), first_layer=(0, *parts.cuts)[index]
        ).items()
    }
    last = (stage for stage in stages.values() if stage.is_last)
    losses = [item for stage in last for item in sorted(stage.losses.items())]
    return WorkerOutcome(
        weights, losses, [(str(op), start, end) for op, start, end in record.spans]
    )


def require_processes(schedule: Schedule) -> None:
    """Refuse what can be trained in one process only.

    Raises:
        ScheduleError: naming the method.

    >>> from ddg_sim.methods import pd_asgd
    >>> require_processes(pd_asgd(2))
    Traceback (most recent call last):
    ...
    ddg_sim.schedule.ScheduleError: pd-asgd: the two workers of stage 0 share its weights: take ...
    """
    if schedule.replicas > 1:
        raise ScheduleError(
            f"{schedule.method}: replicas {schedule.replicas} train in one process only: take the"
            " serial executor"
        )
    for stage in range(schedule.num_stages):
        if schedule.worker_of(stage, OpKind.FORWARD) != schedule.worker_of(stage):
            raise ScheduleError(
                f"{schedule.method}: the two workers of stage {stage} share its weights: take the"
                " serial executor"
            )


def run_stages(
    schedule: Schedule,
    rank: int,
    stages: Mapping[int, Stage],
    samples: Samples,
    shape: Callable[[Message], torch.Size],
    iterations: int,
    timeout: float,
    on_sample: Callable[[int], None] = lambda sample: None,
) -> Record:
    """Execute one worker's program in this process, until all samples are used everywhere.

    Args:
        schedule: what to run; the process group has one rank per worker of it.
        rank: index of this worker.
        stages: the stages it holds, by index; their weights are trained in place.
        samples: the data; sample s must be the same in every process.
        shape: shape of a message's tensor.
        iterations: iterations of samples that are fed.
        timeout: seconds that any wait for another worker may last.
        on_sample: called with each sample that the last stage has finished.

    Raises:
        PeerLostError: if another worker is gone, or does not answer in time.
    """
    require_processes(schedule)
    incoming: Counter[Stream] = Counter()
    outgoing: Counter[Stream] = Counter()
    for channel, buffers in zip(channels(schedule), slots(schedule), strict=True):
        stream = (channel.relation, channel.target)
        if channel.dependency.target.worker == rank:
            incoming[stream] += buffers
        if channel.dependency.source.worker == rank:
            outgoing[stream] += buffers
    program = instructions(schedule, rank, iterations)
    transport = GlooTransport(schedule, program, incoming, outgoing, shape, timeout)
    record = Record()
    dist.barrier()  # start together, so that loading is not mistaken for waiting
    program = instructions(schedule, rank, iterations)
    for _ in work(program, stages, transport, samples, record, on_sample):
        raise RuntimeError("a worker in a process of its own has nobody to take turns with")
    transport.close()
    return record


def _whole_model_names(state: dict[str, Tensor], first_layer: int) -> dict[str, Tensor]:
    """Rename ``0.weight`` of a stage to ``7.weight`` if the stage begins at the model's layer 7."""
    split = {name: name.split(".", 1) for name in state}
    return {
        f"{int(layer) + first_layer}.{rest}": state[name] for name, (layer, rest) in split.items()
    }


def run_processes(
    job: Job,
    dataset: Dataset,
    timeout: float = 120.0,
    port: int | None = None,
    progress: Progress = lambda done, total: None,
) -> list[WorkerOutcome]:
    """Run a job in one new process per worker on this machine.

    Args:
        job: what to train.
        dataset: the data.
        timeout: seconds that any wait for another worker may last.
        port: TCP port on which the workers meet; None takes a free one.
        progress: called with (samples finished, samples in all) about twice a second.

    Raises:
        ValueError: if the port cannot be used.
        WorkerError: naming the first worker that failed, and why.
    """
    given = {
        "dataset": dataset_values(dataset),
        "timeout": timeout,
    }
    total = num_samples(job, Batches(dataset, job.batch_size, job.seed))
    results = run_together(
        partial(_task, job),
        len(job.schedule().workers),
        given,
        timeout=timeout,
        port=port,
        steps=total,
        progress=progress,
    )
    return [WorkerOutcome(**result) for result in results]


def dataset_values(dataset: Dataset) -> dict[str, Any]:
    """A dataset as tensors and plain values, from which ``Dataset(**values)`` makes it again.

    >>> from ddg_gpu.data import load
    >>> Dataset(**dataset_values(load("digits"))).name
    'digits'
    """
    return {field.name: getattr(dataset, field.name) for field in fields(dataset)}


def _task(job: Job, rank: int, given: dict[str, Any], report: Report) -> dict[str, Any]:
    dataset = Dataset(**given["dataset"])
    outcome = run_worker(job, dataset, rank, given["timeout"], lambda sample: report(sample + 1))
    # Not asdict, which would copy every tensor.
    return {field.name: getattr(outcome, field.name) for field in fields(outcome)}


def under_torchrun() -> bool:
    """Whether this process was started by torchrun.

    >>> under_torchrun()
    False
    """
    return "TORCHELASTIC_RUN_ID" in os.environ


def run_rank(job: Job, dataset: Dataset, timeout: float) -> list[WorkerOutcome] | None:
    """Run this process's worker under torchrun; rank 0 gets the outcomes of all, others None.

    Raises:
        ValueError: if torchrun started another number of processes than the job has workers.
    """
    workers, started = len(job.schedule().workers), int(os.environ["WORLD_SIZE"])
    if started != workers:
        raise ValueError(
            f"stages {job.stages} needs {workers} processes, torchrun started {started}:"
            f" use --nproc-per-node {workers}"
        )
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    try:
        rank = dist.get_rank()
        outcome = run_worker(job, dataset, rank, timeout)
        gathered: list[WorkerOutcome] | None = [outcome] * workers if rank == 0 else None
        dist.gather_object(outcome, gathered)
        return gathered
    finally:
        dist.destroy_process_group()
