"""Checks that do what hardware may do to the real ones; processes import this by its name."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

from ddg_gpu.isolated import Record, RefutedError


def fine(stages: list[int], record: Record) -> None:
    record("stages", stages)
    record("pid", os.getpid())


def refuted(stages: list[int], record: Record) -> None:
    record("ratio", 1.9)
    raise RefutedError("1.9 times as long")


def raises(stages: list[int], record: Record) -> None:
    record("before", 1)
    raise RuntimeError("CUDA error: an illegal memory access\nCompile with DSA")


def hangs(stages: list[int], record: Record) -> None:
    record("before", 1)
    Path(os.environ["FAKE_CHILD"]).write_text(str(os.getpid()))
    if os.fork() == 0:  # what it starts must end with it
        Path(os.environ["FAKE_CHILD"]).write_text(str(os.getpid()))
    time.sleep(600)


def segfaults(stages: list[int], record: Record) -> None:
    record("before", 1)
    ctypes.string_at(0)


def exits(stages: list[int], record: Record) -> None:
    os._exit(0)


def exits_badly(stages: list[int], record: Record) -> None:
    print("the driver says goodbye")
    os.sys.stdout.flush()
    os._exit(7)


def leaves(stages: list[int], record: Record) -> None:
    raise SystemExit(0)


def nonsense(stages: list[int], record: Record) -> str:
    record("before", 1)
    return "looks good"


def no_json(stages: list[int], record: Record) -> None:
    record("before", 1)
    record("bandwidth", float("nan"))
