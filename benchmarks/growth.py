"""Do long runs need more and more memory, or file handles?

    python benchmarks/growth.py --iterations 10000

Trains a small network for many iterations and looks at every process twice: after a tenth of them,
and at the end. What may grow is the record of the run (a span per operation, a loss per sample);
its bytes are found by making as many spans and losses under `tracemalloc`. Whatever the resident
memory grows beyond that, more than ``--limit``, is a failure (exit code 1), and so is one more file
handle or one more living tensor.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tracemalloc
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from environment import environment
from torch import Tensor

from ddg_gpu.data import Batches, Dataset, load
from ddg_gpu.distributed import dataset_values, run_stages
from ddg_gpu.execute import run_serial
from ddg_gpu.job import Job, make_stage, network
from ddg_gpu.messages import message_buffer
from ddg_gpu.processes import Report, run_together
from ddg_gpu.stage import Stage
from ddg_gpu.train import one_thread
from ddg_sim.methods import Semantics
from ddg_sim.schedule import Schedule

MIB = 2**20
GRAIN = 16  # bytes to whose multiples Python's allocator rounds
#: Run in one process; the first of them also with a process per stage.
METHODS = ["ddg", "ddg/current", "fr", "gpipe"]


@dataclass(frozen=True, slots=True)
class Size:
    """What a process holds: resident bytes, file handles, and tensors that Python knows of."""

    resident: int
    handles: int
    tensors: int

    @classmethod
    def now(cls) -> Size:
        """Look at this process (Linux)."""
        gc.collect()
        # First, for the list of all objects takes memory that the process keeps.
        tensors = sum(issubclass(type(item), Tensor) for item in gc.get_objects())
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        handles = len(os.listdir("/proc/self/fd"))
        return cls(pages * os.sysconf("SC_PAGE_SIZE"), handles, tensors)


class Watched:
    """Mini-batches that look at the process when certain ones are asked for."""

    def __init__(self, batches: Any, at: tuple[int, ...]) -> None:
        self._batches, self._at = batches, at
        self.found: dict[int, Size] = {}

    def inputs(self, sample: int) -> Tensor:
        """Inputs of a sample."""
        self._look(sample)
        inputs: Tensor = self._batches.inputs(sample)
        return inputs

    def targets(self, sample: int) -> Tensor:
        """Labels of a sample."""
        self._look(sample)
        targets: Tensor = self._batches.targets(sample)
        return targets

    def _look(self, sample: int) -> None:
        if sample in self._at and sample not in self.found:
            self.found[sample] = Size.now()


def record_bytes(
    schedule: Schedule, workers: list[int], iterations: int, losses: bool = True
) -> int:
    """Bytes of spans and losses of so many iterations of some workers."""
    tracemalloc.start()
    try:
        spans = [
            [(op, perf_counter(), perf_counter()) for op in schedule.program(worker, iterations)]
            for worker in workers
        ]
        samples = range(iterations * schedule.samples_per_iteration)
        kept = {sample: sample + 0.5 for sample in samples} if losses else {}
        traces = tracemalloc.take_snapshot().traces
        del spans, kept
        return sum(-(-trace.size // GRAIN) * GRAIN for trace in traces)
    finally:
        tracemalloc.stop()


def job_of(text: str, options: argparse.Namespace) -> Job:
    """The job of ``METHOD`` or ``METHOD/SEMANTICS``."""
    name, _, semantics = text.partition("/")
    return Job(
        name,
        2,
        options.model,
        iterations=options.iterations,
        batch_size=options.batch_size,
        semantics=Semantics(semantics) if semantics else None,
        learning_rate=1e-3,
    )


def marks(schedule: Schedule, iterations: int) -> tuple[int, int]:
    """Samples at which to look: after a tenth of the iterations, and in the last one."""
    m = schedule.samples_per_iteration
    return m * (iterations // 10), m * (iterations - 1)


def serially(job: Job, rank: int, given: dict[str, Any], report: Report) -> dict[str, Any]:
    """Run all stages in one process, which nothing ran in before."""
    dataset = Dataset(**given["dataset"])
    schedule, parts = job.schedule(), network(job, dataset)
    assert job.iterations is not None
    stages = [make_stage(job, schedule, parts, k) for k in range(job.stages)]
    watched = Watched(Batches(dataset, job.batch_size, job.seed), marks(schedule, job.iterations))
    with one_thread():
        run_serial(schedule, stages, watched, job.iterations)
    return {"found": [(s.resident, s.handles, s.tensors) for s in watched.found.values()]}


def task(job: Job, rank: int, given: dict[str, Any], report: Report) -> dict[str, Any]:
    """Run one worker in its own process."""
    dataset = Dataset(**given["dataset"])
    schedule, parts = job.schedule(), network(job, dataset)
    assert job.iterations is not None
    batches = Batches(dataset, job.batch_size, job.seed)
    watched = Watched(batches, marks(schedule, job.iterations))
    stages: dict[int, Stage] = {rank: make_stage(job, schedule, parts, rank)}
    buffer = message_buffer(schedule, parts.boundaries, batches.size)
    run_stages(schedule, rank, stages, watched, buffer, job.iterations, timeout=600.0)
    return {"found": [(s.resident, s.handles, s.tensors) for s in watched.found.values()]}


def main() -> None:
    """Run everything, print the table, exit with 1 if anything grew."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--iterations", type=int, default=10_000)
    parser.add_argument("--model", default="mlp")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--limit", type=float, default=1.0, help="MiB")
    options = parser.parse_args()
    if not Path("/proc/self/statm").exists():
        parser.error("needs /proc/self/statm (Linux)")
    if options.iterations < 100:
        parser.error(f"--iterations must be at least 100, got {options.iterations}")
    dataset = load("digits")
    print(environment())
    print(
        f"| {options.model}, digits, K=2 | resident MiB at {options.iterations // 10:,}"
        f" | at {options.iterations:,} | bytes of records per iteration"
        " | growth beyond records, MiB | handles | tensors |"
    )
    print("|---|---|---|---|---|---|---|")
    failed = False
    given = {"dataset": dataset_values(dataset)}
    for number, text in enumerate(options.methods):
        job = job_of(text, options)
        schedule, span = job.schedule(), options.iterations - options.iterations // 10
        for kind, processes in ((task, 2), (serially, 1)) if number == 0 else ((serially, 1),):
            found = run_together(partial(kind, job), processes, given, timeout=600.0)
            for rank, result in enumerate(found):
                first, last = (Size(*values) for values in result["found"])
                workers = [rank] if processes > 1 else [0, 1]
                needs = record_bytes(schedule, workers, span, losses=1 in workers)
                name = f"{text}, process {rank}" if processes > 1 else f"{text}, serial"
                beyond = (last.resident - first.resident - needs) / MIB
                grew = (
                    beyond > options.limit
                    or last.handles > first.handles
                    or last.tensors > first.tensors
                )
                failed = failed or grew
                print(
                    f"| {name}{' **grows**' if grew else ''} | {first.resident / MIB:.1f}"
                    f" | {last.resident / MIB:.1f} | {needs / span:.0f} | {beyond:+.2f}"
                    f" | {first.handles} → {last.handles} | {first.tensors} → {last.tensors} |",
                    flush=True,
                )
    if failed:
        print("memory, handles or tensors grow", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
