"""Training a network by a schedule, on the executor of choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ddg_gpu.checkpoint import weights_sha256
from ddg_gpu.data import Batches, Dataset
from ddg_gpu.distributed import finished, restarted, run_processes, run_rank, under_torchrun
from ddg_gpu.execute import LocalTransport, timeline
from ddg_gpu.job import Job, make_stage, network, num_iterations, num_samples
from ddg_gpu.processes import Progress, keep_freed_memory
from ddg_gpu.snapshots import Snapshots, newest
from ddg_gpu.transport import require_processes
from ddg_gpu.worker import WorkerOutcome, run_workers
from ddg_sim.notation import parse_op
from ddg_sim.timeline import Timeline

EXECUTORS = ("serial", "distributed")
MIN_TIMEOUT = 1.0  # processes need longer than that to meet
MAX_TIMEOUT = 1e6  # seconds; far beyond it, torch's clocks overflow


@dataclass(frozen=True, slots=True)
class Run:
    """A finished training run.

    Args:
        job: what was trained.
        model: the trained network, in evaluation mode.
        losses: training loss of every mini-batch or micro-batch, in the order of feeding.
        test_accuracy: fraction of the test examples that are classified correctly.
        timeline: what ran when, since the beginning of the process or the last flush.
        iterations: that were fed, from the very first on.
        cuts: first layers of stages 1..K-1.
    """

    job: Job
    model: nn.Sequential
    losses: tuple[float, ...]
    test_accuracy: float
    timeline: Timeline
    iterations: int
    cuts: tuple[int, ...]

    @property
    def skipped(self) -> int:
        """Samples that were left out, because their loss was not finite."""
        return sum(not math.isfinite(loss) for loss in self.losses)

    @property
    def weights_sha256(self) -> str:
        """Fingerprint of all parameters and buffers in stage order."""
        return weights_sha256(self.model)


def train(
    job: Job,
    dataset: Dataset,
    executor: str = "serial",
    *,
    timeout: float = 120.0,
    port: int | None = None,
    progress: Progress = lambda done, total: None,
    snapshots: Snapshots | None = None,
    resume: bool = False,
    restarts: int = 0,
    warn: Callable[[str], None] = lambda text: None,
    log: Path | None = None,
) -> Run | None:
    """Train a network; every sample that is fed is also applied, by every stage.

    Args:
        job: what to train.
        dataset: the data.
        executor: "serial" (this process, the reference) or "distributed" (a process per stage).
        timeout: seconds that a worker may wait for another.
        port: TCP port on which distributed workers meet; None takes a free one.
        progress: called with (samples finished, samples in all).
        snapshots: where and when to write snapshots, if at all.
        resume: whether to go on from the newest snapshot there, if there is one. Processes that
            torchrun has restarted do so in any case.
        restarts: how often a distributed run may go on from its newest snapshot, with new
            processes, after a worker has failed. torchrun has a count of its own.
        warn: told of damaged snapshots, and why a run goes on from one by itself.
        log: folder for a line of JSON per update and stage, see `StageLog`.

    Returns:
        The run; under torchrun only on rank 0, None elsewhere.

    Raises:
        ValueError: naming an argument that is wrong.
        WorkerError: naming the worker that failed first, and why.

    >>> from ddg_gpu.data import load
    >>> run = train(Job("ddg", 2, "mlp", iterations=3), load("digits"))
    >>> len(run.losses), run.timeline.iterations
    (3, 3)
    """
    if executor not in EXECUTORS:
        raise ValueError(f"unknown executor {executor!r}; known: {', '.join(EXECUTORS)}")
    if not MIN_TIMEOUT <= timeout <= MAX_TIMEOUT:
        raise ValueError(
            f"timeout must be within {MIN_TIMEOUT:g} and {MAX_TIMEOUT:g} seconds, got {timeout}"
        )
    start = None if snapshots is None else _start(snapshots, resume, warn)
    if executor == "serial":
        total = num_samples(job, Batches(dataset, job.batch_size, job.seed))
        with one_thread():
            outcome = run_workers(
                job,
                dataset,
                lambda schedule, _: LocalTransport(len(schedule.workers)),
                watch=finished(job.stages, lambda done: progress(done, total)),
                snapshots=snapshots,
                start=start,
                log=log,
            )
        return _assemble(job, dataset, [outcome])
    require_processes(job.schedule())
    _check(job, dataset)  # a wrong argument shows here, not in K processes
    if under_torchrun():
        outcomes = run_rank(job, dataset, timeout, snapshots, start, log)
        return None if outcomes is None else _assemble(job, dataset, outcomes)
    outcomes = run_processes(
        job, dataset, timeout, port, progress, snapshots, start, restarts, warn, log
    )
    return _assemble(job, dataset, outcomes)


def _start(snapshots: Snapshots, resume: bool, warn: Callable[[str], None]) -> Path | None:
    """The snapshot to go on from.

    Raises:
        ValueError: if there are some, and nobody said to go on from them.
    """
    found = newest(snapshots.folder, warn)
    if found is not None and not (resume or restarted()):
        raise ValueError(
            f"folder {snapshots.folder} holds snapshots of a run: resume it, or name another folder"
        )
    if found is None and resume:
        warn(f"{snapshots.folder} holds no checkpoint: starting from the beginning")
    return found


def _check(job: Job, dataset: Dataset) -> None:
    """Make all checks of the job, on the way to its stages."""
    num_samples(job, Batches(dataset, job.batch_size, job.seed))
    schedule, parts = job.schedule(), network(job, dataset)
    stages = {index: make_stage(job, schedule, parts, index) for index in range(job.stages)}
    for stage in stages.values():
        stage.tie(stages)


def _assemble(job: Job, dataset: Dataset, outcomes: Sequence[WorkerOutcome]) -> Run:
    """The whole model again, from what the processes hand back."""
    parts = network(replace(job, load=None), dataset)  # that file may be another by now
    parts.model.load_state_dict(
        {name: tensor for outcome in outcomes for name, tensor in outcome.weights.items()}
    )
    workers = range(len(job.schedule().workers))
    spans = {worker: spans for outcome in outcomes for worker, spans in outcome.spans.items()}
    parsed = [[(parse_op(text), start, end) for text, start, end in spans[w]] for w in workers]
    losses = tuple(loss for outcome in outcomes for _, loss in outcome.losses)
    accuracy = evaluate(parts.model, dataset)
    measured = timeline(job.schedule(), outcomes[0].iterations, parsed)
    total = num_iterations(job, Batches(dataset, job.batch_size, job.seed))
    return Run(job, parts.model, losses, accuracy, measured, total, parts.cuts)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute inside as a worker process does: other thread counts give other bits and timings.

    >>> with one_thread():
    ...     torch.get_num_threads()
    1
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def evaluate(model: nn.Sequential, dataset: Dataset, batch_size: int = 500) -> float:
    """Fraction of the test examples (of a text: its characters) that a model gets right.

    Args:
        model: the network; it is left in evaluation mode.
        dataset: the data.
        batch_size: examples per forward pass; the result does not depend on it.
    """
    model.eval()
    correct = total = 0
    with torch.inference_mode():
        for inputs, targets in dataset.test_batches(batch_size):
            correct += int((model(inputs).argmax(dim=1) == targets).sum())
            total += targets.numel()
    return correct / total
