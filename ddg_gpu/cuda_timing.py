"""Timing work on CUDA streams: captured graphs as loads, by events and by the clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import median
from time import perf_counter

import torch

from ddg_gpu.cuda_partitions import PartitionsUnavailableError, partitioned
from ddg_gpu.isolated import Record, RefutedError

#: Seconds that one replay of a load should last: launching it must not matter.
LOAD = 2e-3
#: Most units of work in one graph.
UNITS = 2000


def start() -> None:
    """Create the device's primary context, which partitions are derived from."""
    torch.cuda.init()
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()


def each_split(
    stages: Sequence[int],
    record: Record,
    find: Callable[[int, list[torch.cuda.Stream]], None],
) -> None:
    """Call ``find`` for each number of stages, with that many streams on partitions.

    What it captures must be its own locals: graphs have to go before their partitions do.

    Raises:
        RefutedError: after the last, if ``find`` raised it for any of them.
        PartitionsUnavailableError: if not one of the numbers can be had.
    """
    unavailable, refuted = [], []
    for count in stages:
        try:
            with partitioned(count) as made:
                record(f"SMs at {count}", [partition.sms for partition in made])
                try:
                    find(count, [partition.torch_stream() for partition in made])
                except RefutedError as error:
                    refuted.append(f"at {count}: {error}")
                except Exception as error:
                    # Now: giving partitions back in a broken context may end the process.
                    record(f"error at {count}", f"{type(error).__name__}: {error}")
                    raise
                torch.cuda.synchronize()
        except PartitionsUnavailableError as error:
            record(f"unavailable at {count}", str(error))
            unavailable.append(f"at {count}: {error}")
    if refuted:
        raise RefutedError("\n".join(refuted))
    if len(unavailable) == len(stages):
        raise PartitionsUnavailableError("\n".join(unavailable))


def on(stream: torch.cuda.Stream, work: Callable[[], object]) -> None:
    """Do something with ``stream`` as the current one."""
    with torch.cuda.stream(stream):
        work()


@dataclass(frozen=True, slots=True)
class Load:
    """Captured work and the stream it was captured on, which fixes where it runs."""

    graph: torch.cuda.CUDAGraph
    stream: torch.cuda.Stream

    def replay(self) -> None:
        """Queue it once more on its stream."""
        on(self.stream, self.graph.replay)


def capture(stream: torch.cuda.Stream, work: Callable[[], object], units: int = 1) -> Load:
    """A graph of ``work``, ``units`` times in a row, after a warm-up outside of it."""
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(units):
            work()
    torch.cuda.synchronize()
    return Load(graph, stream)


def load(stream: torch.cuda.Stream, work: Callable[[], object]) -> Load:
    """A graph of ``work``, so many times that a replay alone lasts about `LOAD` seconds."""
    once = median(event_times(capture(stream, work, 20), 5)) / 20
    return capture(stream, work, min(UNITS, max(1, ceil(LOAD / once))))


def event_times(work: Load, repeats: int) -> list[float]:
    """Seconds of each of so many replays, queued in a row, by events on its own stream."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    with torch.cuda.stream(work.stream):
        work.graph.replay()
        marks[0].record()
        for mark in marks[1:]:
            work.graph.replay()
            mark.record()
    marks[-1].synchronize()
    return [begin.elapsed_time(end) * 1e-3 for begin, end in zip(marks, marks[1:], strict=False)]


def wall_time(queue: Sequence[Callable[[], object]], repeats: int, rounds: int = 5) -> float:
    """Median seconds by the clock until all of ``repeats`` rounds of the queue are done.

    Args:
        queue: each puts work on a stream.
        repeats: how often they are called in turn.
        rounds: measurements, after one that does not count.
    """
    seconds = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        began = perf_counter()
        for _ in range(repeats):
            for put in queue:
                put()
        torch.cuda.synchronize()
        seconds.append(perf_counter() - began)
    return median(seconds[1:])


def beside(work: Load, others: Sequence[Load], repeats: int) -> tuple[list[float], bool]:
    """Seconds of each replay while others are replayed, and whether they were to the end.

    Loads are of about equal length, so the others get eight times as many replays, and first.
    """
    torch.cuda.synchronize()
    for _ in range(8 * repeats):
        for other in others:
            other.replay()
    ends = []
    for other in others:
        with torch.cuda.stream(other.stream):
            ends.append(torch.cuda.Event())
            ends[-1].record()
    times = event_times(work, repeats)
    busy = not any(end.query() for end in ends)
    torch.cuda.synchronize()
    return times, busy
