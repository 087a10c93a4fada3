"""Pictures of what is stable, and of how far the bounds are from what is measured."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ddg_sim import methods
from ddg_sim.plot import empty_figure, picture_path, save
from theory.bounds import STATEMENTS
from theory.check import Report, Verdict, check
from theory.problems import make
from theory.rates import rates
from theory.stability import fastest, spectral_radius, stable_limit
from theory.statement import Scope

#: Okabe and Ito's palette, which colour-blind readers can tell apart; markers help in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
#: Statements about averages that are drawn unless others are asked for.
DRAWN = ("theorem1", "theorem-a", "theorem-v", "theorem-d", "c-tau")

Progress: TypeAlias = Callable[[int, int], None]


def region(path: str | Path, delays: Sequence[int] = (0, 1, 2, 3, 5, 8)) -> None:
    """Draw the stable rates over momentum, and the decay over the rate, one line per delay.

    Raises ValueError for another suffix than .png or .svg, or without delays.

    >>> region("region.gif")
    Traceback (most recent call last):
    ValueError: path ends in '.gif': give one that ends in .png or .svg
    """
    path = picture_path(path)
    if not delays:
        raise ValueError("delays is empty: give at least one")
    figure = empty_figure(10.0, 4.4)
    left, right = figure.subplots(1, 2)
    beta = np.linspace(0.0, 0.99, 200)
    for index, delay in enumerate(delays):
        colour = COLOURS[index % len(COLOURS)]
        limit = float(stable_limit(delay))
        left.semilogy(beta, stable_limit(delay, beta), color=colour, label=f"τ = {delay}")
        x = np.geomspace(1e-2, 1.0, 300) * limit
        right.plot(x, spectral_radius([[1.0]], [delay], x), color=colour)
        best, rate = fastest(delay)
        right.plot(best, rate, "o", color=colour, markersize=5)
    left.set(xlabel="momentum β", ylabel="largest stable γL", title="stable below the line")
    left.set_xlim(0.0, 1.0)
    right.set(
        xlabel="γL",
        ylabel="largest |eigenvalue|",
        title="decay per iteration, β = 0 (dot: fastest)",
    )
    right.set_xscale("log")
    right.set_ylim(0.0, 1.02)
    _finish(figure, [left, right], path)


def frontier(
    path: str | Path,
    names: Sequence[str] = ("bp", "pipedream-2bw", "ddg", "fdg", "stale"),
    max_stages: int = 10,
    momentum: float = 0.0,
) -> None:
    """Draw the largest stable rate of each method over the number of stages, on quadratics.

    Raises ValueError for another suffix than .png or .svg, or a method that `theory.rates.rates`
    knows nothing about.

    >>> frontier("frontier.gif")
    Traceback (most recent call last):
    ValueError: path ends in '.gif': give one that ends in .png or .svg
    """
    path = picture_path(path)
    figure = empty_figure(6.4, 4.4)
    axes = figure.subplots()
    counts = list(range(1, max_stages + 1))
    for index, name in enumerate(names):
        stable = [rates(methods.method(name, k), 1.0, momentum).stable for k in counts]
        axes.semilogy(counts, stable, "-", label=name, **_marked(index))
    axes.set(
        xlabel="number of stages K",
        ylabel="largest stable γL",
        title=f"every quadratic with curvature in [0, L], β = {momentum:g}",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(figure, [axes], path)


def bounds(
    path: str | Path,
    problem: str,
    stages: int,
    gamma: float,
    iterations: int,
    statements: Sequence[str] = DRAWN,
    num_samples: int = 2,
    progress: Progress | None = None,
) -> None:
    """Draw E||grad f||^2, averaged, and the bounds on it over T, K and gamma, of DDG.

    Each panel varies one argument around the given ones; every point is exact or a confidence
    statement (see `theory.check.check`). Bounds are drawn where their hypotheses hold; with
    ``num_samples`` = 1 also those that need full gradients. Above the line "trivial" a bound says
    less than ||grad f||^2 <= M and ||grad f(w^0)||^2 <= 2 L gap do. ``progress`` is called with
    the checks done and all checks.

    Raises ValueError for another suffix than .png or .svg, a statement that is not about the
    average, or as `theory.check.check` does.

    >>> bounds("bounds.svg", "kuramoto", 2, 0.05, 6, statements=["lemma1"])  # one step each
    Traceback (most recent call last):
    ValueError: statement 'lemma1' cannot be drawn; known about averages: theorem1, theorem2, ...
    """
    path = picture_path(path)
    chosen = _averages(statements)
    lengths = sorted({*np.unique(np.geomspace(max(2, stages), iterations, 6).astype(int))})
    steps = gamma * np.geomspace(1 / 16, 16, 9)
    figure = empty_figure(12.0, 4.4)
    axes = figure.subplots(1, 3, sharey=True)
    panels: list[tuple[str, list[float], list[tuple[int, float, int]]]] = [
        ("iterations T", [*map(float, lengths)], [(stages, gamma, int(t)) for t in lengths]),
        (
            "number of stages K (a problem for each)",
            [float(k) for k in range(1, stages + 2)],
            [(k, gamma, max(iterations, k + 1)) for k in range(1, stages + 2)],
        ),
        ("learning rate γ", [*map(float, steps)], [(stages, float(g), iterations) for g in steps]),
    ]
    every = [point for _, _, points in panels for point in points]
    reports = iter(_reports(problem, num_samples, chosen, every, progress))
    for axis, (label, places, points) in zip(axes, panels, strict=True):
        runs = [next(reports) for _ in points]
        trivial = [_trivial(problem, k, num_samples) for k, _, _ in points]
        _bounds_panel(axis, places, runs, trivial)
        axis.set_xlabel(label)
        axis.set_yscale("log")
    for axis in (axes[0], axes[2]):
        axis.set_xscale("log")
    axes[0].set_xticks(lengths, list(map(str, lengths)))
    axes[0].set_xticks([], minor=True)
    axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("(1/T) Σ E‖∇f(wᵗ)‖²")
    title = f"DDG on {problem}, around K = {stages}, γ = {gamma:g}, T = {iterations}"
    _finish(figure, list(axes), path, title)


def tightness(
    path: str | Path,
    problem: str,
    max_stages: int,
    gamma: float,
    iterations: int,
    statements: Sequence[str] = DRAWN,
    num_samples: int = 2,
    progress: Progress | None = None,
) -> None:
    """Draw measured/bound over the number of stages K, of DDG: 1 is a bound that is attained.

    ``progress`` is called with the checks done and all checks. Raises ValueError as `bounds` does.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder, "tightness.svg")
    ...     tightness(path, "kuramoto", 2, 0.05, 4, statements=["theorem-a"])
    ...     path.stat().st_size > 0
    True
    """
    path = picture_path(path)
    chosen = _averages(statements)
    counts = list(range(1, max_stages + 1))
    points = [(k, gamma, max(iterations, k)) for k in counts]
    runs = _reports(problem, num_samples, chosen, points, progress)
    figure = empty_figure(6.4, 4.4)
    axes = figure.subplots()
    for index, key in enumerate(chosen):
        shown = [
            run[key].tightness if run[key].verdict is not Verdict.NOT_APPLICABLE else math.nan
            for run in runs
        ]
        if not np.isfinite(shown).any():
            continue
        axes.semilogy(counts, shown, "-", label=key, **_marked(index))
    axes.axhline(1.0, color="#999999", linewidth=1)
    axes.set(
        xlabel="number of stages K",
        ylabel="measured / bound",
        title=f"DDG on {problem}, γ = {gamma:g}, T = {iterations}",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(figure, [axes], path)


def _averages(statements: Sequence[str]) -> list[str]:
    for key in statements:
        if key not in STATEMENTS or STATEMENTS[key].scope is not Scope.AVERAGE:
            known = ", ".join(k for k, s in STATEMENTS.items() if s.scope is Scope.AVERAGE)
            raise ValueError(f"statement {key!r} cannot be drawn; known about averages: {known}")
    if not statements:
        raise ValueError("statements is empty: give at least one")
    return list(statements)


def _reports(
    problem: str,
    num_samples: int,
    statements: list[str],
    points: list[tuple[int, float, int]],
    progress: Progress | None,
) -> list[dict[str, Report]]:
    """Check the statements at every (K, gamma, T)."""
    found: list[dict[str, Report]] = []
    for stages, gamma, iterations in points:
        made, schedule = make(problem, stages, num_samples), methods.ddg(stages)
        found.append({})
        for key in statements:
            found[-1][key] = check(key, made, schedule, gamma, iterations)
            if progress is not None:
                done = (len(found) - 1) * len(statements) + len(found[-1])
                progress(done, len(points) * len(statements))
    return found


def _trivial(problem: str, stages: int, num_samples: int) -> float:
    made = make(problem, stages, num_samples)
    gap = float(made.value(made.start[None])[0]) - made.f_star
    return min(made.M, 2.0 * made.L * gap)


def _bounds_panel(
    axis: Axes, places: list[float], runs: list[dict[str, Report]], trivial: list[float]
) -> None:
    for index, key in enumerate(runs[0]):
        shown = [
            run[key].bound if run[key].verdict is not Verdict.NOT_APPLICABLE else math.nan
            for run in runs
        ]
        if np.isfinite(shown).any():
            axis.plot(places, shown, "--", label=f"{key} (bound)", **_marked(index))
    measured = [next(iter(run.values())).measured for run in runs]
    axis.plot(places, trivial, ":", color="#777777", label="trivial: min(M, 2LΔ)")
    axis.plot(places, measured, "k-", linewidth=2.5, label="measured")


def _marked(index: int) -> dict[str, Any]:
    """A colour and a hollow marker, larger for the first: lines that coincide can all be seen."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "markerfacecolor": "none",
        "markersize": max(4, 9 - 1.5 * index),
    }


def _finish(figure: Figure, axes: list[Axes], path: Path, title: str | None = None) -> None:
    """Grids, one legend beside the data, and the file, which appears whole or not at all."""
    entries: dict[str, Any] = {}
    for axis in axes:
        axis.grid(True, which="major", alpha=0.3)
        axis.title.set_fontsize(10)
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    labels = sorted(entries, key=lambda label: label.startswith(("trivial", "measured")))
    handles = [entries[label] for label in labels]
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    save(figure, path)
