"""Published numbers beside predicted ones: the terms in which `anchors` reports."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from statistics import fmean


class Role(Enum):
    """What a comparison is worth."""

    #: The published number did not enter.
    PREDICTION = "prediction"
    #: The published number set one of the variant's constants: never counted.
    CALIBRATED = "calibrated"
    #: Shown, not counted: other measurements of the same run entered, or the case is outside of
    #: what the model is about.
    APART = "apart"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One published number, and what one variant of the model says.

    Args:
        variant: the assumptions, in words.
        group: column of the report in which it appears.
        case: the published row, in words.
        published: in the anchor's unit.
        predicted: in the anchor's unit.
        role: whether it counts.

    >>> Comparison("barrier", "K=2", "K=2", 100.0, 97.0, Role.PREDICTION).error
    -0.03
    """

    variant: str
    group: str
    case: str
    published: float
    predicted: float
    role: Role

    @property
    def error(self) -> float:
        """Relative error of the prediction, positive if it is too large."""
        return (self.predicted - self.published) / self.published


@dataclass(frozen=True, slots=True)
class Anchor:
    """A published data set, compared.

    Args:
        name: its file.
        title: what was measured.
        unit: of the published numbers.
        headline: the variant that stands for the model; the others show what it rests on.
        comparisons: of all variants.
        notes: where the numbers come from, and why the model misses where it does.
    """

    name: str
    title: str
    unit: str
    headline: str
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants, in the order in which they are reported."""
        return tuple(dict.fromkeys(found.variant for found in self.comparisons))

    @property
    def groups(self) -> tuple[str, ...]:
        """The columns of the report."""
        return tuple(dict.fromkeys(found.group for found in self.comparisons))

    def of(self, variant: str, group: str | None = None) -> tuple[Comparison, ...]:
        """A variant's comparisons, of all groups or of one."""
        return tuple(
            found
            for found in self.comparisons
            if found.variant == variant and group in (None, found.group)
        )

    def mean_error(self, variant: str) -> float | None:
        """A variant's `mean_error`."""
        return mean_error(self.of(variant))


def mean_error(comparisons: Iterable[Comparison]) -> float | None:
    """Mean absolute relative error of what was predicted; None if nothing was.

    >>> row = ("barrier", "K", "K")
    >>> mean_error([Comparison(*row, 100, 97, Role.PREDICTION), Comparison(*row, 1, 1, Role.APART)])
    0.03
    """
    errors = [abs(found.error) for found in comparisons if found.role is Role.PREDICTION]
    return fmean(errors) if errors else None


def read_rows(path: Path, *columns: str) -> list[dict[str, str]]:
    """Read a file of comma-separated values; lines that begin with # are comments.

    Args:
        path: the file; its first line names the columns, unless ``columns`` does.
        columns: names of the columns of a file without a line of names.

    Raises:
        ValueError: naming the file, for no rows, or a row with too few or too many values.
    """
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        lines = [line for line in file if line.strip() and not line.startswith("#")]
    rows = list(csv.DictReader(lines, fieldnames=columns or None))
    if not rows:
        raise ValueError(f"{path}: has no rows")
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise ValueError(f"{path}: row {number} does not have one value per column")
    return rows


def number(path: Path, row: dict[str, str], column: str) -> float:
    """A positive number in a row.

    Raises:
        ValueError: naming the file, the column and the value.
    """
    text = row.get(column)
    if text is None:
        raise ValueError(f"{path}: has no column {column!r}")
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"{path}: {column} is {text!r}, must be a positive number")
    return value
