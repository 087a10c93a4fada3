"""What a machine needs for messages and barriers, whatever the method: nothing of one is run."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from ddg_gpu.data import Dataset
from ddg_gpu.job import Job, Network, network
from ddg_gpu.processes import Report, run_together

#: How often computing with and without messages take turns.
TURNS = 4
#: Messages per link that are timed, and barriers.
MESSAGES = 10
#: Seconds of computing before a message; the waiting core has gone to sleep by then.
PAUSE = 0.03
#: Side of the square matrices that are multiplied in a unit of work, and such units per message.
SIDE, UNITS = 256, 8


@dataclass(frozen=True, slots=True)
class LinkTimes:
    """Seconds of one message.

    Args:
        transfer: from one worker's hands to the other's, beyond what the hosts do for it.
        host: by how much sending one and receiving one delays two workers that compute, in all.
    """

    transfer: float
    host: float


@dataclass(frozen=True, slots=True)
class Timing:
    """What was timed of a job's machine; seconds.

    Args:
        links: per link.
        barrier: from the last worker's coming to a barrier until all go on.
    """

    links: tuple[LinkTimes, ...]
    barrier: float


def time_machine(job: Job, dataset: Dataset) -> Timing:
    """Time the messages of a job's stages, and barriers.

    Args:
        job: what to time; its method does not matter.
        dataset: the data.

    Raises:
        ValueError: if the job cannot be run on the data.
        WorkerError: if a process fails.
    """
    return Timing(*_message_times(message_bytes(job, network(job, dataset))))


def message_bytes(job: Job, parts: Network) -> list[int]:
    """Bytes of the message over each link, for a full mini-batch of float32."""
    return [
        sum(
            job.batch_size * spec.shape.numel() * spec.dtype.itemsize
            for spec in (boundary if isinstance(boundary, tuple) else (boundary,))
        )
        for boundary in parts.boundaries
    ]


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _message_times(sizes: Sequence[int]) -> tuple[tuple[LinkTimes, ...], float]:
    """Times of a message over each link, and of a barrier, between two idle processes."""
    if not sizes:
        return (), 0.0
    first, second = run_together(_exchange, 2, {"sizes": list(sizes)})
    links = []
    for index in range(len(sizes)):
        whole = median(
            end - start
            for start, end in zip(first["began"][index], second["received"][index], strict=True)
        )
        # Each worker sends one and receives one while it computes.
        delays = [max(0.0, worker["delays"][index]) for worker in (first, second)]
        host = sum(delays) / 2
        links.append(LinkTimes(max(0.0, whole - host), host))
    both = zip(first["came"], first["left"], second["left"], strict=True)
    return tuple(links), median(max(left) - came for came, *left in both)


def _exchange(rank: int, given: dict[str, Any], _report: Report) -> dict[str, Any]:
    """Send messages from rank 0 to rank 1 as the executor does: the receive is posted ahead.

    The sender computes until it sends, the receiver waits idly, as a worker without work does.
    Then both compute, with and without messages both ways. Times are on the clock that all
    processes of a machine share.
    """
    peer = 1 - rank
    found: dict[str, Any] = {"came": [], "left": [], "began": [], "received": [], "delays": []}
    for size in given["sizes"]:
        began: list[float] = []
        received: list[float] = []
        for _ in range(MESSAGES):
            tensor = torch.ones(size // 4)  # as in training, of memory just allocated
            if rank == 0:
                dist.barrier()
                _spin(PAUSE)
                began.append(perf_counter())
                send: Any = dist.isend(tensor, peer)
                send.wait()
            else:
                receive: Any = dist.irecv(tensor, peer)
                dist.barrier()  # the receive is posted before anything is sent
                receive.wait()
                received.append(perf_counter())
        found["began"].append(began)
        found["received"].append(received)
        quiet, busy = [], []
        for _ in range(TURNS):
            quiet.append(_computing(peer, size // 4, 0))
            busy.append(_computing(peer, size // 4, size))
        found["delays"].append(median(busy) - median(quiet))
    for _ in range(MESSAGES):
        dist.barrier()
        if rank == 0:
            _spin(PAUSE)  # so it comes last
        found["came"].append(perf_counter())
        dist.barrier()
        found["left"].append(perf_counter())
    return found


def _computing(peer: int, ones: int, size: int) -> float:
    """Seconds of a unit of work, with a message of ``size`` bytes each way for each, if not 0.

    A tensor of ``ones`` is made for each, sent or not. As in the executor, receives are posted
    ahead, and what comes is wanted a unit later.
    """
    matrix = torch.rand(SIDE, SIDE)
    coming: deque[Any] = deque()
    going: deque[Any] = deque()

    def post() -> None:
        tensor = torch.empty(size // 4)
        coming.append((dist.irecv(tensor, peer), tensor))

    for _ in range(2 if size else 0):
        post()
    dist.barrier()
    start = perf_counter()
    for unit in range(MESSAGES):
        for _ in range(UNITS):
            matrix = (matrix @ matrix).clamp_(0.0, 1.0)
        tensor = torch.ones(ones)  # in training, computing it is part of an operation
        if size:
            going.append((dist.isend(tensor, peer), tensor))
            if unit:
                coming.popleft()[0].wait()
                post()
            if len(going) > 2:
                going.popleft()[0].wait()
    seconds = (perf_counter() - start) / MESSAGES
    # What is left must come before the process group is used for anything else.
    for unit in range(2 if size else 0):
        if unit:
            tensor = torch.ones(size // 4)
            going.append((dist.isend(tensor, peer), tensor))
        coming.popleft()[0].wait()
    while going:
        going.popleft()[0].wait()
    return seconds


def _spin(seconds: float) -> None:
    end = perf_counter() + seconds
    while perf_counter() < end:
        pass
