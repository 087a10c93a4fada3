"""Pictures of training runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator

from ddg_sim.plot import empty_figure, save

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9")
DASHES = ("-", "--", ":", "-.")
#: Mini-batches over which the drawn loss is averaged.
WINDOW = 10


def loss_curves(runs: Mapping[str, tuple[Sequence[float], float]], path: str | Path) -> None:
    """Draw training losses against iterations, and against time.

    Args:
        runs: name -> (loss of every mini-batch, measured seconds per iteration).
        path: PNG or SVG file, by its suffix; it appears whole or not at all.

    Raises:
        ValueError: if there is nothing to draw.

    >>> loss_curves({}, "losses.png")
    Traceback (most recent call last):
    ...
    ValueError: runs is empty: give at least one run to draw
    """
    if not runs:
        raise ValueError("runs is empty: give at least one run to draw")
    figure = empty_figure(10, 3.8)
    by_iteration, by_time = figure.subplots(1, 2, sharey=True)
    for place, (name, (losses, period)) in enumerate(runs.items()):
        window = min(WINDOW, len(losses))
        smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
        iterations = np.arange(window, len(losses) + 1)
        style = {
            "color": COLOURS[place % len(COLOURS)],
            "linestyle": DASHES[place % len(DASHES)],
            "linewidth": 1.8,
        }
        by_iteration.plot(iterations, smooth, label=name, **style)
        by_time.plot(iterations * period, smooth, label=name, **style)
    by_iteration.set_xlabel("iterations")
    by_iteration.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_time.set_xlabel("time (s)")
    by_iteration.set_ylabel(f"training loss (mean of {WINDOW} mini-batches)")
    for axis in (by_iteration, by_time):
        axis.set_yscale("log")
        axis.grid(alpha=0.3, which="both")
    by_iteration.legend(frameon=False)
    save(figure, Path(path))
