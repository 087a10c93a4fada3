"""Pictures of the convergence study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ddg_gpu.plot import COLOURS, DASHES
from ddg_sim.plot import empty_figure, save

MARKERS = "osD^vPX"


@dataclass(frozen=True, slots=True)
class Curve:
    """A method's progress, at the end of every epoch.

    Args:
        iterations: updates so far.
        period: predicted time of an iteration, in iterations of backpropagation.
        losses: mean and half width of its interval; empty if a run diverged.
        accuracies: the same, in percent.
    """

    iterations: Sequence[int]
    period: float
    losses: Sequence[tuple[float, float]]
    accuracies: Sequence[tuple[float, float]]


def _style(place: int) -> dict[str, object]:
    return {
        "color": COLOURS[place % len(COLOURS)],
        "linestyle": DASHES[place // len(COLOURS) % len(DASHES)],
        "marker": MARKERS[place % len(MARKERS)],
        "markersize": 4,
        "linewidth": 1.5,
    }


def convergence_curves(curves: Mapping[str, Curve], path: Path, title: str) -> None:
    """Loss and accuracy against updates, and against predicted time; bands are 95 % intervals."""
    figure = empty_figure(11, 7.2)
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for place, (name, curve) in enumerate(curves.items()):
        style = _style(place)
        for row, values in enumerate((curve.losses, curve.accuracies)):
            for column, factor in enumerate((1.0, curve.period)):
                if not values:
                    continue
                x = [factor * iteration for iteration in curve.iterations]
                mean = [value for value, _ in values]
                axes[row][column].plot(x, mean, label=name, **style)
                axes[row][column].fill_between(
                    x,
                    [max(a - b, 1e-3) for a, b in values],
                    [a + b for a, b in values],
                    color=style["color"],
                    alpha=0.12,
                    linewidth=0,
                )
    axes[0][0].set_yscale("log")
    axes[0][0].set_ylabel("training loss (mean of the epoch)")
    axes[1][0].set_ylabel("test accuracy (%)")
    axes[1][0].set_xlabel("updates")
    axes[1][1].set_xlabel("predicted time (iterations of backpropagation)")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    handles, labels = axes[1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def delay_curves(
    series: Mapping[str, Sequence[tuple[int, float, float]]], path: Path, title: str
) -> None:
    """Accuracy lost against the largest delay, with 95 % intervals."""
    figure = empty_figure(7.5, 4.6)
    axis = figure.subplots()
    for place, (name, points) in enumerate(series.items()):
        # A little apart, so that the error bars can be told from one another.
        x = [delay + 0.15 * (place - len(series) / 2) for delay, _, _ in points]
        axis.errorbar(
            x,
            [mean for _, mean, _ in points],
            yerr=[half for _, _, half in points],
            label=name,
            capsize=2,
            **_style(place),
        )
    axis.axhline(0.0, color="#888888", linewidth=0.8)
    axis.set_xlabel("largest delay (iterations, of stage 1)")
    axis.set_ylabel("test accuracy lost to delay 0 (points)")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=9)
    axis.set_title(title, fontsize=10)
    save(figure, path)
