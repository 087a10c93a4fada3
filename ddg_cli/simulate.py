"""`ddg simulate`: what a schedule costs, from given or measured times."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddg_cli.output import (
    choice,
    different_files,
    durations,
    output_path,
    percent,
    print_json,
    print_line,
    print_table,
    seconds,
    times,
)

if TYPE_CHECKING:
    from ddg_sim.contention import Contention
    from ddg_sim.costs import Costs
    from ddg_sim.schedule import Schedule
    from ddg_sim.whatif import Change

#: Operations of a timeline that nobody asked to be longer, and the most that anybody may ask for.
QUICK, LARGEST = 300_000, 3_000_000
Times = str | None


def _parsed(given: dict[str, Times]) -> dict[str, Any]:
    """The options that were given, as times."""
    return {
        name: durations(_option(name), text) for name, text in given.items() if text is not None
    }


def _applicable(method: str, given: dict[str, Any]) -> None:
    """Refuse options that the method does not take."""
    from inspect import signature

    from ddg_sim.methods import METHODS

    if method not in METHODS:
        return  # said by whoever builds the schedule
    known = [name for name in signature(METHODS[method]).parameters if name in given]
    for name, value in given.items():
        if value is not None and name not in known and (name, value) != ("sync", "none"):
            takes = ", ".join(map(_option, known)) or "none of these options"
            raise ValueError(
                f"{_option(name)} {value!r} does not apply to {method}, which takes {takes}"
            )


def _no_such_operation(schedule: Schedule, given: dict[str, Times]) -> None:
    """Refuse times of what the schedule does not do."""
    from ddg_sim.dependencies import dependencies
    from ddg_sim.schedule import OpKind, Sync

    kinds = {template.kind for template in schedule.templates()}
    messages = any(edge.travels for edge in dependencies(schedule))
    there = {
        "recompute": (OpKind.RECOMPUTE in kinds, "recomputes nothing"),
        "all_reduce": (OpKind.ALL_REDUCE in kinds, "has no replicas"),
        "barrier": (schedule.sync is Sync.BARRIER, "has no barriers"),
        "comm": (messages, "sends no messages"),
        "message": (messages, "sends no messages"),
    }
    for name, (some, why) in there.items():
        if given[name] is not None and not some:
            raise ValueError(
                f"{_option(name)} {given[name]!r}: {schedule.method} on {schedule.num_stages}"
                f" stage{'s' if schedule.num_stages > 1 else ''}, sync {schedule.sync.value}, {why}"
            )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def simulate(
    method: Annotated[
        str,
        typer.Argument(
            help="Training method: bp, ddg, fr, fdg, adl, dsp, dgl, gpipe, 1f1b, interleaved,"
            " zb-h1, pipedream, pipedream-2bw, stale, pb, spectrain, xpipe, pipemare, sideways,"
            " petra, ouroboros, pd-asgd or dp."
        ),
    ],
    stages: Annotated[int, typer.Option(min=1, max=1000, help="Number of stages K.")],
    forward: Annotated[Times, typer.Option(help="Seconds, forward pass. [default: 1]")] = None,
    backward: Annotated[Times, typer.Option(help="Seconds, backward pass. [default: 2]")] = None,
    update: Annotated[Times, typer.Option(help="Seconds, weight update. [default: 0]")] = None,
    comm: Annotated[Times, typer.Option(help="Seconds per message and link. [default: 0]")] = None,
    recompute: Annotated[
        Times, typer.Option(help="Seconds, second forward pass. [default: as --forward]")
    ] = None,
    all_reduce: Annotated[
        Times, typer.Option(help="Seconds, gradients' mean over replicas. [default: 0]")
    ] = None,
    overhead: Annotated[
        Times, typer.Option(help="Host seconds per operation. [default: 0]")
    ] = None,
    message: Annotated[
        Times, typer.Option(help="Host seconds per message sent or received. [default: 0]")
    ] = None,
    jitter: Annotated[
        Times, typer.Option(help="Factor on every operation, drawn for each. [default: 1]")
    ] = None,
    slowdown: Annotated[
        Times, typer.Option(help="Factor on all of a run, drawn once per run. [default: 1]")
    ] = None,
    barrier: Annotated[Times, typer.Option(help="Seconds per barrier. [default: 0]")] = None,
    blocking: Annotated[
        bool, typer.Option("--blocking", help="Senders wait until their message has arrived.")
    ] = False,
    sync: Annotated[
        str | None, typer.Option(help="Synchronisation of ddg, fr: none, barrier or mailbox.")
    ] = None,
    semantics: Annotated[
        str | None, typer.Option(help="Weights of ddg's backward: stash, current or replay.")
    ] = None,
    micro_batches: Annotated[
        int | None,
        typer.Option(max=1024, help="Micro-batches per update, of a pipeline. [default: about K]"),
    ] = None,
    chunks: Annotated[
        int | None, typer.Option(max=64, help="Stages per worker, of interleaved. [default: 2]")
    ] = None,
    accumulate: Annotated[
        int | None,
        typer.Option(max=1024, help="Samples per update, of adl and petra. [default: 2, 1]"),
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(max=65_536, help="Data-parallel copies of any method. [default: 1; dp: 2]"),
    ] = None,
    stages_per_device: Annotated[
        int,
        typer.Option(min=1, max=1000, help="Consecutive workers that take turns on a device."),
    ] = 1,
    iterations: Annotated[
        int | None, typer.Option(min=1, help="Iterations of the timeline. [default: about 100]")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Take the times from a file of 'ddg profile'.")
    ] = None,
    vary: Annotated[
        bool, typer.Option("--vary", help="Draw times from the profile's samples, not medians.")
    ] = False,
    precision: Annotated[
        float, typer.Option(help="Where times vary: half width of the 95 % interval to aim at.")
    ] = 0.01,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Of the draws, where times vary.")
    ] = 0,
    what_if: Annotated[
        bool, typer.Option("--what-if", help="Say which single changes would help most.")
    ] = False,
    cores: Annotated[
        int | None,
        typer.Option(min=1, help="Cores that all workers share. [default: one for each]"),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="des: SimPy plays the run. cycle: exact max-plus evaluation. [default: cycle;"
            " des where workers share cores]"
        ),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write a Chrome trace, which Perfetto opens.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a Gantt chart (.png or .svg).")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Predict speed, staleness and memory of a training method.

    The times are given, measured by 'ddg profile', or 1 s forward and 2 s backward. A time is one
    for all stages, a list (1,2,…), or a distribution: normal(centre,std), which is cut off at 0,
    lognormal(mean,std), gamma(mean,std), samples(a,b,…); a factor may also be
    straggler(probability,factor).
    """
    from ddg_sim import methods
    from ddg_sim.contention import contended
    from ddg_sim.costs import costs
    from ddg_sim.eventgraph import shares_cores
    from ddg_sim.folding import fold
    from ddg_sim.network import Network
    from ddg_sim.predict import predict
    from ddg_sim.profile import read
    from ddg_sim.schedule import Sync

    output_path("--trace", trace)
    output_path("--plot", plot, (".png", ".svg"))
    different_files(profile=profile, trace=trace, plot=plot)
    built = {"micro_batches": micro_batches, "chunks": chunks, "accumulate": accumulate}
    _applicable(method, {"sync": sync, "semantics": semantics} | built)
    schedule = methods.method(
        method,
        stages,
        choice("--sync", sync, Sync),
        choice("--semantics", semantics, methods.Semantics),
        replicas=replicas,
        **built,
    )
    schedule = fold(schedule, stages_per_device)
    given = {"forward": forward, "backward": backward, "update": update, "comm": comm}
    given |= {"recompute": recompute, "overhead": overhead, "message": message}
    given |= {"barrier": barrier}
    # These a profile does not know.
    _no_such_operation(schedule, given | {"all_reduce": all_reduce})
    factors = {"jitter": jitter, "slowdown": slowdown, "all_reduce": all_reduce}
    chosen, varied = _parsed(given), _parsed(factors)
    contention: Contention | None = None
    before: Costs | None = None
    if profile is not None:
        if chosen:
            option = next(iter(chosen)).replace("_", "-")
            raise ValueError(f"--{option} and --profile exclude each other")
        measured = read(profile)
        prices, before = measured.costs(schedule), measured.costs()
        contention = measured.contention
        if vary:
            prices, before = measured.varying_costs(schedule), measured.varying_costs()
        if prices.num_stages != stages:
            raise ValueError(
                f"--stages {stages}: the profile {profile} has {prices.num_stages} stages"
            )
        even = costs(stages, **varied)
        prices, before = (
            replace(each, jitter=even.jitter, slowdown=even.slowdown, all_reduce=even.all_reduce)
            for each in (prices, before)
        )
    else:
        if vary:
            raise ValueError("--vary needs a --profile, whose samples it draws from")
        prices = costs(stages, **chosen, **varied)
    prices = replace(prices, network=Network(blocking=blocking), cores=cores)
    per_iteration = sum(map(len, schedule.workers))
    if iterations is None:
        iterations = min(max(100, 4 * stages), max(1, QUICK // per_iteration))
    elif iterations * per_iteration > LARGEST:
        raise ValueError(
            f"--iterations {iterations}: that is {iterations * per_iteration:,} operations to"
            f" simulate: give at most {LARGEST // per_iteration}"
        )
    if engine is None:
        engine = "des" if shares_cores(schedule, prices) else "cycle"
    found = predict(schedule, prices, iterations, engine, contention, precision, seed, before)
    slowed = prices if contention is None else contended(schedule, prices, contention)
    changes: list[Change] = []
    if what_if:
        from ddg_sim.whatif import improvements

        changes = improvements(schedule, slowed)
    if trace is not None:
        from ddg_sim.trace import write_trace

        write_trace(trace, {f"{method} (predicted)": found.timeline})
    if plot is not None:
        from ddg_sim.plot import gantt, window

        shown = window(found.timeline)
        gantt({f"{method}, {stages} stages, predicted": found.timeline}, plot, shown)
    if json:
        print_json(
            {
                "method": method,
                "stages": stages,
                "sync": schedule.sync.value,
                "engine": engine,
                "iterations": iterations,
                "samples_per_iteration": schedule.samples_per_iteration * schedule.replicas,
                "replicas": schedule.replicas,
                "period": found.period.value,
                "period_interval": [found.period.low, found.period.high],
                "period_is_exact": found.period_is_exact,
                "speedup_over_bp": found.speedup.value if found.speedup else None,
                "speedup_interval": [found.speedup.low, found.speedup.high]
                if found.speedup
                else None,
                "makespan": found.timeline.makespan,
                "utilisation": found.utilisation,
                "bubble": found.bubble,
                "staleness": found.staleness,
                "peak_activations": [stage.activations for stage in found.memory],
                "weight_versions": [stage.weight_versions for stage in found.memory],
                "critical_cycle": found.cycle.critical_cycle if found.cycle else None,
                "bound_by": found.bound_by,
                "what_if": [asdict(change) for change in changes] if what_if else None,
            }
        )
        return
    # A worker may hold several stages; of a stage on two workers, the one that updates it counts.
    per_stage = [found.utilisation[schedule.worker_of(stage)] for stage in range(stages)]
    title = f"{method} on {stages} stage{'s' if stages > 1 else ''}, sync {schedule.sync.value}"
    if schedule.replicas > 1:
        title += f", {schedule.replicas} replicas"
    if schedule.samples_per_iteration > 1:
        title += f", {schedule.samples_per_iteration} samples per iteration"
    print_table(
        title,
        ["stage", "utilisation", "staleness", "peak activations", "weight versions"],
        [
            [str(k + 1), percent(busy), str(old), str(held.activations), str(held.weight_versions)]
            for k, (busy, old, held) in enumerate(
                zip(per_stage, found.staleness, found.memory, strict=True)
            )
        ],
    )
    speedup = times(found.speedup.value if found.speedup else None)
    period = seconds(found.period.value)
    if found.period.runs:
        period += f" ± {percent(found.period.relative_width)} ({found.period.runs} runs, 95 %)"
    print_line(f"period {period} per iteration, {speedup} over backpropagation")
    print_line(f"makespan {seconds(found.timeline.makespan)} for {iterations} iterations")
    if found.period.runs and found.period.relative_width > precision:
        print_line(
            f"the interval is wider than --precision {precision:g}: the runs differ too much"
        )
    varied_text = " (with mean times; what comes on top is waiting, for times vary)"
    print_line(found.bound_by + (varied_text if prices.random else ""))
    if schedule.replicas > 1 and not any(prices.all_reduce):
        print_line("note: averaging gradients over replicas costs nothing here (--all-reduce)")
    if slowed != prices:
        print_line("times include how the profile's stages slow each other down where they overlap")
    if what_if:
        print_table(
            "what would help most" + (" (with mean times)" if prices.random else ""),
            ["change", "period", "saves"],
            [[change.what, seconds(change.period), percent(change.gain)] for change in changes]
            or [["none of the single changes that were tried", "", ""]],
        )
    for path in (trace, plot):
        if path is not None:
            print_line(f"wrote {path}")
