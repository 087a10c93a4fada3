"""Training a network by a schedule, on the executor of choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from ddg_gpu.checkpoint import weights_sha256
from ddg_gpu.data import Batches, Dataset
from ddg_gpu.distributed import (
    WorkerOutcome,
    require_processes,
    run_processes,
    run_rank,
    under_torchrun,
)
from ddg_gpu.execute import run_serial, timeline
from ddg_gpu.job import Job, Network, make_stage, network, num_iterations, num_samples
from ddg_gpu.processes import Progress, keep_freed_memory
from ddg_gpu.stage import Stage
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
        timeline: what ran when.
        cuts: first layers of stages 1..K-1.
    """

    job: Job
    model: nn.Sequential
    losses: tuple[float, ...]
    test_accuracy: float
    timeline: Timeline
    cuts: tuple[int, ...]

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
) -> Run | None:
    """Train a network; every sample that is fed is also applied, by every stage.

    Args:
        job: what to train.
        dataset: the data.
        executor: "serial" (this process, the reference) or "distributed" (a process per stage).
        timeout: seconds that a worker may wait for another.
        port: TCP port on which distributed workers meet; None takes a free one.
        progress: called with (samples finished, samples in all).

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
    if executor == "serial":
        return _train_serial(job, dataset, progress)
    require_processes(job.schedule())
    _stages(job, dataset)  # a wrong argument shows here, not in K processes
    if under_torchrun():
        outcomes = run_rank(job, dataset, timeout)
        return None if outcomes is None else _assemble(job, dataset, outcomes)
    return _assemble(job, dataset, run_processes(job, dataset, timeout, port, progress))


def _train_serial(job: Job, dataset: Dataset, progress: Progress) -> Run:
    parts, stages = _stages(job, dataset)
    batches = Batches(dataset, job.batch_size, job.seed)
    total = num_samples(job, batches)
    with one_thread():
        measured = run_serial(
            job.schedule(),
            stages,
            batches,
            num_iterations(job, batches),
            on_sample=lambda sample: progress(sample + 1, total),
        )
    losses = tuple(loss for _, loss in sorted(stages[-1].losses.items()))
    accuracy = evaluate(parts.model, dataset)
    return Run(job, parts.model, losses, accuracy, measured, parts.cuts)


def _stages(job: Job, dataset: Dataset) -> tuple[Network, list[Stage]]:
    """The network and its trainable stages, after all checks of the job."""
    num_samples(job, Batches(dataset, job.batch_size, job.seed))
    schedule, parts = job.schedule(), network(job, dataset)
    stages = [make_stage(job, schedule, parts, k) for k in range(job.stages)]
    for stage in stages:
        stage.tie(dict(enumerate(stages)))
    return parts, stages


def _assemble(job: Job, dataset: Dataset, outcomes: Sequence[WorkerOutcome]) -> Run:
    """The whole model again, from what the workers hand back."""
    parts = network(replace(job, load=None), dataset)  # that file may be another by now
    parts.model.load_state_dict(
        {name: tensor for outcome in outcomes for name, tensor in outcome.weights.items()}
    )
    total = num_iterations(job, Batches(dataset, job.batch_size, job.seed))
    spans = [
        [(parse_op(text), start, end) for text, start, end in outcome.spans] for outcome in outcomes
    ]
    losses = tuple(loss for outcome in outcomes for _, loss in outcome.losses)
    accuracy = evaluate(parts.model, dataset)
    measured = timeline(job.schedule(), total, spans)
    return Run(job, parts.model, losses, accuracy, measured, parts.cuts)


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
