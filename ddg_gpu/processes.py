"""Processes on this machine that work together: start, watch, and end them in bounded time.

Whoever fails first is reported, and ends everybody.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
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
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from ddg_gpu import checkpoint
from ddg_gpu.transport import PeerLostError

#: Called with (steps finished, steps in all).
Progress = Callable[[int, int], None]
#: Called with the number of steps finished.
Report = Callable[[int], None]
#: What a process does: (rank, what it was given, report) -> what it hands back.
Task = Callable[[int, Any, Report], dict[str, Any]]

#: Seconds for the others to say why they failed, once one has.
GRACE = 2.0


class WorkerError(RuntimeError):
    """A worker raised or was killed; the message names the first cause."""


def run_together(
    task: Task,
    workers: int,
    given: dict[str, Any],
    *,
    timeout: float = 120.0,
    port: int | None = None,
    steps: int = 0,
    progress: Progress = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Run ``task`` in new processes that share a gloo process group.

    A script that calls this needs the usual ``if __name__ == "__main__":`` guard, as the processes
    import it.

    Args:
        task: a module-level function; it gets its rank, ``given``, and a function to report steps.
        workers: number of processes.
        given: tensors and plain values for the task; tensors are mapped from a file, not copied.
        timeout: seconds that any wait for another worker may last.
        port: TCP port on which the workers meet; None takes a free one.
        steps: number of steps, for ``progress`` only.
        progress: called with (steps finished, steps in all) about twice a second.

    Returns:
        What each worker handed back (tensors and plain values), by rank.

    Raises:
        ValueError: if the port cannot be used.
        WorkerError: naming the first worker that failed, and why.
    """
    store = _serve(port, timeout)
    context = _context()
    with tempfile.TemporaryDirectory(prefix="ddg-") as name:
        folder = Path(name)
        checkpoint.write_atomically(given, folder / "given.pt")
        processes = [
            context.Process(  # type: ignore[attr-defined]
                target=_process,
                args=(task, rank, workers, name, store.port, timeout),
                daemon=True,
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
                    break
                progress(store.add("done", 0), steps)
            if any(process.exitcode for process in processes):
                raise WorkerError(_first_cause(processes, folder))
        finally:
            _end(processes)
        return [_load(folder / f"worker-{rank}.pt") for rank in range(workers)]


def keep_freed_memory() -> None:
    """Make the C library keep the memory of freed tensors instead of returning it to the system.

    By default glibc returns large blocks at once, and every new activation is then mapped page by
    page: on small networks that is a tenth of the time, and most of the noise. Elsewhere than on
    glibc this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        mallopt(mmap_threshold, 32 * 2**20)  # the largest value that glibc takes
        mallopt(trim_threshold, 2**30)


def _serve(port: int | None, timeout: float) -> TCPStore:
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
    return TCPStore(
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
    context.set_forkserver_preload(
        ["ddg_gpu.distributed", "torch._dynamo", "torch.utils.flop_counter"]
    )
    return context


def _process(task: Task, rank: int, workers: int, folder: str, port: int, timeout: float) -> None:
    """Main function of a worker's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.set_num_threads(1)  # other thread counts give other bits
        keep_freed_memory()
        limit = timedelta(seconds=timeout)
        store = TCPStore("127.0.0.1", port, is_master=False, timeout=limit)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=workers, timeout=limit)
        result = task(rank, _load(Path(folder) / "given.pt"), _reporter(store, interval=0.3))
        checkpoint.write_atomically(result, Path(folder) / f"worker-{rank}.pt")
        dist.barrier()  # leave together: a socket that closes early would look like a failure
    except BaseException as error:
        report = {
            "consequence": isinstance(error, PeerLostError),
            "time": time.monotonic(),
            "message": str(error)
            if isinstance(error, PeerLostError)
            else f"{type(error).__name__}: {error}".strip(),
            "traceback": traceback.format_exc(),
        }
        (Path(folder) / f"error-{rank}.json").write_text(json.dumps(report))
        os._exit(1)  # at once: destructors of a broken process group may wait
    dist.destroy_process_group()


def _load(path: Path) -> dict[str, Any]:
    """Map a file into memory, so that a worker loads only what it touches."""
    content: dict[str, Any] = torch.load(path, weights_only=True, mmap=True)
    return content


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _reporter(store: Store, interval: float) -> Report:
    """Tell the parent how many steps are done, not more often than every ``interval`` seconds."""
    last, told = time.monotonic(), 0

    def report(done: int) -> None:
        nonlocal last, told
        if time.monotonic() - last > interval:
            store.add("done", done - told)
            last, told = time.monotonic(), done

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
            # If nobody failed by itself, the worker that was waited for is the one to name.
            text = f"worker {rank} {'' if found['consequence'] else 'failed: '}{found['message']}"
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
