"""The first command to run on a GPU: ``python -m ddg_gpu.first_contact``.

It checks, one by one and each in a process of its own, what is assumed about one GPU as K devices,
and writes what later code may use and what it must do without. It needs torch and the standard
library only, so a copy of the repository is enough.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from ddg_gpu.cuda_checks import CHECKS
from ddg_gpu.facts import Facts, write_facts
from ddg_gpu.isolated import Check, Result, run_check

#: The file that is written into the output folder.
NAME = "gpu_facts.json"
#: Exit codes: of a check that failed or timed out, of a user's mistake, of a machine without GPU.
FAILED, MISTAKE, NO_GPU = 1, 2, 3


def main(arguments: Sequence[str], out: TextIO, checks: Sequence[Check] = CHECKS) -> int:
    """Run the command.

    Args:
        arguments: those of the command line.
        out: the terminal.
        checks: in order; the first is whether there is a device.

    Returns:
        The exit code: 0 if all checks have an answer, which may be no; 1 if one failed or timed
        out; 2 for wrong arguments; 3 if there is no GPU, which is nobody's fault: nothing is
        written then.
    """
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
        folder = Path(options.output)
        if folder.exists() and not (folder.is_dir() and os.access(folder, os.W_OK)):
            parser.error(f"argument --output: {folder} is no folder that can be written to")
    except SystemExit as end:  # argparse has said why, or printed the help
        return int(end.code or 0)
    command = shlex.join(["python", "-m", "ddg_gpu.first_contact", *arguments])
    facts = Facts(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        stages=tuple(sorted(set(options.stages))),
        limit=options.limit,
        results={
            check.name: Result("skipped", check.no, error=("not its turn yet",)) for check in checks
        },
        complete=False,
    )
    for check in checks:
        result = _turn(check, facts)
        facts = replace(facts, results={**facts.results, check.name: result})
        out.write(describe(check, result))
        out.flush()
        if check is checks[0]:
            if result.status == "no":
                out.write("No GPU, so nothing else was checked and nothing was written.\n")
                return NO_GPU
        elif check is checks[-1]:
            facts = replace(facts, complete=True)
        # After every check: a machine that is taken away in the middle leaves what it has told.
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_facts(facts, folder / NAME)
        except OSError as error:
            out.write(f"error: {error}; choose another folder by --output\n")
            return MISTAKE
    out.write(summary(facts))
    out.write(f"Written to {folder / NAME}\n")
    broken = any(result.status in ("failed", "timed out") for result in facts.results.values())
    return FAILED if broken else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ddg_gpu.first_contact",
        description="Check what is assumed about one GPU as K devices, and write down the answers.",
        epilog="Exit codes: 0 all checks answered (yes or no), 1 a check failed or timed out, "
        "2 wrong arguments, 3 no GPU (nothing is written).",
    )
    parser.add_argument(
        "--output", metavar="FOLDER", default=".", help=f"where {NAME} goes (default: here)"
    )
    parser.add_argument(
        "--stages",
        metavar="K",
        type=_stages,
        nargs="+",
        default=[2, 4, 8],
        help="numbers of partitions to try (default: 2 4 8)",
    )
    parser.add_argument(
        "--limit",
        metavar="SECONDS",
        type=_seconds,
        default=120.0,
        help="of each check (default: 120)",
    )
    return parser


def _stages(text: str) -> int:
    if not text.isdecimal() or not 2 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"must be whole numbers from 2 to 1024, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not (seconds > 0 and math.isfinite(seconds)):
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
    return seconds


def _turn(check: Check, facts: Facts) -> Result:
    """Run a check, unless one that it needs has said no."""
    for name in check.needs:
        if facts.results[name].status == "no":
            return Result("skipped", check.no, error=(f"needs {name}",))
    return run_check(check, facts.stages, facts.limit)


def describe(check: Check, result: Result) -> str:
    """What became of a check: the question, the answer, figures and errors, one per line.

    >>> print(describe(Check("streams", "do they overlap", "", "overlap", "serial"),
    ...     Result("no", "serial", 2.0, {"ratio": 1.96}, ("1.96 times as long",))), end="")
    streams: do they overlap? no (2.0 s)
        ratio: 1.96
        ! 1.96 times as long
    """
    lines = [f"{check.name}: {check.question}? {result.status} ({result.seconds:.1f} s)"]
    for name, value in result.figures.items():
        first, *more = _text(value).splitlines() or [""]
        lines += [f"    {name}: {first}", *(f"        {line}" for line in more)]
    return "\n".join([*lines, *(f"    ! {line}" for line in result.error)]) + "\n"


def _text(value: Any) -> str:
    """A figure for the terminal; the file has all digits and all elements."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "unknown or none"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        if len(value) > 8:
            return f"{len(value)} of them"
        return ", ".join(f"[{_text(v)}]" if isinstance(v, list) else _text(v) for v in value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(v)}" for name, v in value.items())
    return str(value)


def summary(facts: Facts) -> str:
    """A table of the checks, and what later code uses because of each.

    >>> print(summary(Facts("", "", (2,), 9.0, {"graphs": Result("ok", "yes", 3.0)}, True)), end="")
    check   status  seconds  use
    graphs  ok          3.0  yes
    """
    rows = [("check", "status", "seconds", "use")]
    for name, result in facts.results.items():
        rows.append((name, result.status, f"{result.seconds:.1f}", result.use))
    wide = [max(len(row[column]) for row in rows) for column in range(3)]
    return "".join(
        f"{name:<{wide[0]}}  {status:<{wide[1]}}  {seconds:>{wide[2]}}  {use}\n"
        for name, status, seconds, use in rows
    )


if __name__ == "__main__":
    # Without this a terminated command would leave its check running on the GPU.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        sys.exit(main(sys.argv[1:], sys.stdout))
    except KeyboardInterrupt:
        sys.exit(130)
