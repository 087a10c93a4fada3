"""Gantt charts of timelines; speedup curves and heat maps of plans."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ddg_sim.files import replacing
from ddg_sim.plan import Row
from ddg_sim.replicate import Estimate
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
}
LABEL_POINTS = 7.0  # font size in boxes
THIN = 0.002  # of the time axis
LINK = 0.55  # height of a link's lane, in lanes
WIDTHS, BOX = (11.0, 20.0), 0.16  # inches: of a picture, and of one of its shorter boxes
ROWS, HEIGHT = (0.16, 0.36), 14.0  # inches: of a lane, and of all lanes if that leaves enough each
MANY = 40  # lanes; where there are more, links are left out
#: Iterations, and boxes side by side, that a picture has room for; the longest warm-up it shows.
ITERATIONS, BOXES, WARM_UP = 6, 96, 8


def gantt(
    timelines: Mapping[str, Timeline],
    path: str | Path,
    iterations: tuple[int, int] | None = None,
    title: str | None = None,
) -> None:
    """Draw timelines below one another on a common time axis, as SVG or PNG by the suffix.

    A lane per worker, and one per link that was visibly busy unless there are many; a number in a
    box names the sample, where it fits.

    Args:
        timelines: name to timeline; the first is drawn on top.
        path: file to write; it appears whole or not at all.
        iterations: (first, last) iteration to show, both included, for example those that `window`
            gives; None shows everything. Each
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
    path = picture_path(path)
    if not timelines:
        raise ValueError("timelines is empty: give at least one to draw")
    shown = {name: _window(timeline, iterations) for name, timeline in timelines.items()}
    if not any(shown.values()):
        raise ValueError(f"iterations={iterations} holds no operation: give a window of the run")
    longest = max(span.end for spans in shown.values() for span in spans)
    shown = {name: _visible(spans, longest) for name, spans in shown.items()}
    unit, scale = _unit(longest)

    heights = [_rows(_lanes(spans), spans)[1] for spans in shown.values()]
    row = _within(ROWS, HEIGHT / sum(heights))
    boxes = [span.duration for spans in shown.values() for span in spans if span.op is not None]
    width = _within(WIDTHS, BOX * longest / float(np.quantile(boxes, 0.25)) if boxes else 0.0)
    figure = empty_figure(width, row * sum(heights) + 0.55 * len(heights) + 1.0)
    axes = figure.subplots(
        len(shown), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    for axis, (name, spans) in zip(axes, shown.items(), strict=True):
        axis.set_xlim(0, longest * scale)
        _panel(axis, spans, scale, 72 * row)
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
    figure.draw_without_rendering()  # lays the picture out: then it is known how wide a box is
    for axis, spans in zip(axes, shown.values(), strict=True):
        _label(axis, spans, scale, longest)
    save(figure, path)


def window(timeline: Timeline) -> tuple[int, int]:
    """First and last iteration of a run that a picture has room for.

    It shows the warm-up too, unless that is long, and some periods of the steady state.

    >>> from ddg_sim.costs import costs
    >>> from ddg_sim.cycletime import evaluate
    >>> from ddg_sim.methods import ddg
    >>> window(evaluate(ddg(4), costs(4), iterations=50))
    (0, 8)
    >>> window(evaluate(ddg(64), costs(64), iterations=200))
    (126, 131)
    """
    table = timeline.op_columns
    seconds = (table["end"] - table["start"])[table["end"] > table["start"]]
    across = timeline.period / float(np.median(seconds)) if seconds.size else 1.0
    several = int(_within((1, ITERATIONS), BOXES / max(1.0, across)))
    warm_up = timeline.schedule.num_ticks(0)
    begin = 0 if warm_up <= WARM_UP else 2 * warm_up  # the first stages run a warm-up ahead
    last = max(0, min(timeline.iterations, max(begin, warm_up) + several) - 1)
    return (begin and max(0, last - several + 1)), last


def _within(bounds: tuple[float, float], value: float) -> float:
    return min(max(value, bounds[0]), bounds[1])


def picture_path(path: str | Path) -> Path:
    """Check that a picture can be written under this name.

    Raises:
        ValueError: naming a suffix that is neither .png nor .svg.

    >>> picture_path("run.svg").name
    'run.svg'
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"path ends in {path.suffix!r}: give one that ends in .png or .svg")
    return path


def empty_figure(width: float, height: float) -> Figure:
    """A figure of so many inches that needs no display and keeps its labels apart.

    >>> empty_figure(8, 5).get_size_inches().tolist()
    [8.0, 5.0]
    """
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained")
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure; the file appears whole or not at all, and the same run gives the same file.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     save(empty_figure(1, 1), Path(folder, "empty.png"))
    """
    with replacing(path) as temporary:
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
        figure.savefig(temporary, dpi=150, metadata=metadata)


def _kind(span: Span) -> str:
    if span.op is not None:
        return span.op.kind.noun
    return "transfer"


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
    """Spans without those links all of whose transfers would be thinner than a line.

    Where there are many lanes, no links are shown at all.
    """
    thick = {span.lane for span in spans if span.op or span.duration > THIN * longest}
    few = len(thick) <= MANY
    return [span for span in spans if span.op or (few and span.lane in thick)]


def _lanes(spans: Sequence[Span]) -> list[str]:
    """Lanes of workers by stage, then those of links."""
    first: dict[str, tuple[bool, int, int]] = {}
    for span in spans:
        if span.op is not None:
            key = (False, span.op.stage, 0)
        else:
            assert span.message is not None
            key = (True, min(span.message.source, span.message.target), span.message.source)
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


def _panel(axis: Axes, spans: Sequence[Span], scale: float, row_points: float) -> None:
    centres, bottom = _rows(_lanes(spans), spans)
    boxes: dict[tuple[str, str], list[Span]] = defaultdict(list)
    for span in spans:
        boxes[span.lane, _kind(span)].append(span)
    for (lane, kind), same in boxes.items():
        height = 0.6 * LINK if kind == "transfer" else 0.86
        axis.broken_barh(
            [(span.start * scale, span.duration * scale) for span in same],
            (centres[lane] - height / 2, height),
            facecolor=COLOURS[kind][0],
            edgecolor="white",
            linewidth=0.4,
        )
    axis.set_ylim(bottom + 0.1, -0.1)  # stage 1 on top
    names = [lane if len(lane) <= 40 else f"{lane[:38]}…" for lane in centres]
    axis.set_yticks(list(centres.values()), names, fontsize=min(8.0, 0.55 * row_points))
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _label(axis: Axes, spans: Sequence[Span], scale: float, longest: float) -> None:
    """Write the sample into every box that it fits into."""
    figure = axis.get_figure(root=True)
    assert figure is not None
    centres, bottom = _rows(_lanes(spans), spans)
    box = axis.get_window_extent()  # in pixels
    letter = 0.62 * LABEL_POINTS / 72 * figure.dpi / box.width * longest  # seconds it is wide
    size = min(LABEL_POINTS, 0.75 * 72 / figure.dpi * box.height / (bottom + 0.2))
    for span in spans:
        text = str(span.op.sample) if span.op is not None else ""
        if text and (len(text) + 0.6) * letter <= span.duration:
            middle, ink = (span.start + span.end) / 2 * scale, COLOURS[_kind(span)][1]
            drawn = axis.text(middle, centres[span.lane] + 0.03, text, fontsize=size, color=ink)
            drawn.set(ha="center", va="center")


# --- Plans --------------------------------------------------------------------------------------

CURVES = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
MARKERS = "osD^vPX*<>"
STROKES = ("-", "--", ":", "-.")
CELL = 0.42  # inches


def speedup_curves(rows: Sequence[Row], path: str | Path) -> None:
    """Draw speedup over backpropagation by number of devices, the best that fits of each method.

    Args:
        rows: of a plan.
        path: file to write, SVG or PNG by its suffix; it appears whole or not at all.

    Raises:
        ValueError: for another suffix, or without rows.
        OSError: if the folder does not exist or cannot be written.

    >>> speedup_curves([], "picture.png")
    Traceback (most recent call last):
    ...
    ValueError: rows is empty: give at least one point of a plan
    """
    path = picture_path(path)
    _some(rows)
    figure = empty_figure(8.0, 5.0)
    _curves(figure.subplots(), rows)
    save(figure, path)


def heat_maps(rows: Sequence[Row], path: str | Path) -> None:
    """Draw speedup over backpropagation by devices and method, and by batch where it varies.

    A cell holds the fastest of the points that share it. Crossed out is what does not fit into
    memory, empty what was left out.

    Args:
        rows: of a plan.
        path: file to write, SVG or PNG by its suffix; it appears whole or not at all.

    Raises:
        ValueError: for another suffix, or without rows.
        OSError: if the folder does not exist or cannot be written.
    """
    path = picture_path(path)
    _some(rows)
    figure = empty_figure(*_heat_size(rows))
    _heat_panels(figure, rows)
    save(figure, path)


def plan_picture(rows: Sequence[Row], path: str | Path) -> None:
    """Draw `speedup_curves` above `heat_maps` in one picture; same arguments and errors."""
    path = picture_path(path)
    _some(rows)
    width, height = _heat_size(rows)
    figure = empty_figure(max(8.0, width), 4.5 + height)
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[4.5, height])[:, 0]
    _curves(above.subplots(), rows)
    _heat_panels(below, rows)
    save(figure, path)


def _some(rows: Sequence[Row]) -> None:
    if not rows:
        raise ValueError("rows is empty: give at least one point of a plan")


def _title(row: Row) -> str:
    sync = row.schedule.sync.value
    return row.schedule.method + (f" ({sync})" if sync != "none" else "")


def _curves(axis: Axes, rows: Sequence[Row]) -> None:
    curves: dict[str, dict[int, Estimate]] = {}
    for row in rows:  # the fastest come first
        if row.fits and row.over_bp is not None:
            curves.setdefault(_title(row), {}).setdefault(row.devices, row.over_bp)
    same: dict[tuple[tuple[int, str], ...], list[str]] = {}
    for name, curve in sorted(curves.items()):
        drawn = tuple((count, f"{curve[count].value:.3g}") for count in sorted(curve))
        same.setdefault(drawn, []).append(name)
    most = max(row.devices for row in rows)
    highest = 1.0
    for index, names in enumerate(same.values()):
        curve = curves[names[0]]
        devices = sorted(curve)
        speedups = [curve[count].value for count in devices]
        highest = max(highest, *speedups)
        colour = CURVES[index % len(CURVES)]
        axis.plot(
            devices,
            speedups,
            color=colour,
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            linestyle=STROKES[index // len(CURVES) % len(STROKES)],
            label="\n".join(wrap(", ".join(names), 30)),
        )
        if any(curve[count].runs for count in devices):
            low = [curve[count].low for count in devices]
            high = [curve[count].high for count in devices]
            axis.fill_between(devices, low, high, color=colour, alpha=0.2, linewidth=0)
    ends = [1, most]
    axis.plot(ends, ends, label="ideal", color="#888888", linewidth=1, linestyle=(0, (6, 4)))
    axis.set(xlabel="devices", ylabel="speedup over backpropagation", ylim=(0, 1.1 * highest))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
    axis.set_title("fastest of what fits, by number of devices", loc="left", fontsize=10)


def _heat_axes(rows: Sequence[Row]) -> tuple[list[str], list[str], list[int]]:
    """Panels, lines and columns: a panel per method where the batch varies, else one for all."""
    names = sorted({_title(row) for row in rows})
    batches = [str(size) for size in sorted({row.batch_size or 0 for row in rows})]
    devices = sorted({row.devices for row in rows})
    return (names, batches, devices) if len(batches) > 1 else ([""], names, devices)


def _heat_size(rows: Sequence[Row]) -> tuple[float, float]:
    panels, lines, devices = _heat_axes(rows)
    across = min(3, len(panels))
    width = across * (0.6 + CELL * max(3, len(devices))) + 2.5
    return width, -(-len(panels) // across) * (0.5 + 0.7 * CELL * len(lines)) + 0.8


def _heat_panels(figure: Figure | SubFigure, rows: Sequence[Row]) -> None:
    panels, lines, devices = _heat_axes(rows)
    several = len(panels) > 1
    table = np.full((len(panels), len(lines), len(devices)), np.nan)
    present = np.zeros(table.shape, dtype=bool)
    for row in rows:  # the fastest come first
        line = str(row.batch_size) if several else _title(row)
        panel = panels.index(_title(row)) if several else 0
        place = panel, lines.index(line), devices.index(row.devices)
        present[place] = True
        if np.isnan(table[place]) and row.over_bp is not None:
            table[place] = row.over_bp.value
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    highest = max(1.0, float(np.nanmax(table, initial=1.0)))
    for panel, axis in enumerate(axes.flat):
        if panel >= len(panels):
            axis.set_visible(False)
            continue
        picture = axis.imshow(table[panel], cmap="cividis", vmin=0, vmax=highest, aspect="auto")
        for line, column in zip(*np.nonzero(present[panel]), strict=True):
            value = table[panel, line, column]
            ink = "black" if value > 0.55 * highest else "#999999" if np.isnan(value) else "white"
            text = "×" if np.isnan(value) else f"{value:.1f}"
            axis.text(column, line, text, ha="center", va="center", fontsize=8, color=ink)
        axis.set_xticks(range(len(devices)), [str(count) for count in devices], fontsize=8)
        axis.set_yticks(range(len(lines)), lines, fontsize=8)
        axis.tick_params(length=0, labelbottom=panel + across >= len(panels))
        axis.spines[:].set_visible(False)
        axis.set_title(panels[panel], loc="left", fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("devices")
    if several:
        for axis in axes[:, 0]:
            axis.set_ylabel("batch")
    figure.colorbar(picture, ax=list(axes.flat), label="speedup over BP (×: no fit)")
