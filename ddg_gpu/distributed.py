"""The distributed executor: one process per worker, messages over gloo.

A run can be started from here (processes on this machine) or by torchrun. Whoever fails first is
reported, and ends everybody.
"""

from __future__ import annotations

import json
import multiprocessing.connection
import multiprocessing.context
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from ddg_gpu import checkpoint
from ddg_gpu.data import Batches, Dataset
from ddg_gpu.execute import Record, work
from ddg_gpu.job import Job, make_stage, message_shape, network, num_iterations
from ddg_gpu.transport import GlooTransport, PeerLostError
from ddg_sim.lowering import channels, instructions

Progress = Callable[[int, int], None]

#: Seconds for workers to say why they failed, once one of them has.
GRACE = 2.0


class WorkerError(RuntimeError):
    """A worker raised or was killed; the message names the first cause."""


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
    progress: Callable[[int], None] = lambda sample: None,
) -> WorkerOutcome:
    """Run one worker of a job; the process group must exist, with one rank per worker.

    Args:
        job: what to train; the same in every process.
        dataset: the data; the same in every process.
        rank: index of this worker.
        timeout: seconds that any wait for another worker may last.
        progress: called with each sample that the last stage has finished.
    """
    torch.set_num_threads(1)  # other thread counts give other bits
    schedule = job.schedule()
    parts = network(job, dataset)
    batches = Batches(dataset, job.batch_size, job.seed)
    iterations = num_iterations(job, batches)
    stages = {
        index: make_stage(job, schedule, module, index)
        for index, module in enumerate(parts.modules)
        if schedule.worker_of(index) == rank
    }
    transport = GlooTransport(
        schedule,
        instructions(schedule, rank, iterations),
        {
            (channel.relation, channel.target): channel.slots
            for channel in channels(schedule)
            if channel.dependency.target.worker == rank
        },
        message_shape(parts.boundaries, batches),
        timeout,
    )
    record = Record()
    dist.barrier()  # start together, so that loading is not mistaken for waiting
    program = instructions(schedule, rank, iterations)
    for _ in work(program, stages, transport, batches, record, progress):
        raise RuntimeError("a worker in a process of its own has nobody to take turns with")
    transport.close()
    first_layer = (0, *parts.cuts)
    weights = {
        f"{first_layer[index] + int(name.split('.', 1)[0])}.{name.split('.', 1)[1]}": tensor
        for index, stage in stages.items()
        for name, tensor in stage.module.state_dict().items()
    }
    losses = [item for stage in stages.values() for item in sorted(stage.losses.items())]
    return WorkerOutcome(
        weights, losses, [(str(op), start, end) for op, start, end in record.spans]
    )


# --- Started by torchrun ------------------------------------------------------------------------


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


# --- Started from here --------------------------------------------------------------------------


def run_processes(
    job: Job,
    dataset: Dataset,
    timeout: float = 120.0,
    port: int | None = None,
    progress: Progress = lambda done, total: None,
) -> list[WorkerOutcome]:
    """Run a job in one new process per worker on this machine.

    A script that calls this needs the usual ``if __name__ == "__main__":`` guard, as the processes
    import it.

    Args:
        job: what to train.
        dataset: the data.
        timeout: seconds that any wait for another worker may last.
        port: TCP port on which the workers meet; None takes a free one.
        progress: called with (samples finished, samples in all) about twice a second.

    Raises:
        ValueError: if the port is in use.
        WorkerError: naming the first worker that failed, and why.
    """
    workers = len(job.schedule().workers)
    total = num_iterations(job, Batches(dataset, job.batch_size, job.seed))
    store = _serve(port, timeout)
    context = _context()
    with tempfile.TemporaryDirectory(prefix="ddg-") as folder:
        _write_dataset(dataset, Path(folder))
        processes = [
            context.Process(
                target=_process, args=(rank, job, folder, store.port, timeout), daemon=True
            )
            for rank in range(workers)
        ]
        try:
            for process in processes:
                process.start()
            while any(process.exitcode is None for process in processes):
                running = [p.sentinel for p in processes if p.exitcode is None]
                multiprocessing.connection.wait(running, timeout=0.5)
                if any(process.exitcode for process in processes):
                    raise WorkerError(_first_cause(processes, Path(folder)))
                progress(store.add("done", 0), total)
        finally:
            _end(processes)
        return [_read_outcome(Path(folder), rank) for rank in range(workers)]


def _serve(port: int | None, timeout: float) -> dist.TCPStore:
    """The meeting point of the workers, held by the parent so that it outlives any of them."""
    if port is not None:
        # torch's own message for this is two warnings and a C++ trace.
        if not 1 <= port <= 65535:
            raise ValueError(f"port must be in 1..65535, got {port}")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise ValueError(
                    f"port {port} cannot be used ({error.strerror}); choose another, or none"
                ) from None
    return dist.TCPStore(
        "127.0.0.1",
        port or 0,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout),
    )


def _context() -> multiprocessing.context.BaseContext:
    """How processes are made: forked from a clean server that has imported torch once, if possible.

    A plain fork would inherit this process's threads; spawning imports torch K times per run.
    """
    if "forkserver" not in torch.multiprocessing.get_all_start_methods():
        return torch.multiprocessing.get_context("spawn")
    context = torch.multiprocessing.get_context("forkserver")
    # torch imports the last two lazily, which would cost every worker of every run seconds.
    context.set_forkserver_preload([__name__, "torch._dynamo", "torch.utils.flop_counter"])
    return context


def _process(rank: int, job: Job, folder: str, port: int, timeout: float) -> None:
    """Main function of a worker's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        workers = len(job.schedule().workers)
        limit = timedelta(seconds=timeout)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=limit)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=workers, timeout=limit)
        dataset = _read_dataset(Path(folder))
        outcome = run_worker(job, dataset, rank, timeout, _reporter(store, 0.3))
        checkpoint.write_atomically(asdict(outcome), Path(folder) / f"worker-{rank}.pt")
        dist.barrier()  # leave together: a socket that closes early would look like a failure
    except BaseException as error:
        report = {
            "consequence": isinstance(error, PeerLostError),
            "time": time.monotonic(),
            "message": f"{type(error).__name__}: {error}".strip(),
            "traceback": traceback.format_exc(),
        }
        (Path(folder) / f"error-{rank}.json").write_text(json.dumps(report))
        sys.stdout.flush()
        os._exit(1)  # at once: destructors of a broken process group may wait
    dist.destroy_process_group()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _reporter(store: dist.Store, interval: float) -> Callable[[int], None]:
    """Tell the parent how many samples are done, not more often than every ``interval`` s."""
    last, told = time.monotonic(), 0

    def report(sample: int) -> None:
        nonlocal last, told
        if time.monotonic() - last > interval:
            store.add("done", sample + 1 - told)
            last, told = time.monotonic(), sample + 1

    return report


def _first_cause(processes: Sequence[BaseProcess], folder: Path) -> str:
    """What failed first: a killed worker or a raised error before its consequences elsewhere."""
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline and any(p.exitcode is None for p in processes):
        time.sleep(0.05)
    causes = []
    for rank, process in enumerate(processes):
        report = folder / f"error-{rank}.json"
        if process.exitcode is not None and process.exitcode < 0:
            name = signal.Signals(-process.exitcode).name
            causes.append((0, 0.0, f"worker {rank} was killed by {name}"))
        elif report.exists():
            found = json.loads(report.read_text())
            text = f"worker {rank} failed: {found['message']}"
            causes.append((1 + found["consequence"], found["time"], text))
        elif process.exitcode:
            causes.append((1, 0.0, f"worker {rank} ended with exit code {process.exitcode}"))
    return min(causes)[2]


def _end(processes: Sequence[BaseProcess]) -> None:
    for stop in (BaseProcess.terminate, BaseProcess.kill):
        for process in processes:
            if process.is_alive():
                stop(process)
        for process in processes:
            if process.pid is not None:
                process.join(timeout=2)


def _write_dataset(dataset: Dataset, folder: Path) -> None:
    content = {field.name: getattr(dataset, field.name) for field in fields(dataset)}
    checkpoint.write_atomically(content, folder / "dataset.pt")


def _read_dataset(folder: Path) -> Dataset:
    """Map the data into memory, so that a worker loads only what it touches."""
    return Dataset(**torch.load(folder / "dataset.pt", weights_only=True, mmap=True))


def _read_outcome(folder: Path, rank: int) -> WorkerOutcome:
    return WorkerOutcome(**torch.load(folder / f"worker-{rank}.pt", weights_only=True))
