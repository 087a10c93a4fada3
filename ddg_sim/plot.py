"""Gantt charts of timelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from ddg_sim.files import replacing
from ddg_sim.timeline import Span, Timeline

SUFFIXES = (".png", ".svg")
# Okabe and Ito's palette, which colour-blind readers can tell apart; and text that reads on it.
COLOURS = {
    "forward": ("#56B4E9", "black"),
    "recompute": ("#CC79A7", "black"),
    "backward": ("#E69F00", "black"),
    "input gradient": ("#E69F00", "black"),
    "weight gradient": ("#F0E442", "black"),
    "update": ("#009E73", "white"),
    "all-reduce": ("#0072B2", "white"),
    "transfer": ("#BBBBBB", "black"),
    "other": ("#EEEEEE", "black"),
}
WIDTH, ROW, LABEL_POINTS = 11.0, 0.36, 7.0  # inches, inches per lane, font size in boxes
THIN = 0.002  # of the time axis
LINK = 0.55  # height of a link's lane, in lanes


def gantt(
    timelines: Mapping[str, Timeline],
    path: str | Path,
    iterations: tuple[int, int] | None = None,
    title: str | None = None,
) -> None:
    """Draw timelines below one another on a common time axis, as SVG or PNG by the suffix.

    A lane per worker, and one per link that was visibly busy; a number in a box names the sample.

    Args:
        timelines: name to timeline; the first is drawn on top.
        path: file to write; it appears whole or not at all.
        iterations: (first, last) iteration to show, both included; None shows everything. Each
            timeline is cut at its own times and starts at 0.
        title: heading; None draws none.

    Raises:
        ValueError: for another suffix, without timelines, or with an empty window.
        OSError: if the folder does not exist or cannot be written.

    >>> gantt({}, "picture.png")
    Traceback (most recent call last):
    ...
    ValueError: timelines is empty: give at least one to draw
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"path ends in {path.suffix!r}: give one that ends in .png or .svg")
    if not timelines:
        raise ValueError("timelines is empty: give at least one to draw")
    shown = {name: _window(timeline, iterations) for name, timeline in timelines.items()}
    if not any(shown.values()):
        raise ValueError(f"iterations={iterations} holds no operation: give a window of the run")
    longest = max(span.end for spans in shown.values() for span in spans)
    shown = {name: _visible(spans, longest) for name, spans in shown.items()}
    unit, scale = _unit(longest)

    heights = [_rows(_lanes(spans), spans)[1] for spans in shown.values()]
    figure = Figure(figsize=(WIDTH, ROW * sum(heights) + 0.55 * len(heights) + 1.0))
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(
        len(shown), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    for axis, (name, spans) in zip(axes, shown.items(), strict=True):
        axis.set_xlim(0, longest * scale)
        _panel(axis, spans, scale, longest)
        axis.set_title(name, loc="left", fontsize=10)
    axes[-1].set_xlabel(f"time ({unit})")
    used = {_kind(span) for spans in shown.values() for span in spans}
    figure.legend(
        handles=[Patch(color=COLOURS[kind][0], label=kind) for kind in COLOURS if kind in used],
        loc="outside upper right",
        ncols=len(used),
        frameon=False,
        fontsize=9,
    )
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    with replacing(path) as temporary:
        # Without a date the same run gives the same file.
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
        figure.savefig(temporary, dpi=150, metadata=metadata)


def _kind(span: Span) -> str:
    if span.op is not None:
        return span.op.kind.noun
    return "transfer" if span.message is not None else "other"


def _window(timeline: Timeline, iterations: tuple[int, int] | None) -> list[Span]:
    """The spans to show, moved so that they start at 0."""
    spans = [span for span in timeline.spans if span.end > span.start]
    if iterations is not None:
        first, last = iterations
        inside = [
            span
            for span, op in timeline.operations
            if first <= op.iteration <= last and span.end > span.start
        ]
        start = min((span.start for span in inside), default=0.0)
        end = max((span.end for span in inside), default=0.0)
        spans = [span for span in spans if span.start < end and span.end > start]
    else:
        start, end = timeline.start, timeline.start + timeline.makespan
    return [
        Span(
            span.lane,
            span.label,
            max(span.start, start) - start,
            min(span.end, end) - start,
            span.op,
            span.message,
        )
        for span in spans
    ]


def _visible(spans: Sequence[Span], longest: float) -> list[Span]:
    """Spans without those links all of whose transfers would be thinner than a line."""
    thick = {span.lane for span in spans if span.op or span.duration > THIN * longest}
    return [span for span in spans if span.lane in thick]


def _lanes(spans: Sequence[Span]) -> list[str]:
    """Lanes of workers by stage, then those of links."""
    first: dict[str, tuple[bool, int, int]] = {}
    for span in spans:
        if span.op is not None:
            key = (False, span.op.stage, 0)
        elif span.message is not None:
            key = (True, min(span.message.source, span.message.target), span.message.source)
        else:
            key = (True, len(spans), 0)
        first[span.lane] = min(first.get(span.lane, key), key)
    return sorted(first, key=lambda lane: first[lane])


def _unit(longest: float) -> tuple[str, float]:
    if longest >= 1.0:
        return "s", 1.0
    return ("ms", 1e3) if longest >= 1e-3 else ("µs", 1e6)


def _rows(lanes: Sequence[str], spans: Sequence[Span]) -> tuple[dict[str, float], float]:
    """Centre of every lane from the top, and the height of all; links take half as much."""
    narrow = {span.lane for span in spans if span.op is None}
    centres: dict[str, float] = {}
    top = 0.0
    for lane in lanes:
        height = LINK if lane in narrow else 1.0
        centres[lane] = top + height / 2
        top += height
    return centres, max(top, 1.0)


def _panel(axis: Axes, spans: Sequence[Span], scale: float, longest: float) -> None:
    centres, bottom = _rows(_lanes(spans), spans)
    letter = longest * LABEL_POINTS * 0.62 / 72 / (WIDTH - 1.5)  # seconds a letter is wide
    for span in spans:
        colour, ink = COLOURS[_kind(span)]
        height = 0.86 if span.op is not None else 0.6 * LINK
        centre = centres[span.lane]
        box = Rectangle(
            (span.start * scale, centre - height / 2),
            span.duration * scale,
            height,
            facecolor=colour,
            edgecolor="white",
            linewidth=0.4,
        )
        axis.add_patch(box)
        text = str(span.op.sample) if span.op is not None else ""
        if text and (len(text) + 0.6) * letter <= span.duration:
            middle = (span.start + span.end) / 2 * scale
            drawn = axis.text(middle, centre + 0.03, text, fontsize=LABEL_POINTS, color=ink)
            drawn.set(ha="center", va="center")
    axis.set_ylim(bottom + 0.1, -0.1)  # stage 1 on top
    axis.set_yticks(list(centres.values()), list(centres), fontsize=8)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
