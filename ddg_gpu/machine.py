"""What a machine does to stages: how they slow each other down, messages and barriers.

Timed once for all methods, with passes of backpropagation: nothing of a method is run.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ddg_gpu.data import Batches, Dataset
from ddg_gpu.distributed import dataset_values
from ddg_gpu.job import Job, Network, make_stage, network
from ddg_gpu.processes import Report, run_together
from ddg_sim.contention import Slowdown
from ddg_sim.schedule import Op, OpKind

#: Rounds of passes that are run before anything is timed (allocators and caches settle).
WARM_UP = 3
#: Seconds of passes in a row that are timed, for the influence of others.
BESIDE = 0.04
#: Most passes in one of these; all are kept until their backward pass.
MOST = 50
#: Messages per link that are timed, and barriers.
MESSAGES = 10
#: Seconds of computing before a message; the waiting core has gone to sleep by then.
PAUSE = 0.03
PASSES = (OpKind.FORWARD, OpKind.BACKWARD)


@dataclass(frozen=True, slots=True)
class LinkTimes:
    """Seconds of one message.

    Args:
        transfer: from one worker's hands to the other's, beyond what the hosts do for it.
        host: what a worker's own thread spends on sending one message and receiving one.
    """

    transfer: float
    host: float


@dataclass(frozen=True, slots=True)
class Timing:
    """What was timed of a job's machine, beyond the operations of single methods; seconds.

    Args:
        contention: per stage, how many times longer an operation of its own takes while others
            run one (own kind, their kind), and after waiting for theirs (own kind, None).
        links: per link.
        barrier: from the last worker's coming to a barrier until all go on.
    """

    contention: tuple[Slowdown, ...]
    links: tuple[LinkTimes, ...]
    barrier: float


def time_machine(job: Job, dataset: Dataset) -> Timing:
    """Time what a job's stages do to each other, its messages and barriers.

    Args:
        job: what to time; its method does not matter.
        dataset: the data.

    Raises:
        ValueError: if the job cannot be run on the data.
        WorkerError: if a process fails.
    """
    bp = replace(job, method="bp", sync=None, semantics=None, options={})
    if job.stages == 1:
        return Timing(({},), (), 0.0)
    found = run_together(partial(_influences, bp), job.stages, dataset_values(dataset))
    links, barrier = _message_times(message_bytes(job, network(job, dataset)))
    contention: list[Slowdown] = [
        {
            (own, other): factor
            for own, row in zip(PASSES, stage["factors"], strict=True)
            for other, factor in zip((*PASSES, None), row, strict=True)
        }
        for stage in found
    ]
    return Timing(tuple(contention), links, barrier)


def message_bytes(job: Job, parts: Network) -> list[int]:
    """Bytes of the message over each link, for a full mini-batch of float32."""
    return [4 * job.batch_size * shape.numel() for shape in parts.boundaries]


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Passes:
    """One stage that runs passes of backpropagation on stand-ins of the right shapes."""

    def __init__(self, job: Job, dataset: Dataset, rank: int) -> None:
        parts = network(job, dataset)
        batches = Batches(dataset, job.batch_size, job.seed)
        self._rank = rank
        self._stage = make_stage(job, job.schedule(), parts, rank)
        self._inputs = batches.inputs(0)
        if rank > 0:
            self._inputs = torch.randn(job.batch_size, *parts.boundaries[rank - 1])
        self._targets = batches.targets(0)
        self._error: Tensor | None = None
        if rank < job.stages - 1:
            self._error = 1e-3 * torch.randn(job.batch_size, *parts.boundaries[rank])
        self._samples = self._updates = 0
        self._waiting: list[int] = []  # samples that had no backward pass yet

    def run(self, kind: OpKind, count: int = 1) -> float:
        """Run so many forward or backward passes; returns their seconds."""
        start = perf_counter()
        for _ in range(count):
            if kind is OpKind.FORWARD:
                self._stage.forward(self._op(kind, self._samples), self._inputs, self._targets)
                self._waiting.append(self._samples)
                self._samples += 1
            else:
                self._stage.backward(self._op(kind, self._waiting.pop()), self._error)
        return perf_counter() - start

    def finish(self) -> None:
        """Run the backward passes that are due, and an update."""
        self.run(OpKind.BACKWARD, len(self._waiting))
        self._updates += 1
        self._stage.update(self._op(OpKind.UPDATE, self._samples))

    def _op(self, kind: OpKind, sample: int) -> Op:
        return Op(kind, self._rank, sample, sample, self._updates)


def _influences(job: Job, rank: int, given: dict[str, Any], _report: Report) -> dict[str, Any]:
    """How many times longer a stage's passes take beside others', and after a wait.

    Each stage in turn runs passes in a row: alone, and while as many others as there are cores for
    run forward, or backward, passes. Then one pass at a time, when all others have had one.

    Returns per kind of pass the factors of others' forward and backward passes and of the wait.
    """
    passes = _Passes(job, Dataset(**given), rank)
    for _ in range(WARM_UP):
        passes.run(OpKind.FORWARD)
        passes.finish()
    passes.run(OpKind.FORWARD)
    count = {
        kind: min(MOST, max(2, round(BESIDE / max(passes.run(kind), 1e-6)))) for kind in PASSES
    }
    others = range(1, min(job.stages, available_cores()))
    seconds: dict[tuple[OpKind, OpKind | None], float] = {}
    alone: dict[OpKind, float] = {}
    for first in range(job.stages):
        beside = [(first + further) % job.stages for further in others]
        for kind in PASSES:
            for other in (None, *PASSES):
                run = kind if rank == first else other if rank in beside else None
                found = _in_a_row(passes, run, count[run] if run else 0)
                if rank == first and other is None:
                    alone[kind] = found
                elif rank == first:
                    seconds[kind, other] = found
    most = torch.tensor(max(count.values()))
    dist.all_reduce(most, dist.ReduceOp.MAX)  # all take part in all turns
    times = int(most)
    busy: dict[OpKind, list[float]] = defaultdict(list)
    for turn in range(job.stages):
        dist.barrier()
        for each in range(times + 1 if turn == rank else 0):
            for kind in PASSES:
                seconds_of_one = passes.run(kind)
                if each:  # the first ones come after the barrier's wait
                    busy[kind].append(seconds_of_one)
    after: dict[OpKind, list[float]] = defaultdict(list)
    for _ in range(times):
        for kind, ranks in zip(PASSES, (range(job.stages), range(job.stages)[::-1]), strict=True):
            for turn in ranks:
                dist.barrier()
                if turn == rank:
                    after[kind].append(passes.run(kind))
    for kind in PASSES:
        seconds[kind, None] = alone[kind] * median(after[kind]) / median(busy[kind])
    return {
        "factors": [
            [
                max(1.0, seconds.get((kind, other), alone[kind]) / alone[kind])
                for other in (*PASSES, None)
            ]
            for kind in PASSES
        ]
    }


def _in_a_row(passes: _Passes, kind: OpKind | None, count: int) -> float:
    """Seconds of one pass of a row that begins when all are here; without a kind, wait only.

    It goes on after what counts: whoever is beside must not find itself alone.
    """
    whole = 2 * count + 1
    if kind is OpKind.BACKWARD:
        passes.run(OpKind.FORWARD, whole)
    dist.barrier()
    if kind is None:
        return 0.0
    passes.run(kind)  # the first one comes after the barrier's wait
    seconds = passes.run(kind, count) / count
    passes.run(kind, whole - 1 - count)
    passes.finish()
    return seconds


def _message_times(sizes: Sequence[int]) -> tuple[tuple[LinkTimes, ...], float]:
    """Times of a message over each link, and of a barrier, between two idle processes."""
    if not sizes:
        return (), 0.0
    first, second = run_together(_exchange, 2, {"sizes": list(sizes)})
    links = tuple(
        LinkTimes(
            # A short message is there before the sender's call returns.
            transfer=max(0.0, median(b - a for a, b in zip(sent, received, strict=True))),
            host=median(sending) + median(receiving),
        )
        for sent, received, sending, receiving in zip(
            first["sent"], second["received"], first["sending"], second["receiving"], strict=True
        )
    )
    both = zip(first["came"], first["left"], second["left"], strict=True)
    return links, median(max(left) - came for came, *left in both)


def _exchange(rank: int, given: dict[str, Any], _report: Report) -> dict[str, Any]:
    """Send messages from rank 0 to rank 1 as the executor does: the receive is posted ahead.

    The sender computes until it sends. The receiver waits idly, as a worker without work does; in
    a second round it computes while the message comes, so that only the host's part is left.
    Times are on the clock that all processes of a machine share.
    """
    found: dict[str, Any] = {
        key: [] for key in ("sent", "sending", "received", "receiving", "came", "left")
    }
    for size in given["sizes"]:
        peer = 1 - rank
        for key in ("sent", "sending", "received", "receiving"):
            found[key].append([])
        for receiver_computes in (False, True):
            for _ in range(MESSAGES):
                tensor = torch.ones(size // 4)  # as in training, of memory just allocated
                if rank == 0:
                    dist.barrier()
                    _spin(PAUSE)
                    start = perf_counter()
                    send: Any = dist.isend(tensor, peer)
                    end = perf_counter()
                    send.wait()
                    if not receiver_computes:
                        found["sent"][-1].append(end)
                        found["sending"][-1].append(end - start)
                else:
                    receive: Any = dist.irecv(tensor, peer)
                    dist.barrier()  # the receive is posted before anything is sent
                    if receiver_computes:
                        _spin(3 * PAUSE)
                    start = perf_counter()
                    receive.wait()
                    end = perf_counter()
                    if receiver_computes:
                        found["receiving"][-1].append(end - start)
                    else:
                        found["received"][-1].append(end)
    for _ in range(MESSAGES):
        dist.barrier()
        if rank == 0:
            _spin(PAUSE)  # so it comes last
        found["came"].append(perf_counter())
        dist.barrier()
        found["left"].append(perf_counter())
    return found


def _spin(seconds: float) -> None:
    end = perf_counter() + seconds
    while perf_counter() < end:
        pass
