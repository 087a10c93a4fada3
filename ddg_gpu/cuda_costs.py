"""Checks of what work on partitions and streams costs: alone, together, and from one to another."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from ddg_gpu.cuda_timing import beside, each_split, event_times, load, on, start, wall_time
from ddg_gpu.isolated import Record, RefutedError

#: K loads at once may take this much longer than one alone and still count as concurrent.
CONCURRENT = 1.25
#: Two streams overlap if both take less than this many times the time of one; no overlap is 2.
OVERLAP = 1.5
#: Cycles for which a stream is held back until all that is to be timed is queued.
HOLD = 100_000_000
#: Side of the matrices of the compute-bound load.
SIDE = 512
#: Bytes of a transfer.
SIZES = (4 * 2**10, 2**20, 64 * 2**20)
#: Hops of a transfer that are timed, and those before them.
HOPS, BEFORE = 200, 20


def _compute() -> Callable[[], object]:
    """Compute-bound: a small matrix product, which stays in the L2 cache."""
    x, y = (torch.randn(SIDE, SIDE, device="cuda") for _ in range(2))
    out = torch.empty_like(x)
    return lambda: torch.mm(x, y, out=out)


def _memory() -> Callable[[], object]:
    """Memory-bound: several times the L2 cache, read and written."""
    cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 2**26
    x = torch.randn(cache, device="cuda")  # four bytes each
    return lambda: x.mul_(1.0)


def concurrency(stages: list[int], record: Record) -> None:
    """Seconds of K graphs together over the longest of them alone; one after another gives K."""
    start()

    def find(count: int, streams: list[torch.cuda.Stream]) -> None:
        loads = [load(stream, _compute()) for stream in streams]
        alone = [wall_time([work.replay], 20) for work in loads]
        together = wall_time([work.replay for work in loads], 20)
        ratio = together / max(alone)
        record(f"seconds alone at {count}", alone)
        record(f"seconds together at {count}", together)
        record(f"ratio at {count}", ratio)
        if ratio > CONCURRENT:
            raise RefutedError(
                f"together they take {ratio:.2f} times as long as one (limit {CONCURRENT})"
            )

    each_split(stages, record, find)


def interference(stages: list[int], record: Record) -> None:
    """A compute-bound and a memory-bound load on one partition, the others idle or busy."""
    start()
    kinds = {"compute": _compute, "memory": _memory}

    def find(count: int, streams: list[torch.cuda.Stream]) -> None:
        own = {kind: load(streams[0], work()) for kind, work in kinds.items()}
        others = {kind: [load(s, work()) for s in streams[1:]] for kind, work in kinds.items()}
        for kind, work in own.items():
            alone = median(event_times(work, 20))
            record(f"{kind} at {count}, seconds alone", alone)
            for other, neighbours in others.items():
                times, busy = beside(work, neighbours, 20)
                entry = {
                    "seconds": median(times),
                    "ratio": median(times) / alone,
                    "others busy to the end": busy,
                }
                record(f"{kind} at {count} beside {other}", entry)

    each_split(stages, record, find)


def transfers(stages: list[int], record: Record) -> None:
    """A tensor that goes to and fro: written on one partition, an event, read on the other."""
    start()

    def find(count: int, streams: list[torch.cuda.Stream]) -> None:
        for size in SIZES:
            seconds = _hops(streams, size)
            entry = {"seconds per hop": seconds, "bytes per second": size / seconds}
            record(f"{size} bytes at {count}", entry)

    each_split(stages, record, find)


def _hops(streams: list[torch.cuda.Stream], size: int) -> float:
    """Seconds of a hop between the first two streams: `HOPS` of them, queued before they begin."""
    # Hop h reads what hop h-1 wrote and writes its own number, h+1: a wait that is lost shows.
    buffers = [torch.zeros(size // 4, device="cuda") for _ in range(2)]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    with torch.cuda.stream(streams[0]):
        torch.cuda._sleep(HOLD)
    for hop in range(BEFORE + HOPS):
        if hop == BEFORE:
            begin.record(streams[0])
        with torch.cuda.stream(streams[hop % 2]):
            torch.add(buffers[hop % 2], 1, out=buffers[1 - hop % 2])
            written = torch.cuda.Event()
            written.record()
        streams[1 - hop % 2].wait_event(written)
    end.record(streams[0])  # an even number of hops: the first stream has waited for the last
    late = begin.query()
    torch.cuda.synchronize()
    if late:
        raise RuntimeError("hops began before all were queued, so their time would be the host's")
    if not bool((buffers[0] == BEFORE + HOPS).all()):
        raise RefutedError(f"{size} bytes: a partition read before the other had written")
    return float(begin.elapsed_time(end)) * 1e-3 / HOPS


def streams(stages: list[int], record: Record) -> None:
    """Work on two plain streams over the same work on one: 1 is overlap, 2 is none."""
    start()
    pair = [torch.cuda.Stream() for _ in range(2)]
    works = [_compute() for _ in pair]
    cases: dict[str, list[Callable[[], object]]] = {
        "a kernel that waits": [partial(on, s, partial(torch.cuda._sleep, 200_000)) for s in pair],
        "small eager kernels": [partial(on, s, w) for s, w in zip(pair, works, strict=True)],
        "graphs of small kernels": [load(s, w).replay for s, w in zip(pair, works, strict=True)],
    }
    ratios = {}
    for name, queue in cases.items():
        one, both = wall_time(queue[:1], 50), wall_time(queue, 50)
        ratios[name] = both / one
        record(name, {"one stream": one, "two streams": both, "ratio": both / one})
    if (ratio := ratios["small eager kernels"]) >= OVERLAP:
        raise RefutedError(
            f"small eager kernels on two streams take {ratio:.2f} times as long as on one "
            f"(limit {OVERLAP})"
        )
