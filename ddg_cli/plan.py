"""`ddg plan`: which method, with how many stages, is fastest on these devices?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddg_cli.output import (
    choice,
    different_files,
    durations,
    output_path,
    print_json,
    print_line,
    print_table,
    progress_bar,
    seconds,
    times,
)

if TYPE_CHECKING:
    from ddg_sim.plan import Plan, Row
    from ddg_sim.schedule import Schedule

ASSUMPTION = (
    "A batch is the samples of one update over all replicas: with m micro-batches on R replicas,"
    " an operation runs on batch/(m R) samples. Seconds and bytes of a layer grow with that number,"
    " the host's seconds per operation do not."
)


def plan(
    profile: Annotated[
        Path,
        typer.Option(
            help="Layers: a file of 'ddg profile', a torch.profiler trace or a PipeDream graph.txt."
        ),
    ],
    stages: Annotated[str, typer.Option(help="Numbers of stages, as 1..16 or 2,4,8.")],
    methods: Annotated[
        str, typer.Option(help="Methods, as bp,ddg,gpipe; all: every known one.")
    ] = "bp,dp,ddg,gpipe,1f1b,pipedream",
    cluster: Annotated[
        Path | None,
        typer.Option(
            help="Devices and links, as JSON. [default: any number of equal devices, free links]"
        ),
    ] = None,
    batch_sizes: Annotated[
        str | None,
        typer.Option(help="Samples per update over all replicas. [default: the profile's]"),
    ] = None,
    micro_batches: Annotated[
        str | None,
        typer.Option(
            help="Per update; methods that do not split take 1. [default: each method's own]"
        ),
    ] = None,
    replicas: Annotated[
        str, typer.Option(help="Data-parallel copies; dp takes stages x replicas devices.")
    ] = "1",
    sync: Annotated[
        str | None,
        typer.Option(help="none, barrier, mailbox: one or several. [default: each method's own]"),
    ] = None,
    stages_per_device: Annotated[
        str,
        typer.Option(help="Consecutive stages that take turns on a device, as 1 or 1,2,4."),
    ] = "1",
    optimizer: Annotated[
        str, typer.Option(help="sgd, momentum or adam: what it keeps per parameter.")
    ] = "sgd",
    profile_batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Batch that the profile was measured with, if it does not say."),
    ] = None,
    jitter: Annotated[
        str, typer.Option(help="Factor on every operation, as 'lognormal(1,0.1)'.")
    ] = "1",
    seed: Annotated[int | None, typer.Option(min=0, help="Of the jitter. [default: 0]")] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Look for the best cuts as long as it takes.")
    ] = False,
    jobs: Annotated[int, typer.Option(help="Processes; -1 takes all cores.")] = -1,
    top: Annotated[int | None, typer.Option(min=1, help="Rows of the table. [default: 20]")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Speedup curves and heat maps: one picture (.png, .svg), or a folder."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Rank methods, stages and batches by predicted speed.

    A batch is the samples of one update over all replicas: with m micro-batches on R replicas, an
    operation runs on batch/(m R) samples. Seconds and bytes of a layer grow with that number, the
    host's seconds per operation do not. Every point is cut for its own schedule.
    """
    from ddg_sim.cluster import read
    from ddg_sim.importers import read_layers
    from ddg_sim.methods import METHODS
    from ddg_sim.plan import plan as plan_all
    from ddg_sim.schedule import Sync

    if plot is None or not plot.is_dir():
        output_path("--plot", plot, (".png", ".svg"))
    different_files(profile=profile, cluster=cluster, plot=plot)
    factor = durations("--jitter", jitter)
    if isinstance(factor, tuple):
        raise ValueError(f"--jitter {jitter!r}: give one number or distribution")
    if isinstance(factor, int | float) and factor != 1:
        raise ValueError(f"--jitter {jitter!r} does not vary: give a distribution")
    if seed is not None and jitter == "1":
        raise ValueError("--seed has nothing to draw: give a --jitter that varies")
    if top is not None and json:
        raise ValueError("--top is about the table: --json prints all rows")
    if jobs == 0:
        raise ValueError("--jobs 0: give a number of processes, or -1 for all cores")
    graph = read_layers(profile)
    known = _batch_size(profile)
    if profile_batch_size is not None and known is not None and known != profile_batch_size:
        raise ValueError(f"--profile-batch-size {profile_batch_size}: {profile} says {known}")
    if batch_sizes is not None and known is None and profile_batch_size is None:
        raise ValueError(
            f"--batch-sizes needs --profile-batch-size: {profile} does not say its batch size"
        )
    with progress_bar("planning") as progress:
        found = plan_all(
            graph,
            list(METHODS) if methods == "all" else methods.split(","),
            numbers("--stages", stages),
            batch_sizes=numbers("--batch-sizes", batch_sizes) if batch_sizes else None,
            micro_batches=numbers("--micro-batches", micro_batches) if micro_batches else None,
            replicas=numbers("--replicas", replicas),
            syncs=[choice("--sync", word, Sync) for word in sync.split(",")] if sync else None,
            stages_per_device=numbers("--stages-per-device", stages_per_device),
            cluster=read(cluster) if cluster is not None else None,
            optimizer=optimizer,
            profile_batch_size=profile_batch_size or known,
            jitter=factor,
            seed=seed or 0,
            exact=exact,
            jobs=jobs,
            progress=progress,
        )
    if plot is not None:
        _draw(found, plot)
    if json:
        print_json(
            {
                "assumption": ASSUMPTION,
                "rows": [_fields(row) for row in found.rows],
                "skipped": [{"reason": x, "points": n} for x, n in found.skipped.items()],
            }
        )
    else:
        _print(found, top or 20)


def numbers(option: str, text: str) -> tuple[int, ...]:
    """Parse ``1..4,8`` to (1, 2, 3, 4, 8).

    Raises:
        ValueError: naming the option and the part that is no range.

    >>> numbers("--stages", "1..4,8")
    (1, 2, 3, 4, 8)
    """
    found: list[int] = []
    for part in text.split(","):
        first, dots, last = part.partition("..")
        try:
            ends = int(first), int(last if dots else first)
        except ValueError:
            raise ValueError(f"{option} {text!r}: give numbers such as 1..16 or 2,4,8") from None
        if not 1 <= ends[0] <= ends[1] <= LARGEST:
            raise ValueError(f"{option} {part!r}: give numbers from 1 to {LARGEST}, rising")
        found.extend(range(ends[0], ends[1] + 1))
    return tuple(dict.fromkeys(found))


LARGEST = 10_000_000
BOUND = "bound by"


def _batch_size(path: Path) -> int | None:
    """The batch size that a profile of the project's own states."""
    from ddg_sim.profile import ProfileError, read

    try:
        return read(path).batch_size
    except ProfileError:
        return None  # another format


def _fields(row: Row) -> dict[str, Any]:
    schedule = row.schedule
    return {
        "method": schedule.method,
        "stages": schedule.num_stages,
        "sync": schedule.sync.value,
        "replicas": schedule.replicas,
        "workers": len(schedule.workers),
        "devices": row.devices,
        "batch_size": row.batch_size,
        "micro_batches": schedule.samples_per_iteration,
        "period": row.period.value,
        "period_interval": [row.period.low, row.period.high],
        "period_lower_bound": row.lower_bound,
        "throughput": row.throughput,
        "speedup_over_bp": row.over_bp.value if row.over_bp else None,
        "speedup_over_dp": row.over_dp.value if row.over_dp else None,
        "bp_fits": row.bp_fits,
        "dp_fits": row.dp_fits,
        "staleness": row.staleness,
        "peak_memory": row.memory,
        "fits": row.fits,
        "missing": row.missing,
        "bound_by": row.bound_by,
        "cuts": row.cuts,
    }


def _print(found: Plan, top: int) -> None:
    rows = found.rows
    batches = len({row.batch_size for row in rows}) > 1
    random = any(row.period.runs for row in rows)
    shown = [_cells(row, random) for row in rows[:top]]
    columns = ["method", "K×R", "m", "batch", "period", "vs BP", "vs DP", "stale", "memory", BOUND]
    if not batches:
        shown = [[*cells[:3], *cells[4:]] for cells in shown]
        columns.remove("batch")
    print_table(_title(rows), columns, shown, left=[BOUND])
    if len(rows) > top:
        print_line(f"… and {len(rows) - top:,} more (--top or --json shows them)")
    if not all(row.bp_fits and row.dp_fits for row in rows[:top]):
        print_line("* BP, or DP, itself would not fit into memory there")
    for row in rows[:top]:
        if row.missing:
            print_line(f"{_name(row)}, K={row.schedule.num_stages}: {row.missing}")
            break
    for reason, count in found.skipped.items():
        print_line(f"skipped {count:,} point{'s' if count > 1 else ''}: {reason}")
    unproved = sum(row.lower_bound < row.period.value * (1 - 1e-6) for row in rows)
    if unproved and not random:
        print_line(
            f"cuts proved best for {len(rows) - unproved:,} of {len(rows):,} points,"
            " the others are the best that was found (--exact searches on)"
        )
    if any(row.schedule.num_stages > len(row.schedule.workers) for row in rows[:top]):
        print_line("K/D: K stages take turns on D devices of each replica")
    print_line(
        "batch: samples per update over all replicas, of which an operation takes batch/(m R);"
        " a layer's time grows with them"
    )
    print_line(_best(rows[0]))


def _title(rows: tuple[Row, ...]) -> str:
    batch = {row.batch_size for row in rows}
    only = f", batch {batch.pop()}" if len(batch) == 1 and None not in batch else ""
    return f"{len(rows):,} points, fastest first{only} (K stages × R replicas, m micro-batches)"


def _name(row: Row) -> str:
    sync = row.schedule.sync.value
    return row.schedule.method + (f" ({sync})" if sync != "none" else "")


def _stages(schedule: Schedule) -> str:
    """Number of stages, and of the devices that they share, if they do."""
    shared = schedule.num_stages > len(schedule.workers)
    return f"{schedule.num_stages}" + (f"/{len(schedule.workers)}" if shared else "")


def _cells(row: Row, random: bool) -> list[str]:
    from ddg_sim.partition import bytes_text

    schedule, period = row.schedule, seconds(row.period.value)
    if random:
        period += f" ±{100 * row.period.relative_width:.1f}%"
    replicas = f"×{schedule.replicas}" if schedule.replicas > 1 else ""
    return [
        _name(row),
        _stages(schedule) + replicas,
        str(schedule.samples_per_iteration),
        "–" if row.batch_size is None else str(row.batch_size),
        period,
        times(row.over_bp.value if row.over_bp else None) + ("" if row.bp_fits else "*"),
        times(row.over_dp.value if row.over_dp else None)
        + ("" if row.dp_fits or row.over_dp is None else "*"),
        str(max(row.staleness)),
        bytes_text(max(row.memory)) + ("" if row.fits else " ✗"),
        row.bound,
    ]


def _best(row: Row) -> str:
    schedule = row.schedule
    if not row.fits:
        return f"nothing fits; nearest: {_name(row)}: {row.missing}"
    copies = f" x {schedule.replicas} replicas" if schedule.replicas > 1 else ""
    plural = "s" if schedule.num_stages > 1 else ""
    rate = f" ({row.throughput:,.4g} samples/s)" if row.batch_size is not None else ""
    against = [f"{times(row.over_bp.value)} backpropagation"] if row.over_bp else []
    against += [f"{times(row.over_dp.value)} data parallelism"] if row.over_dp else []
    speed = f", {' and '.join(against)} on as many devices" if against else ""
    batch = f", batch {row.batch_size}" if row.batch_size is not None else ""
    return (
        f"best: {_name(row)}, {schedule.num_stages} stage{plural}{copies}{batch}:"
        f" {seconds(row.period.value)} per update{rate}{speed}; {row.bound_by}"
    )


def _draw(found: Plan, path: Path) -> None:
    from ddg_sim.plot import heat_maps, plan_picture, speedup_curves

    if path.is_dir():
        speedup_curves(found.rows, path / "speedup.png")
        heat_maps(found.rows, path / "heatmap.png")
    else:
        plan_picture(found.rows, path)
