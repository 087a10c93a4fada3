"""The distributed executor: one process per worker, messages over gloo.

A run is started from here (processes on this machine) or by torchrun.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from ddg_gpu import snapshots as store
from ddg_gpu.data import Batches, Dataset
from ddg_gpu.execute import Execution, Record, Samples, Watch
from ddg_gpu.job import Job, num_samples
from ddg_gpu.processes import Progress, Report, WorkerError, run_together
from ddg_gpu.snapshots import Snapshots
from ddg_gpu.stage import Stage
from ddg_gpu.transport import GlooTransport
from ddg_gpu.value import Value
from ddg_gpu.worker import Connect, WorkerOutcome, run_workers
from ddg_sim.lowering import Message
from ddg_sim.schedule import Op, OpKind, Schedule


def connection(rank: int, timeout: float) -> Connect:
    """Makes the transport of the worker with that rank; all processes must make theirs now."""

    def connect(schedule: Schedule, buffer: Callable[[Message], Value]) -> GlooTransport:
        transport = GlooTransport(schedule, rank, buffer, timeout)
        dist.barrier()  # start together, so that loading is not mistaken for waiting
        return transport

    return connect


def run_stages(
    schedule: Schedule,
    rank: int,
    stages: Mapping[int, Stage],
    samples: Samples,
    buffer: Callable[[Message], Value],
    iterations: int,
    timeout: float,
    watch: Watch = lambda op, seconds: None,
) -> Record:
    """Execute one worker's program in this process, until all samples are used everywhere.

    Args:
        schedule: what to run; the process group has one rank per worker of it.
        rank: index of this worker.
        stages: the stages it holds, by index; their weights are trained in place.
        samples: the data; sample s must be the same in every process.
        buffer: makes the empty value that a message is received into.
        iterations: iterations of samples that are fed.
        timeout: seconds that any wait for another worker may last.
        watch: called after every operation.

    Raises:
        PeerLostError: if another worker is gone, or does not answer in time.
    """
    transport = GlooTransport(schedule, rank, buffer, timeout)
    execution = Execution(schedule, [rank], stages, samples, transport, iterations, watch=watch)
    dist.barrier()  # start together, so that loading is not mistaken for waiting
    execution.drain()
    return execution.records[rank]


def run_processes(
    job: Job,
    dataset: Dataset,
    timeout: float = 120.0,
    port: int | None = None,
    progress: Progress = lambda done, total: None,
    snapshots: Snapshots | None = None,
    start: Path | None = None,
    restarts: int = 0,
    warn: Callable[[str], None] = lambda text: None,
    log: Path | None = None,
) -> list[WorkerOutcome]:
    """Run a job in one new process per worker on this machine.

    Args:
        job: what to train.
        dataset: the data.
        timeout: seconds that any wait for another worker may last.
        port: TCP port on which the workers meet; None takes a free one.
        progress: called with (samples finished, samples in all) about twice a second.
        snapshots: where and when to write snapshots, if at all.
        start: a snapshot to go on from.
        restarts: how many times to go on from the newest snapshot, with new processes, after a
            worker has failed.
        warn: told of damaged snapshots, and before each restart, why.
        log: folder for a line per update, see `StageLog`.

    Raises:
        ValueError: if the port cannot be used.
        WorkerError: naming the first worker that failed, and why.
    """
    total = num_samples(job, Batches(dataset, job.batch_size, job.seed))
    while True:
        given = {
            "dataset": dataset_values(dataset),
            "timeout": timeout,
            "start": None if start is None else str(start),
        }
        try:
            results = run_together(
                partial(_task, job, snapshots, log),
                len(job.schedule().workers),
                given,
                timeout=timeout,
                port=port,
                steps=total,
                progress=progress,
            )
        except WorkerError as error:
            if restarts == 0 or snapshots is None:
                raise
            restarts -= 1
            start = store.newest(snapshots.folder, warn) or start
            warn(f"{error}; going on from {start or 'the beginning'}")
            continue
        return [WorkerOutcome(**result) for result in results]


def dataset_values(dataset: Dataset) -> dict[str, Any]:
    """A dataset as tensors and plain values, from which ``Dataset(**values)`` makes it again.

    >>> from ddg_gpu.data import load
    >>> Dataset(**dataset_values(load("digits"))).name
    'digits'
    """
    return {field.name: getattr(dataset, field.name) for field in fields(dataset)}


def _task(
    job: Job,
    snapshots: Snapshots | None,
    log: Path | None,
    rank: int,
    given: dict[str, Any],
    report: Report,
) -> dict[str, Any]:
    torch.set_num_threads(1)  # other thread counts give other bits
    outcome = run_workers(
        job,
        Dataset(**given["dataset"]),
        connection(rank, given["timeout"]),
        [rank],
        finished(job.stages, report),
        snapshots,
        None if given["start"] is None else Path(given["start"]),
        log,
    )
    # Not asdict, which would copy every tensor.
    return {field.name: getattr(outcome, field.name) for field in fields(outcome)}


def finished(stages: int, report: Report) -> Watch:
    """A watch that reports how many samples the last stage has finished.

    >>> watch = finished(2, print)
    >>> watch(Op(OpKind.UPDATE, 1, iteration=4, sample=4, version=5), 0.0)
    5
    """

    def watch(op: Op, seconds: float) -> None:
        if op.kind is OpKind.UPDATE and op.stage == stages - 1:
            report(op.sample + 1)

    return watch


def under_torchrun() -> bool:
    """Whether this process was started by torchrun.

    >>> under_torchrun()
    False
    """
    return "TORCHELASTIC_RUN_ID" in os.environ


def restarted() -> bool:
    """Whether torchrun started this process after others had failed.

    >>> restarted()
    False
    """
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def join(timeout: float) -> None:
    """Join the gloo process group of the processes that torchrun started.

    After a restart torchrun keeps the store in which processes leave their addresses. By default
    they would read those of the dead ones, and often fail to connect; here every attempt has names
    of its own.

    Args:
        timeout: seconds that any wait for another process may last.

    >>> import inspect
    >>> list(inspect.signature(join).parameters)
    ['timeout']
    """
    limit = timedelta(seconds=timeout)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group("gloo", timeout=limit)
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "gloo",
        store=PrefixStore(
            f"attempt-{attempt}", TCPStore(address, port, is_master=False, timeout=limit)
        ),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=limit,
    )


def run_rank(
    job: Job,
    dataset: Dataset,
    timeout: float,
    snapshots: Snapshots | None = None,
    start: Path | None = None,
    log: Path | None = None,
) -> list[WorkerOutcome] | None:
    """Run this process's worker under torchrun; rank 0 gets the outcomes of all, others None.

    Args:
        job: what to train.
        dataset: the data.
        timeout: seconds that any wait for another worker may last.
        snapshots: where and when to write snapshots, if at all; all processes must see the folder.
        start: a snapshot to go on from.
        log: folder for a line per update, see `StageLog`.

    Raises:
        ValueError: if torchrun started another number of processes than the job has workers.
    """
    workers, started = len(job.schedule().workers), int(os.environ["WORLD_SIZE"])
    if started != workers:
        raise ValueError(
            f"stages {job.stages} needs {workers} processes, torchrun started {started}:"
            f" use --nproc-per-node {workers}"
        )
    torch.set_num_threads(1)  # other thread counts give other bits
    join(timeout)
    try:
        rank = dist.get_rank()
        outcome = run_workers(
            job,
            dataset,
            connection(rank, timeout),
            [rank],
            snapshots=snapshots,
            start=start,
            log=log,
        )
        gathered: list[WorkerOutcome] | None = [outcome] * workers if rank == 0 else None
        dist.gather_object(outcome, gathered)
        return gathered
    finally:
        dist.destroy_process_group()
