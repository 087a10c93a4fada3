"""What every command shares: numbers in, tables, JSON and progress bars out."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from ddg_sim.times import Time

ERRORS = Console(stderr=True, highlight=False, soft_wrap=True)


def durations(option: str, text: str) -> Time | tuple[Time, ...]:
    """Parse ``1``, ``1,2,3`` or ``gamma(1,0.1),2``: one time for all, or one each.

    Raises:
        ValueError: naming the option and the part that is no time.

    >>> durations("--forward", "1,2.5"), durations("--forward", "gamma(1, 0.5)")
    ((1.0, 2.5), Gamma(mean=1.0, std=0.5))
    """
    from ddg_sim.times import parse_time

    try:
        # A comma outside of parentheses separates.
        found = tuple(parse_time(part) for part in re.split(r",(?![^(]*\))", text))
    except ValueError as error:
        raise ValueError(f"{option} {text!r}: {error}") from None
    return found if len(found) > 1 else found[0]


def names(option: str, text: str | None) -> tuple[str, ...] | None:
    """Parse ``a,b`` to names, each once; None stays None.

    Raises:
        ValueError: naming the option and its value.

    >>> names("--problems", "kuramoto, welsch,kuramoto")
    ('kuramoto', 'welsch')
    """
    if text is None:
        return None
    found = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if "" in found:
        raise ValueError(f"{option} must be names such as a,b, got {text!r}")
    return found


def integers(option: str, text: str | None) -> tuple[int, ...] | None:
    """Parse ``2,5`` to integers; None stays None.

    Raises:
        ValueError: naming the option and its value.

    >>> integers("--cuts", "2,5")
    (2, 5)
    """
    if text is None:
        return None
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise ValueError(f"{option} must be integers such as 2,5, got {text!r}") from None


def choice(option: str, text: str | None, kind: Any) -> Any:
    """The member of an enumeration that an option names; None stays None.

    Raises:
        ValueError: naming the option, its value and the known ones.

    >>> from ddg_sim.schedule import Sync
    >>> choice("--sync", "none", Sync)
    <Sync.NONE: 'none'>
    """
    if text is None:
        return None
    try:
        return kind(text)
    except ValueError:
        known = ", ".join(member.value for member in kind)
        raise ValueError(f"unknown {option} {text!r}; known: {known}") from None


def output_path(option: str, path: Path | None, suffixes: Sequence[str] = ()) -> Path | None:
    """Check, before any work is done, that a result can be written there; None stays None.

    Raises:
        ValueError: naming the option and the path.
    """
    if path is None:
        return None
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise ValueError(f"{option} {path}: is a folder, give a file")
    if path.exists() and not path.is_file():
        raise ValueError(f"{option} {path}: is a device or pipe, give a file")
    if not os.access(path.resolve().parent, os.W_OK):
        raise ValueError(f"{option} {path}: the folder {path.parent} may not be written")
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"{option} {path}: must end in {' or '.join(suffixes)}")
    return path


def only(context: typer.Context, mode: str, *names: str) -> None:
    """Check that no argument was given that ``mode`` would not read, except those named.

    Raises:
        ValueError: naming the argument.
    """
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE" and parameter.name not in names:
            raise ValueError(f"{parameter.opts[0]} means nothing with {mode}: leave it out")


def different_files(**paths: Path | None) -> None:
    """Check that no two options name the same file, of which one would be lost.

    Raises:
        ValueError: naming both options and the file.

    >>> different_files(trace=Path("a.json"), plot=Path("./a.json"))
    Traceback (most recent call last):
    ...
    ValueError: --trace and --plot both name a.json
    """
    seen: dict[Path, str] = {}
    for option, path in paths.items():
        if path is not None and (other := seen.setdefault(path.resolve(), option)) != option:
            raise ValueError(f"--{other} and --{option} both name {path}")


def print_json(result: dict[str, Any]) -> None:
    """Print one JSON object on stdout; what is no finite number becomes null."""
    print(json.dumps(_finite(result), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    numeric: bool = True,
    left: Sequence[str] = (),
) -> None:
    """Print a table on stdout.

    Args:
        title: what the table shows.
        columns: headings; if all are empty, none are shown.
        rows: cells, as text.
        numeric: whether the columns after the first are numbers, which are aligned right.
        left: columns that are none.
    """
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        show_header=any(columns),
        show_lines=any("\n" in cell for row in rows for cell in row),
    )
    for place, column in enumerate(columns):
        justify: JustifyMethod = "right" if place and numeric and column not in left else "left"
        name = numeric and not place  # of a row: never broken, however narrow the terminal
        table.add_column(column, justify=justify, overflow="fold", no_wrap=name)
    for row in rows:
        table.add_row(*map(escape, row))  # a formula's brackets are no markup
    console().print(table)


def print_line(text: str) -> None:
    """Print a line of text on stdout, as it is."""
    console().print(text, markup=False, highlight=False, soft_wrap=True)


def console() -> Console:
    """Where results go; wide enough for tables where nothing says how wide the output is."""
    known = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()
    return Console() if known else Console(width=110)


def warn(text: str) -> None:
    """Print a warning on stderr."""
    ERRORS.print(f"ddg: warning: {text}", markup=False, style="yellow")


def seconds(value: float) -> str:
    """Format seconds with a unit that fits.

    >>> seconds(0.01234), seconds(3), seconds(4.2e-5), seconds(9.999e-4), seconds(1213)
    ('12.3 ms', '3 s', '42 µs', '1 ms', '1,213 s')
    """
    if 1000 <= value < 1e9:
        return f"{value:,.0f} s"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= 0.9995 * scale:  # what rounds to 1000 belongs to the next unit
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g} s"


def interval(ends: tuple[float, float] | None) -> str:
    """Format an interval of seconds.

    >>> interval((0.0441, 0.0571)), interval((0.0009, 0.0012)), interval(None)
    ('44.1 to 57.1 ms', '900 µs to 1.2 ms', '–')
    """
    if ends is None:
        return "–"
    (low, unit), (high, last) = (seconds(end).split(" ") for end in ends)
    return f"{low} to {high} {unit}" if unit == last else f"{low} {unit} to {high} {last}"


def times(value: float | None) -> str:
    """Format a speedup.

    >>> times(1.946), times(None)
    ('1.95×', '–')
    """
    return "–" if value is None else f"{value:.2f}×"


def percent(value: float) -> str:
    """Format a fraction.

    >>> percent(0.123)
    '12.3 %'
    """
    return f"{100 * value:.1f} %"


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr if that is a terminal; gives a function (done, total)."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=ERRORS,
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
