"""A check in a process of its own, which may raise, hang or crash without harm to the next one.

What the check finds out goes line by line into a file, at once, so that it outlives its finder.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, TextIO, get_args

Status = Literal["ok", "no", "failed", "timed out", "skipped"]
STATUSES: tuple[str, ...] = get_args(Status)

#: A check's way to say what it found: (name, anything that JSON has); a later value replaces one.
Record = Callable[[str, Any], None]

#: What the process runs. Not "-m", which would load this module a second time, as another one.
CHILD = "import sys; from ddg_gpu.isolated import answer; answer(sys.argv[1:])"
#: Seconds for a killed process to be gone; one that hangs in the driver may never be.
GRACE = 10.0
#: How many lines of an error are kept, and how many characters of each.
LINES, WIDTH = 12, 300


class RefutedError(Exception):
    """What was asked is not so on this machine: an answer, not a failure of the check."""


@dataclass(frozen=True, slots=True)
class Check:
    """One assumption about the machine.

    Args:
        name: short, and the name of what it decides.
        question: in words.
        function: "module:name" of what finds out: (stages, record) -> None. It returns if the
            assumption holds, and raises `RefutedError` if not.
        yes: what later code may then use.
        no: what it uses otherwise, whatever the reason.
        needs: the check is pointless if one of these said no.
    """

    name: str
    question: str
    function: str
    yes: str = "yes"
    no: str = "no"
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a check.

    Args:
        status: "failed" if it raised or crashed, "no" if the answer is no.
        use: what later code uses: the check's ``yes`` if the status is "ok", else its ``no``.
        seconds: that it took.
        figures: what it recorded, also before it failed.
        error: the reason, first lines first.
    """

    status: Status
    use: str
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    error: tuple[str, ...] = ()


def run_check(check: Check, stages: Sequence[int], limit: float) -> Result:
    """Run a check in a new process and wait at most ``limit`` seconds for it."""
    began = perf_counter()
    with tempfile.TemporaryDirectory(prefix="ddg-", ignore_cleanup_errors=True) as folder:
        report, output = Path(folder) / "report", Path(folder) / "output"
        command = [sys.executable, "-X", "faulthandler", "-c", CHILD]
        command += [check.function, str(report), str(limit), *map(str, stages)]
        with output.open("wb") as stream:
            # A session of its own, so that what it starts can be ended with it.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            code: int | None = None
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(limit)
            finally:
                gone = _end(process)
        figures, end = _read(report)
        said = _first_lines(output.read_text(errors="replace"))
    status, error = _verdict(code, end, said, limit)
    if not gone:
        error = (f"process {process.pid} cannot be killed; what follows is beside it", *error)
    use = check.yes if status == "ok" else check.no
    return Result(status, use, perf_counter() - began, figures, error)


def _end(process: subprocess.Popen[bytes]) -> bool:
    """Kill a process and what it started; False if it is still there after a while."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    return process.returncode is not None


def _read(report: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The figures and the last word of a check, None if it had none; a torn line counts as none."""
    figures: dict[str, Any] = {}
    with contextlib.suppress(OSError):
        for line in report.read_text(errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and entry.get("status") in ("ok", "no", "failed"):
                return figures, entry
            if isinstance(entry, dict) and "figure" in entry:
                figures[str(entry["figure"])] = entry.get("value")
    return figures, None


def _verdict(
    code: int | None, end: dict[str, Any] | None, said: tuple[str, ...], limit: float
) -> tuple[Status, tuple[str, ...]]:
    if code is None:
        return "timed out", (f"not finished after {limit:g} s", *said)
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return "failed", (f"killed by {name}", *said)
    if end is None or code:
        return "failed", (f"ended with exit code {code} and no result", *said)
    return end["status"], _first_lines(str(end.get("error", "")))


def _first_lines(text: str) -> tuple[str, ...]:
    lines = [line.rstrip()[:WIDTH] for line in text.splitlines() if line.strip()]
    return tuple(lines[:LINES])


def _last_word(
    function: Callable[[list[int], Record], object], stages: list[int], out: TextIO
) -> str:
    """Run a check's function; the JSON of its last word."""

    def write(entry: dict[str, Any]) -> None:
        out.write(json.dumps(entry, allow_nan=False) + "\n")
        out.flush()

    try:
        returned = function(stages, lambda name, value: write({"figure": name, "value": value}))
        if returned is not None:
            raise TypeError(f"a check returns None and records its figures, got {returned!r}")
    except RefutedError as reason:
        return json.dumps({"status": "no", "error": str(reason)})
    except BaseException as error:  # whatever it is, the parent is to read it
        return json.dumps({"status": "failed", "error": f"{type(error).__name__}: {error}"})
    return json.dumps({"status": "ok"})


def answer(arguments: list[str]) -> None:
    """Run a check in this process, write its report, and end the process.

    Args:
        arguments: the function ("module:name"), the report's path, the limit, the stages.
    """
    function, report, limit, *stages = arguments
    # Says where it hangs, just before it is killed.
    faulthandler.dump_traceback_later(max(float(limit) - 1, float(limit) * 0.8))
    with open(report, "w", encoding="utf-8") as out:
        try:
            module, _, name = function.partition(":")
            found = getattr(importlib.import_module(module), name)
        except Exception as error:
            last = json.dumps({"status": "failed", "error": f"{type(error).__name__}: {error}"})
        else:
            last = _last_word(found, [int(count) for count in stages], out)
        out.write(last + "\n")
    # Not a return: CUDA's own tear-down may hang or crash, which would say nothing about the check.
    os._exit(0)
