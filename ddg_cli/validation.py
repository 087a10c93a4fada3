"""`ddg profile` and `ddg validate`: measure the machine, and compare predictions with runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddg_cli.output import (
    different_files,
    integers,
    interval,
    output_path,
    print_json,
    print_line,
    print_table,
    progress_bar,
    seconds,
    times,
)
from ddg_cli.training import (
    BatchSize,
    Cuts,
    Data,
    Json,
    Model,
    Seed,
    Stages,
    Timeout,
    core_warnings,
    load_data,
)

if TYPE_CHECKING:  # torch loads in seconds; commands that do not train must not wait for it
    from ddg_gpu.validate import Comparison

Rounds = Annotated[
    int, typer.Option(min=1, help="Runs per method; medians are shown, from 6 on with an interval.")
]
_SYNTAX = "METHOD[/SYNC][:OPTION=VALUE]…, such as bp,ddg/none,adl:accumulate=4,gpipe:replay."


def profile(
    model: Model,
    stages: Stages,
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")],
    batch_size: BatchSize = 64,
    data: Data = "digits",
    iterations: Annotated[int, typer.Option(min=1, help="Mini-batches to time.")] = 20,
    cuts: Cuts = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Time the operations of these methods by their rules, too: " + _SYNTAX),
    ] = None,
    json: Json = False,
) -> None:
    """Measure what the stages and links of a network cost.

    Forward, backward, update and transfer times, alone and beside others.
    """
    from ddg_gpu.job import Job
    from ddg_gpu.profile import measure
    from ddg_gpu.validate import checked

    output_path("--output", output)
    job = Job(
        "bp",
        stages,
        model,
        iterations=1,
        batch_size=batch_size,
        cuts=integers("--cuts", cuts),
    )
    own = [checked(job, name) for name in split_methods(methods)] if methods is not None else []
    dataset = load_data(data, job)
    with progress_bar("profile") as progress:
        found = measure(job, dataset, iterations, progress, own)
    found.write(output)
    if json:
        print_json({"output": str(output), **found.model_dump()})
        return
    print_profile(found)
    print_line(f"wrote {output}")


def print_profile(found: Any) -> None:
    """Print a profile as a table."""
    print_table(
        f"{found.model} on {found.data}, batch {found.batch_size}, one {found.device} thread",
        ["stage", "layers", "forward", "backward", "update", "message", "transfer", "params"],
        [
            [
                str(k + 1),
                str(len(stage.layers)),
                seconds(stage.forward),
                seconds(stage.backward),
                seconds(stage.update),
                f"{stage.output_bytes / 1e3:,.0f} kB" if link else "–",
                seconds(link.activation) if link else "–",
                f"{stage.parameter_bytes / 4e3:,.0f} k",
            ]
            for k, stage in enumerate(found.stages)
            for link in [found.links[k] if k < len(found.links) else None]
        ],
    )


def validate(
    model: Model,
    stages: Stages = 2,
    methods: Annotated[str, typer.Option(help=_SYNTAX)] = "bp,ddg/barrier,ddg/none",
    data: Data = "digits",
    iterations: Annotated[int, typer.Option(min=1, help="Mini-batches per run.")] = 60,
    rounds: Rounds = 3,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    cuts: Cuts = None,
    profile: Annotated[
        Path | None, typer.Option(help="Use a file of 'ddg profile' instead of measuring.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write predicted and measured timelines as one trace.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw predicted above measured timelines (.png or .svg).")
    ] = None,
    timeout: Timeout = 120.0,
    json: Json = False,
) -> None:
    """Predict, run and compare: is the prediction true here?

    The costs are measured, unless a profile is given.
    """
    from ddg_gpu.job import Job
    from ddg_gpu.validate import check_profile, checked, compare
    from ddg_sim import profile as profiles

    output_path("--trace", trace)
    output_path("--plot", plot, (".png", ".svg"))
    different_files(profile=profile, trace=trace, plot=plot)
    names = split_methods(methods)
    job = Job(
        "bp",
        stages,
        model,
        iterations=iterations,
        batch_size=batch_size,
        seed=seed,
        cuts=integers("--cuts", cuts),
    )
    jobs = [checked(job, name) for name in names]  # before anything is measured
    known = None if profile is None else profiles.read(profile)
    dataset = load_data(data, job)
    if known is not None:
        check_profile(known, job, dataset.name)
        job = replace(job, cuts=tuple(known.cuts))
    widest = max(jobs, key=lambda own: len(own.schedule().workers))
    warnings = core_warnings(replace(widest, cuts=job.cuts), dataset)
    with progress_bar("profile and run") as progress:
        known, found = compare(
            job,
            names,
            dataset,
            profile=known,
            rounds=rounds,
            timeout=timeout,
            progress=progress,
        )
    write_pictures(found, trace, plot)
    if json:
        print_json(
            {
                "methods": comparison_rows(found),
                "profile": known.model_dump(),
                "timelines": {
                    item.name: {
                        "predicted": spans(item.predicted),
                        "measured": spans(item.run.timeline),
                    }
                    for item in found
                },
                "warnings": warnings,
            }
        )
        return
    print_profile(known)
    print_comparison(found)
    for path in (trace, plot):
        if path is not None:
            print_line(f"wrote {path}")


def split_methods(text: str) -> list[str]:
    """Split a comma-separated list of methods.

    Raises:
        ValueError: if it is empty or repeats one.

    >>> split_methods("bp, ddg/none")
    ['bp', 'ddg/none']
    """
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f"--methods must list different methods, got {text!r}")
    return names


def comparison_rows(found: Sequence[Comparison]) -> dict[str, dict[str, Any]]:
    """Per method the predicted and measured figures, as JSON values."""
    from ddg_gpu.validate import speedups

    predicted = speedups({item.name: item.predicted_period / item.samples for item in found})
    measured = speedups({item.name: item.measured_period / item.samples for item in found})
    return {
        item.name: {
            "samples_per_iteration": item.samples,
            "predicted_period": item.predicted_period,
            "measured_period": item.measured_period,
            "measured_interval": item.measured_interval,
            "error": item.error,
            "predicted_speedup": predicted[item.name],
            "measured_speedup": measured[item.name],
            "bound_by": item.bound_by,
            "test_accuracy": item.run.test_accuracy,
            "loss_last": item.run.losses[-1],
            "weights_sha256": item.run.weights_sha256,
        }
        for item in found
    }


def print_comparison(found: Sequence[Comparison]) -> None:
    """Print predicted beside measured, and what bounds each method."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "predicted": lambda row: seconds(row["predicted_period"]),
        "measured": lambda row: seconds(row["measured_period"]),
        "95 % interval": lambda row: interval(row["measured_interval"]),
        "error": lambda row: f"{100 * row['error']:+.1f} %",
        "predicted\nspeedup": lambda row: times(row["predicted_speedup"]),
        "measured\nspeedup": lambda row: times(row["measured_speedup"]),
    }
    if not any(item.measured_interval for item in found):
        del columns["95 % interval"]
    print_table(
        "Predicted and measured",
        ["method", *columns],
        [
            [name, *(column(row) for column in columns.values())]
            for name, row in comparison_rows(found).items()
        ],
    )
    for item in found:
        print_line(f"{item.name}: {item.bound_by}")


def spans(timeline: Any) -> list[dict[str, Any]]:
    """A timeline's spans as JSON values; seconds."""
    return [
        {"lane": span.lane, "label": span.label, "start": span.start, "end": span.end}
        for span in timeline.spans
    ]


def write_pictures(found: Sequence[Comparison], trace: Path | None, plot: Path | None) -> None:
    """Write the timelines of all methods as one trace, and as one Gantt chart."""
    both = {}
    for item in found:
        both[f"{item.name}, predicted"] = item.predicted
        both[f"{item.name}, measured"] = item.run.timeline
    if trace is not None:
        from ddg_sim.trace import write_trace

        write_trace(trace, both)
    if plot is not None:
        from ddg_sim.plot import gantt

        middle = found[0].predicted.iterations // 2
        gantt(both, plot, (middle, middle + 3))
