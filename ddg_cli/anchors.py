"""`ddg anchors`: published training times against predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddg_cli.output import percent, print_json, print_line, print_table

if TYPE_CHECKING:
    from ddg_sim.comparison import Anchor, Comparison

DEFAULT = Path("../shared/anchors")
WIDTH = 98
MARKS = {"prediction": "", "calibrated": "*", "apart": "†"}
LEGEND = (
    "→ the variant that stands for the model; * set one of the variant's constants, † shown apart:"
    " both are never counted in the mean of the absolute relative errors."
)


def anchors(
    path: Annotated[
        Path | None,
        typer.Option(help=f"Folder with the published measurements. [default: {DEFAULT}]"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Compare predictions with published training times.

    What was calibrated is marked and not counted as a prediction.
    """
    from ddg_sim.anchors import ANCHORS, compare

    folder = path or DEFAULT
    found: tuple[Anchor, ...] = ()
    missing: tuple[str, ...] = tuple(ANCHORS)
    if path is not None or folder.is_dir():
        found, missing = compare(folder)
        if path is not None and not found:
            raise ValueError(f"--path {path}: holds none of {', '.join(missing)}")
    if json:
        print_json(
            {
                "path": str(folder),
                "anchors": [_as_json(anchor) for anchor in found],
                "missing": list(missing),
            }
        )
        return
    for anchor in found:
        _print(anchor)
    if found:
        print_line(fill(LEGEND, WIDTH))
    if missing:
        print_line(f"not in {folder}: {', '.join(missing)} (--path names another folder)")


def _print(anchor: Anchor) -> None:
    published = [_published(anchor.of(anchor.headline, group)) for group in anchor.groups]
    rows = [["published", *published, ""]]
    for variant in anchor.variants:
        mean = anchor.mean_error(variant)
        cells = [_predicted(anchor.of(variant, group)) for group in anchor.groups]
        marked = f"→ {variant}" if variant == anchor.headline else f"  {variant}"
        rows.append([marked, *cells, "–" if mean is None else percent(mean)])
    print_table(f"{anchor.title}: {anchor.unit}", ["", *anchor.groups, "mean"], rows)
    for note in anchor.notes:
        print_line(fill(note, WIDTH, initial_indent="- ", subsequent_indent="  "))
    print_line("")


def _published(comparisons: Sequence[Comparison]) -> str:
    if len(comparisons) == 1:
        return f"{comparisons[0].published:,.4g}"
    return f"{len(comparisons)} rows"


def _predicted(comparisons: Sequence[Comparison]) -> str:
    """One prediction with its error and mark, or the mean error of several."""
    from ddg_sim.comparison import mean_error

    if not comparisons:
        return ""
    if len(comparisons) == 1:
        (only,) = comparisons
        error = round(100 * only.error, 1) + 0.0  # no -0.0
        return f"{only.predicted:,.4g} {error:+.1f}%{MARKS[only.role.value]}"
    mean = mean_error(comparisons)
    return "–" if mean is None else percent(mean)


def _as_json(anchor: Anchor) -> dict[str, Any]:
    return {
        "file": anchor.name,
        "title": anchor.title,
        "unit": anchor.unit,
        "headline": anchor.headline,
        "mean_errors": {variant: anchor.mean_error(variant) for variant in anchor.variants},
        "rows": [
            {
                "variant": found.variant,
                "group": found.group,
                "case": found.case,
                "published": found.published,
                "predicted": found.predicted,
                "error": found.error,
                "role": found.role.value,
            }
            for found in anchor.comparisons
        ],
        "notes": list(anchor.notes),
    }
