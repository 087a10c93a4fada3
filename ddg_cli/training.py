"""`ddg train`: train a network by a schedule; also what all commands that run share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddg_cli.output import (
    choice,
    different_files,
    integers,
    output_path,
    percent,
    print_json,
    print_line,
    print_table,
    progress_bar,
    seconds,
    warn,
)

if TYPE_CHECKING:  # torch loads in seconds; commands that do not train must not wait for it
    from ddg_gpu.data import Dataset
    from ddg_gpu.job import Job

Model = Annotated[
    str,
    typer.Option(
        help="Network: mlp, resnet8, resnet20, resnet56, resnet110, revnet16, revnet40; of text"
        " gpt-tiny or gpt-tiny-tied."
    ),
]
Data = Annotated[
    str,
    typer.Option(
        help="digits, text, or the path of CIFAR-10, of a folder of images or of a .txt file."
    ),
]
Stages = Annotated[int, typer.Option(min=1, help="Number of stages K.")]
BatchSize = Annotated[
    int, typer.Option(min=1, help="Examples per mini-batch, or per micro-batch of a method's.")
]
Seed = Annotated[
    int,
    typer.Option(min=0, max=2**63 - 1, help="Of weights, data order, augmentation and dropout."),
]
Cuts = Annotated[
    str | None, typer.Option(help="First layer of stages 2..K, such as 3,6. [default: balanced]")
]
Optimizer = Annotated[str, typer.Option(help="sgd (with momentum) or adam.")]
Rate = Annotated[float | None, typer.Option(help="Default: 0.05 for sgd, 0.001 for adam.")]
Timeout = Annotated[
    float, typer.Option(min=0.001, max=1e6, help="Seconds that a worker waits for another.")
]
_RESTART: dict[str, Any] = {"rich_help_panel": "Checkpoints and restarts"}
_SOME: dict[str, Any] = {"rich_help_panel": "Options of single methods"}
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


def train(
    method: Annotated[
        str,
        typer.Argument(
            help="Training method; ddg simulate --help lists them. ouroboros needs gpt-tiny-tied,"
            " petra revnet16."
        ),
    ],
    stages: Stages,
    model: Model,
    executor: Annotated[
        str, typer.Option(help="serial: this process. distributed: a process per worker.")
    ] = "serial",
    data: Data = "digits",
    iterations: Annotated[
        int | None,
        typer.Option(
            min=1, help="Mini-batches to train on (each of several micro-batches, of some methods)."
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Or passes over the data.")] = None,
    sync: Annotated[
        str | None, typer.Option(help="Synchronisation of ddg, fr: none, barrier or mailbox.")
    ] = None,
    semantics: Annotated[
        str | None,
        typer.Option(
            help="Weights of ddg's delayed backward: stash, current or replay. [default: stash]"
        ),
    ] = None,
    micro_batches: Annotated[
        int | None,
        typer.Option(max=1024, help="Per update, of a pipeline. [default: about K]", **_SOME),
    ] = None,
    chunks: Annotated[
        int | None, typer.Option(max=64, help="interleaved: stages per worker. [2]", **_SOME)
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option(max=1024, help="adl: mini-batches per update. [2]", **_SOME)
    ] = None,
    delays: Annotated[
        str | None, typer.Option(help="ddg, dsp: of stages 1..K, such as 2,1,0.", **_SOME)
    ] = None,
    lags: Annotated[
        str | None, typer.Option(help="dsp: of stages 1..K, such as 1,1,0.", **_SOME)
    ] = None,
    shrink: Annotated[
        float | None, typer.Option(help="fdg: factor on the error per stage. [1]", **_SOME)
    ] = None,
    buffer: Annotated[
        int | None, typer.Option(help="dgl: iterations between two stages. [0]", **_SOME)
    ] = None,
    replay: Annotated[
        bool, typer.Option("--replay", help="gpipe: run forward again, keep less.", **_SOME)
    ] = False,
    vertical_sync: Annotated[
        bool,
        typer.Option("--vertical-sync", help="pipedream: one version on all stages.", **_SOME),
    ] = False,
    spike: Annotated[
        bool, typer.Option("--spike", help="pb: spike compensation (sgd).", **_SOME)
    ] = False,
    predict: Annotated[
        bool, typer.Option("--predict", help="pb: linear weight prediction.", **_SOME)
    ] = False,
    replicas: Annotated[
        int | None,
        typer.Option(max=1024, help="Copies that train on other mini-batches. [dp: 2]", **_SOME),
    ] = None,
    anneal: Annotated[
        float | None, typer.Option(help="pipemare: updates of rescaled rates. [0]", **_SOME)
    ] = None,
    decay: Annotated[
        float | None, typer.Option(help="pipemare: of its discrepancy correction. [0]", **_SOME)
    ] = None,
    optimizer: Optimizer = "sgd",
    learning_rate: Rate = None,
    momentum: Annotated[float, typer.Option(help="Of sgd.")] = 0.9,
    weight_decay: Annotated[float, typer.Option(help="Coefficient of the L2 penalty.")] = 5e-4,
    milestones: Annotated[
        str | None, typer.Option(help="Updates after which the rate drops, such as 500,750.")
    ] = None,
    rate_factor: Annotated[float, typer.Option(help="By which it drops.")] = 0.1,
    clip_norm: Annotated[
        float | None, typer.Option(help="Most norm of a stage's gradient. [default: any]")
    ] = None,
    precision: Annotated[str, typer.Option(help="float32 or bf16 (autocast).")] = "float32",
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Keep inputs only, run forward again.")
    ] = False,
    non_finite: Annotated[
        str, typer.Option(help="At a loss that is NaN or inf: raise, or skip the sample.")
    ] = "raise",
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    cuts: Cuts = None,
    save: Annotated[Path | None, typer.Option(help="Write the trained weights.")] = None,
    load: Annotated[Path | None, typer.Option(help="Start from weights of --save.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write the measured Chrome trace.")] = None,
    log: Annotated[
        Path | None, typer.Option(help="Folder for a line of JSON per update and stage.")
    ] = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(help="Folder for checkpoints, with all that is in flight.", **_RESTART),
    ] = None,
    every: Annotated[
        int, typer.Option(min=1, help="Iterations between two checkpoints.", **_RESTART)
    ] = 100,
    keep: Annotated[int, typer.Option(min=1, help="Newest ones that stay.", **_RESTART)] = 2,
    flush: Annotated[
        bool,
        typer.Option(
            "--flush",
            help="Empty the pipeline before each: other stages can go on from it, but delays begin"
            " anew.",
            **_RESTART,
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint.", **_RESTART)
    ] = False,
    restarts: Annotated[
        int,
        typer.Option(min=0, help="Times to go on by itself after a worker failed.", **_RESTART),
    ] = 0,
    timeout: Timeout = 120.0,
    port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65535,
            envvar="DDG_PORT",
            help="TCP port of the workers. [default: a free one]",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Train a network by a schedule.

    The weights do not depend on executor or synchronisation, bit for bit.
    """
    from ddg_gpu import checkpoint
    from ddg_gpu.job import Job
    from ddg_gpu.snapshots import Snapshots
    from ddg_gpu.train import EXECUTORS
    from ddg_gpu.train import train as run_training
    from ddg_sim.methods import RULES, Semantics
    from ddg_sim.schedule import Sync

    output_path("--save", save)
    output_path("--trace", trace)
    different_files(save=save, trace=trace)
    if checkpoints is None and (resume or restarts or flush):
        name = "--resume" if resume else "--restarts" if restarts else "--flush"
        raise ValueError(f"{name} needs --checkpoints FOLDER")
    if executor not in EXECUTORS:  # before any data is read
        raise ValueError(f"unknown --executor {executor!r}; known: {', '.join(EXECUTORS)}")
    if executor == "serial" and restarts:
        raise ValueError("--restarts needs --executor distributed")
    if load is not None and resume:
        raise ValueError("--load starts a run, --resume goes on with one: give one of them")
    snapshots = None if checkpoints is None else Snapshots(checkpoints, every, keep, flush)
    given = {
        "micro_batches": micro_batches,
        "chunks": chunks,
        "accumulate": accumulate,
        "delays": integers("--delays", delays),
        "lags": integers("--lags", lags),
        "shrink": shrink,
        "buffer": buffer,
        "replay": replay or None,
        "vertical_sync": vertical_sync or None,
        "spike": spike or None,
        "predict": predict or None,
        "replicas": replicas,
        "anneal": anneal,
        "decay": decay,
    }
    options = {name: value for name, value in given.items() if value is not None}
    job = Job(
        method,
        stages,
        model,
        iterations=iterations,
        epochs=epochs,
        sync=choice("--sync", sync, Sync),
        semantics=choice("--semantics", semantics, Semantics),
        options=options,
        batch_size=batch_size,
        optimizer=optimizer,
        learning_rate=learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
        seed=seed,
        cuts=integers("--cuts", cuts),
        load=load,
        clip_norm=clip_norm,
        milestones=integers("--milestones", milestones) or (),
        rate_factor=rate_factor,
        precision=precision,
        recompute=recompute,
        non_finite=non_finite,
    )
    dataset = load_data(data, job)
    warnings = core_warnings(job, dataset) if executor == "distributed" else []
    with progress_bar("train") as progress:
        run = run_training(
            job,
            dataset,
            executor,
            timeout=timeout,
            port=port,
            progress=progress,
            snapshots=snapshots,
            resume=resume,
            restarts=restarts,
            warn=warn,
            log=log,
        )
    if run is None:  # another rank under torchrun reports
        return
    if save is not None:
        checkpoint.save(run.model, save, {"method": method, "model": model, "data": dataset.name})
    if trace is not None:
        from ddg_sim.trace import write_trace

        write_trace(trace, {f"{method} (measured)": run.timeline})
    schedule = job.schedule()
    result = {
        "method": method,
        "stages": stages,
        "sync": schedule.sync.value,
        "semantics": {rule: name.value for name, rule in RULES.items()}.get(schedule.rule),
        "options": options,
        "executor": executor,
        "model": model,
        "data": dataset.name,
        "data_note": dataset.note,
        "cuts": list(run.cuts),
        "iterations": run.iterations,
        "samples_per_iteration": schedule.samples_per_iteration,
        "loss_first": run.losses[0],
        "loss_last": run.losses[-1],
        "skipped": run.skipped,
        "test_accuracy": run.test_accuracy,
        "period": run.timeline.period,
        "weights_sha256": run.weights_sha256,
        "warnings": warnings,
    }
    if json:
        print_json(result)
        return
    note = f" ({dataset.note})" if dataset.note else ""
    print_table(
        f"{method} on {stages} stage{'s' if stages > 1 else ''}, {executor}, {model}",
        ["", ""],
        [
            ["iterations", str(run.iterations)],
            ["loss of the first, last mini-batch", f"{run.losses[0]:.4f}, {run.losses[-1]:.4f}"],
            [f"test accuracy{note}", percent(run.test_accuracy)],
            ["period", seconds(run.timeline.period)],
            ["layers start new stages at", ", ".join(map(str, run.cuts)) or "–"],
        ],
    )
    print_line(f"weights sha256 {run.weights_sha256}")
    for path in (save, trace):
        if path is not None:
            print_line(f"wrote {path}")


def load_data(source: str, job: Job) -> Dataset:
    """Load the data, after checking whatever of the job can be checked without it."""
    from ddg_gpu import data, models

    if not source.strip():
        raise ValueError("--data is empty: give digits or a path")
    job.schedule()
    if job.model not in models.MODELS:
        known = ", ".join(models.MODELS)
        raise ValueError(f"unknown --model {job.model!r}; known models: {known}")
    with progress_bar("load data") as progress:
        return data.load(source, progress=progress)


def core_warnings(job: Job, dataset: Dataset) -> list[str]:
    """Warn if there are fewer cores than processes; gives the warnings for the JSON object.

    Raises:
        ValueError: if the job cannot be run on the data, which must be said instead.
    """
    from ddg_gpu.job import network
    from ddg_gpu.validate import too_few_cores

    warning = too_few_cores(len(job.schedule().workers))
    if warning is None:
        return []
    network(job, dataset)
    warn(warning)
    return [warning]
