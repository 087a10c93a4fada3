"""Checks of where kernels run: partitions that share no multiprocessor, eager and in graphs."""

from __future__ import annotations

from functools import partial

import torch

from ddg_gpu.cuda_partitions import (
    CudaCallError,
    PartitionsUnavailableError,
    call,
    load_driver,
    sm_resource,
)
from ddg_gpu.cuda_timing import capture, each_split, start
from ddg_gpu.isolated import Record, RefutedError
from ddg_gpu.smid import Launch, smid_kernel

#: Blocks per multiprocessor and cycles of each, so that every multiprocessor gets some.
BLOCKS, CYCLES = 16, 20000


def partitions(stages: list[int], record: Record) -> None:
    """Sizes granted, then by a kernel that records %smid: no SM is seen by two partitions."""
    start()
    try:
        driver, origin = load_driver()
        record("driver functions", origin)
        whole = sm_resource(driver, call(driver, "cuDeviceGet", 0)).sm
        record("SMs", int(whole.smCount))
        record("smallest partition", getattr(whole, "minSmPartitionSize", None))
        record("alignment", getattr(whole, "smCoscheduledAlignment", None))
        each_split(stages, record, lambda count, streams: None)
    except (PartitionsUnavailableError, CudaCallError) as error:
        raise RefutedError(str(error)) from error
    launch, way = smid_kernel()
    record("kernel compiled by", way)
    # The control: without partitions the same kernel must run on more SMs than on any of them.
    everywhere = _seen([torch.cuda.Stream()], launch)[0]
    record("SMs seen without partitions", everywhere)

    def find(count: int, streams: list[torch.cuda.Stream]) -> None:
        seen = _seen(streams, launch)
        record(f"SMs seen at {count}", seen)
        apart(seen, everywhere)

    each_split(stages, record, find)


def graph_partitions(stages: list[int], record: Record) -> None:
    """The same kernel inside of a graph, replayed on its own stream and on a plain one."""
    start()
    launch, way = smid_kernel()
    record("kernel compiled by", way)
    everywhere = _seen([torch.cuda.Stream()], launch)[0]

    def find(count: int, streams: list[torch.cuda.Stream]) -> None:
        outputs = [_blank() for _ in streams]
        loads = [
            capture(stream, partial(launch, output, CYCLES))
            for stream, output in zip(streams, outputs, strict=True)
        ]
        found = {}
        for where in ("its own stream", "a plain stream"):
            for output in outputs:
                output.fill_(-1)
            torch.cuda.synchronize()
            for load in loads:
                if where == "its own stream":
                    load.replay()
                else:
                    load.graph.replay()
            torch.cuda.synchronize()
            found[where] = [_distinct(output) for output in outputs]
            record(f"SMs seen at {count}, replayed on {where}", found[where])
        apart(found["its own stream"], everywhere)

    each_split(stages, record, find)


def _blank() -> torch.Tensor:
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    return torch.full((BLOCKS * sms,), -1, dtype=torch.int32, device="cuda")


def _seen(streams: list[torch.cuda.Stream], launch: Launch) -> list[list[int]]:
    """On which SMs the kernel runs, started on all streams at once."""
    outputs = [_blank() for _ in streams]
    torch.cuda.synchronize()
    for stream, output in zip(streams, outputs, strict=True):
        with torch.cuda.stream(stream):
            launch(output, CYCLES)
    torch.cuda.synchronize()
    return [_distinct(output) for output in outputs]


def _distinct(output: torch.Tensor) -> list[int]:
    found = sorted(set(output.tolist()))
    if found[0] < 0:
        raise RuntimeError("some blocks of the kernel wrote nothing")
    return found


def apart(seen: list[list[int]], everywhere: list[int]) -> None:
    """Check that no two partitions share an SM, and that none is the whole device.

    Args:
        seen: on which SMs each partition's kernel ran.
        everywhere: the same without partitions.

    Raises:
        RefutedError: naming the partitions and what they share.

    >>> apart([[0, 1], [2, 3]], [0, 1, 2, 3])
    >>> apart([[0, 1], [1, 2]], [0, 1, 2, 3])
    Traceback (most recent call last):
    ...
    ddg_gpu.isolated.RefutedError: partitions 0 and 1 share the SMs [1]
    """
    for k, part in enumerate(seen):
        for other in range(k):
            if shared := sorted(set(part) & set(seen[other])):
                raise RefutedError(f"partitions {other} and {k} share the SMs {shared}")
        if len(part) >= len(everywhere):
            raise RefutedError(f"partition {k} is not kept: its kernel ran on {len(part)} SMs")
