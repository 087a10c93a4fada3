"""`ddg verify plot`: pictures of what is stable and of how tight the bounds are."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ddg_cli.output import choice, only, output_path, print_line, progress_bar


class Picture(Enum):
    """What can be drawn."""

    REGION = "region"
    FRONTIER = "frontier"
    BOUNDS = "bounds"
    TIGHTNESS = "tightness"


ON_PROBLEM = ("problem", "samples", "stages", "gamma", "iterations")
#: The options that a picture reads.
READ: dict[Picture, tuple[str, ...]] = {
    Picture.REGION: (),
    Picture.FRONTIER: ("stages", "momentum"),
    Picture.BOUNDS: ON_PROBLEM,
    Picture.TIGHTNESS: ON_PROBLEM,
}


def plot(
    context: typer.Context,
    picture: Annotated[
        str, typer.Argument(help="What to draw: region, frontier, bounds or tightness.")
    ],
    path: Annotated[Path, typer.Argument(help="File to write, .png or .svg.")],
    problem: Annotated[
        str, typer.Option(help="Problem of bounds, tightness, as of 'ddg verify'.")
    ] = "kuramoto",
    samples: Annotated[
        int, typer.Option(min=1, max=8, help="Samples n; 1 also draws bounds for full gradients.")
    ] = 2,
    stages: Annotated[
        int | None, typer.Option(min=1, max=40, help="K of bounds; largest K. [default: 3; 8]")
    ] = None,
    gamma: Annotated[float, typer.Option(help="Step size of bounds, tightness.")] = 0.05,
    iterations: Annotated[
        int, typer.Option(min=2, max=1000, help="Iterations T of bounds, tightness.")
    ] = 10,
    momentum: Annotated[float, typer.Option(help="β of frontier, 0 <= β < 1.")] = 0.0,
) -> None:
    """Draw stable rates, or measured gradients against the bounds on them.

    region: over γL, delay and momentum. frontier: of each method over K. bounds: over T, K and γ,
    of DDG. tightness: measured/bound over K.
    """
    chosen = choice("picture", picture, Picture)
    only(context, chosen.value, "picture", "path", *READ[chosen])
    output_path("PATH", path, (".png", ".svg"))
    from theory import plot as draw

    if chosen is Picture.REGION:
        draw.region(path)
    elif chosen is Picture.FRONTIER:
        draw.frontier(path, max_stages=stages or 8, momentum=momentum)
    else:
        on_problem, largest = (
            (draw.bounds, stages or 3)
            if chosen is Picture.BOUNDS
            else (draw.tightness, stages or 8)
        )
        with progress_bar("verify") as progress:
            on_problem(
                path, problem, largest, gamma, iterations, num_samples=samples, progress=progress
            )
    print_line(f"wrote {path}")
