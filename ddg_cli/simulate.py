"""`ddg simulate`: what a schedule costs, from given or measured times."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ddg_cli.output import (
    choice,
    different_files,
    numbers,
    output_path,
    percent,
    print_json,
    print_line,
    print_table,
    seconds,
    times,
)


def simulate(
    method: Annotated[
        str,
        typer.Argument(
            help="Training method: bp, ddg, fr, fdg, adl, dsp, dgl, gpipe, 1f1b, interleaved,"
            " zb-h1, pipedream, pipedream-2bw, stale, pb, spectrain, xpipe, pipemare, sideways,"
            " petra, ouroboros, pd-asgd or dp."
        ),
    ],
    stages: Annotated[int, typer.Option(min=1, help="Number of stages K.")],
    forward: Annotated[
        str | None, typer.Option(help="Seconds per stage: 1 for all, or 1,2,… [default: 1]")
    ] = None,
    backward: Annotated[
        str | None, typer.Option(help="Seconds per stage: 2 for all, or 1,2,… [default: 2]")
    ] = None,
    update: Annotated[
        str | None, typer.Option(help="Seconds per stage: one for all, or a list. [default: 0]")
    ] = None,
    comm: Annotated[
        str | None,
        typer.Option(help="Seconds per message: one for all, or a list of K-1 links. [default: 0]"),
    ] = None,
    sync: Annotated[
        str | None, typer.Option(help="Synchronisation of ddg, fr: none, barrier or mailbox.")
    ] = None,
    semantics: Annotated[
        str | None, typer.Option(help="Weights of ddg's backward: stash, current or replay.")
    ] = None,
    micro_batches: Annotated[
        int | None,
        typer.Option(help="Micro-batches per update, of a pipeline. [default: mostly K]"),
    ] = None,
    chunks: Annotated[
        int | None, typer.Option(help="Stages per worker, of interleaved. [default: 2]")
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option(help="Samples per update, of adl and petra. [default: 2, 1]")
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(help="Data-parallel copies of any method. [default: 1]")
    ] = None,
    iterations: Annotated[
        int | None, typer.Option(min=1, help="Iterations of the timeline. [default: 100, or 4 K]")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Take the times from a file of 'ddg profile'.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="des: SimPy plays the run. cycle: exact max-plus evaluation.")
    ] = "cycle",
    trace: Annotated[
        Path | None, typer.Option(help="Write a Chrome trace, which Perfetto opens.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a Gantt chart (.png or .svg).")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Predict speed, staleness and memory of a training method.

    The times are given, measured by 'ddg profile', or 1 s forward and 2 s backward.
    """
    from ddg_sim import methods
    from ddg_sim.costs import costs
    from ddg_sim.predict import predict
    from ddg_sim.profile import read
    from ddg_sim.schedule import Sync

    output_path("--trace", trace)
    output_path("--plot", plot, (".png", ".svg"))
    different_files(profile=profile, trace=trace, plot=plot)
    schedule = methods.method(
        method,
        stages,
        choice("--sync", sync, Sync),
        choice("--semantics", semantics, methods.Semantics),
        replicas=replicas,
        micro_batches=micro_batches,
        chunks=chunks,
        accumulate=accumulate,
    )
    given = {"forward": forward, "backward": backward, "update": update, "comm": comm}
    chosen: dict[str, Any] = {
        name: numbers(f"--{name}", text) for name, text in given.items() if text is not None
    }
    contention: tuple[float, ...] | None = None
    if profile is not None:
        if chosen:
            raise ValueError(f"--{next(iter(chosen))} and --profile exclude each other")
        measured = read(profile)
        table, contention = measured.costs(), measured.contention
        if table.num_stages != stages:
            raise ValueError(
                f"--stages {stages}: the profile {profile} has {table.num_stages} stages"
            )
    else:
        table = costs(stages, **chosen)
    if iterations is None:
        iterations = max(100, 4 * stages)
    found = predict(schedule, table, iterations, engine, contention)
    if trace is not None:
        from ddg_sim.trace import write_trace

        write_trace(trace, {f"{method} (predicted)": found.timeline})
    if plot is not None:
        from ddg_sim.plot import gantt

        first = schedule.num_ticks(0)
        shown = (0, min(iterations - 1, first + 5))
        gantt({f"{method}, {stages} stages, predicted": found.timeline}, plot, shown)
    if json:
        print_json(
            {
                "method": method,
                "stages": stages,
                "sync": schedule.sync.value,
                "engine": engine,
                "iterations": iterations,
                "period": found.period,
                "period_is_exact": found.period_is_exact,
                "speedup_over_bp": found.speedup_over_bp,
                "makespan": found.timeline.makespan,
                "utilisation": found.utilisation,
                "bubble": found.bubble,
                "staleness": found.staleness,
                "peak_activations": [stage.activations for stage in found.memory],
                "weight_versions": [stage.weight_versions for stage in found.memory],
                "critical_cycle": found.cycle.critical_cycle,
                "bound_by": found.cycle.explain(),
            }
        )
        return
    # A worker may hold several stages; of a stage on two workers, the one that updates it counts.
    per_stage = [found.utilisation[schedule.worker_of(stage)] for stage in range(stages)]
    print_table(
        f"{method} on {stages} stage{'s' if stages > 1 else ''}, sync {schedule.sync.value}",
        ["stage", "utilisation", "staleness", "peak activations", "weight versions"],
        [
            [str(k + 1), percent(busy), str(old), str(held.activations), str(held.weight_versions)]
            for k, (busy, old, held) in enumerate(
                zip(per_stage, found.staleness, found.memory, strict=True)
            )
        ],
    )
    speedup = times(found.speedup_over_bp)
    print_line(f"period {seconds(found.period)} per iteration, {speedup} over backpropagation")
    print_line(f"makespan {seconds(found.timeline.makespan)} for {iterations} iterations")
    print_line(found.cycle.explain())
    for path in (trace, plot):
        if path is not None:
            print_line(f"wrote {path}")
