"""`ddg demo`: the whole loop on real data: profile, predict, train, compare, verify."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated, Any

import typer

from ddg_cli import training, validation
from ddg_cli.output import print_json, print_line, progress_bar


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the report.")] = Path(
        "ddg-demo"
    ),
    model: training.Model = "resnet20",
    iterations: Annotated[int, typer.Option(min=1, help="Mini-batches per run.")] = 60,
    rounds: validation.Rounds = 6,
    batch_size: training.BatchSize = 64,
    json: training.Json = False,
) -> None:
    """Predict, train, compare and verify: the whole loop.

    Backpropagation and DDG with 2 processes on the digits; takes a minute or two.
    """
    from ddg_gpu.job import Job
    from ddg_gpu.plot import loss_curves
    from ddg_gpu.validate import compare
    from ddg_sim.files import replacing
    from ddg_sim.methods import ddg
    from theory.check import check
    from theory.problems import make

    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output}: is a file, give a folder")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"--output {output}: the folder {output.parent} does not exist")
    job = Job("bp", 2, model, iterations=iterations, batch_size=batch_size)
    dataset = training.load_data("digits", job)
    warnings = training.core_warnings(job, dataset)
    with progress_bar("profile and train") as progress:
        profile, found = compare(
            job, ["bp", "ddg/barrier", "ddg/none"], dataset, rounds=rounds, progress=progress
        )
    checked = check("theorem-a", make("rotation-chain", 2), ddg(2), gamma=0.05, iterations=10)

    output.mkdir(exist_ok=True)
    profile.write(output / "profile.json")
    validation.write_pictures(found, output / "trace.json", output / "timelines.png")
    loss_curves(
        {item.name: (item.run.losses, item.measured_period) for item in found},
        output / "losses.png",
    )
    result: dict[str, Any] = {
        "model": model,
        "data": dataset.name,
        "methods": validation.comparison_rows(found),
        "verified": {
            "statement": checked.statement,
            "problem": checked.problem,
            "measured": checked.measured,
            "bound": checked.bound,
            "verdict": checked.verdict.value,
            "paths": checked.paths,
        },
        "warnings": warnings,
    }
    with replacing(output / "result.json") as temporary:
        temporary.write_text(json_format.dumps(result, indent=2) + "\n", encoding="utf-8")
    if json:
        print_json({**result, "report": str(output)})
        return
    validation.print_profile(profile)
    validation.print_comparison(found)
    print_line(
        f"{checked.statement} on {checked.problem}: average ‖∇f‖² {checked.measured:.4g}"
        f" ≤ {checked.bound:.4g}, {checked.verdict.value} over all {checked.paths} sample paths"
    )
    print_line(
        f"report in {output}: result.json, profile.json, trace.json, timelines.png, losses.png"
    )
