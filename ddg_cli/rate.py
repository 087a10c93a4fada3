"""`ddg verify rate`: which learning rate a training method bears."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from ddg_cli.output import choice, print_json, print_line, print_table


def rate(
    stages: Annotated[int, typer.Option(min=1, max=200, help="Number of stages K.")],
    smoothness: Annotated[float, typer.Option(help="L: Lipschitz constant of the gradient.")],
    method: Annotated[str, typer.Option(help="Training method, as of 'ddg simulate'.")] = "ddg",
    momentum: Annotated[float, typer.Option(help="β of heavy ball, 0 <= β < 1.")] = 0.0,
    sync: Annotated[
        str | None, typer.Option(help="Synchronisation of ddg, fr: none, barrier or mailbox.")
    ] = None,
    semantics: Annotated[
        str | None, typer.Option(help="Weights of ddg's backward: stash, current or replay.")
    ] = None,
    micro_batches: Annotated[
        int | None, typer.Option(max=1024, help="Micro-batches per update, of a pipeline.")
    ] = None,
    chunks: Annotated[
        int | None, typer.Option(max=64, help="Stages per worker, of interleaved.")
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option(max=1024, help="Samples per update, of adl and petra.")
    ] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Iterations T.")] = None,
    gap: Annotated[float | None, typer.Option(help="f(w⁰) − f*.")] = None,
    second_moment: Annotated[
        float | None, typer.Option(help="M of Theorem A: bound on E‖∇f_i‖².")
    ] = None,
    variance: Annotated[
        float | None, typer.Option(help="s² of Theorem V: bound on E‖∇f_i − ∇f‖².")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Which learning rate a method bears: stable on quadratics, suggested, allowed by theorems.

    With --iterations and --gap, and M or s², also each theorem's best rate and its bound.
    """
    from ddg_sim import methods
    from ddg_sim.schedule import Sync
    from theory.rates import rates

    schedule = methods.method(
        method,
        stages,
        choice("--sync", sync, Sync),
        choice("--semantics", semantics, methods.Semantics),
        micro_batches=micro_batches,
        chunks=chunks,
        accumulate=accumulate,
    )
    found = rates(
        schedule,
        smoothness,
        momentum,
        gap=gap,
        iterations=iterations,
        second_moment=second_moment,
        variance=variance,
    )
    basis = "every quadratic with curvature in [0, L] is stable below" + (
        "; for some, not from there on" if found.attained else "; some may bear more"
    )
    if json:
        print_json({"stages": stages, "smoothness": smoothness, **asdict(found), "basis": basis})
        return
    rows = [
        ["stable below", f"{found.stable:.6g}", basis],
        [
            "suggested",
            f"{found.suggested:.6g}",
            "same share of the stable range as without momentum"
            if momentum
            else "1/((2D+1) L), where Theorem D's bound is least",
        ],
    ]
    for allowed in found.allowed:
        limit = "any rate" if allowed.largest == float("inf") else f"below {allowed.largest:.6g}"
        best = "" if allowed.best is None else f"best {allowed.best:.6g}"
        if allowed.bound is not None:
            best += f": mean of E‖∇f‖² at most {allowed.bound:.6g}"
        rows.append([allowed.statement, limit, best])
    title = f"learning rates of {method}, K={stages}, L={smoothness:g}, β={momentum:g}: "
    print_table(title + f"delay D={found.largest_delay}", ["", "rate", ""], rows, left=[""])
    for sentence in found.assumptions:
        print_line(f"assumes: {sentence}" if sentence == found.assumptions[0] else sentence)
    if not found.allowed:
        print_line("Theorems A, V and D do not cover this method with these options")
