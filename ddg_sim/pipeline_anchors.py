"""Published times of pipelines: torchgpipe's ResNet-101, vTrain's GPT runs, PipeDream's plans."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple, fields, replace
from itertools import accumulate, combinations
from pathlib import Path

import numpy as np

from ddg_sim.asynchronous import pipedream
from ddg_sim.comparison import Anchor, Comparison, Role, number, read_rows
from ddg_sim.convnets import cut_bytes, resnet101, stage_shares
from ddg_sim.costs import Costs
from ddg_sim.cycletime import cycle_time
from ddg_sim.gpt import GptMachine, GptRun, calibrate
from ddg_sim.layers import LayerGraph
from ddg_sim.pipedream import read_graph
from ddg_sim.pipedream_optimizer import PipeDreamPlan, pipedream_plan
from ddg_sim.synchronous import gpipe

# --- torchgpipe -----------------------------------------------------------------------------------

#: Tesla P40 (NVIDIA's data sheet): 11.76 TFLOP/s in single precision, 346 GB/s.
P40_FLOPS_PER_BYTE = 11.76e12 / 346e9
PCIE = 15.75e9  # bytes per second of PCI Express 3.0 x16, by its standard
ROOFLINE = "P40 roofline"


def torchgpipe(path: Path) -> Anchor:
    """GPipe on ResNet-101, samples per second on 1 to 8 GPUs (torchgpipe's benchmark)."""
    rows = read_rows(path)
    base = next((row for row in rows if row.get("checkpoint") == "none"), None)
    if base is None:
        raise ValueError(f"{path}: has no row with checkpoint 'none' to start from")
    sample = 1 / number(path, base, "throughput_samples_s")
    found = []
    for variant, flops_per_byte in ((ROOFLINE, P40_FLOPS_PER_BYTE), ("operations only", 0.0)):
        for row in rows:
            stages, chunks = int(number(path, row, "n")), int(number(path, row, "m_chunks"))
            balance = [int(part) for part in row.get("balance", "").split("+")]
            if len(balance) != stages:
                raise ValueError(f"{path}: balance {row.get('balance')!r} is not {stages} numbers")
            micro = number(path, row, "batch") / chunks
            table = _gpipe_costs(sample * micro, balance, flops_per_byte, micro, chunks)
            if row is base:
                role, period = Role.CALIBRATED, sample * micro
            else:
                role = Role.APART if stages == 1 else Role.PREDICTION
                period = gpipe_period(chunks, table)
            found.append(
                Comparison(
                    variant,
                    f"n={stages}" if row.get("checkpoint") != "none" else "n=1 plain",
                    row.get("experiment", ""),
                    number(path, row, "throughput_samples_s"),
                    micro * chunks / period,
                    role,
                )
            )
    return Anchor(
        path.name,
        "GPipe on ResNet-101, Tesla P40",
        "samples per s",
        ROOFLINE,
        tuple(found),
        (
            "Inputs: samples per second on one GPU without checkpointing, the published balance,"
            " and the P40's data sheet; nothing is fitted to the pipelined rows. B = 2 F.",
            "Counting operations alone gives the first stages too little: with their large images"
            " they are bound by memory, and the published balance allows for that.",
            "n = 8 misses most. Eight threads of one process launch and copy for eight GPUs there,"
            " and micro-batches are smaller than in the run that the model starts from; neither is"
            " modelled, and neither can be told from the rows of one GPU.",
        ),
    )


def _gpipe_costs(
    seconds: float, balance: Sequence[int], flops_per_byte: float, micro: float, chunks: int
) -> Costs:
    """Costs of a micro-batch that takes ``seconds`` on one GPU, forward and backward.

    All micro-batches but the last are recomputed ('except_last'). Costs do not depend on the
    micro-batch, so each is charged the mean, (m-1)/m of a forward pass.
    """
    layers = resnet101()
    cuts = list(accumulate(balance))
    if cuts[-1] != len(layers):
        raise ValueError(f"balance {list(balance)} does not add up to {len(layers)} layers")
    forward_seconds = tuple(
        seconds * share / 3 for share in stage_shares(layers, cuts[:-1], flops_per_byte)
    )
    messages = tuple(micro * size / PCIE for size in cut_bytes(layers, cuts[:-1]))
    return Costs(
        forward=forward_seconds,
        backward=tuple(2 * value for value in forward_seconds),
        recompute=tuple(value * (chunks - 1) / chunks for value in forward_seconds),
        activation_transfer=messages,
        gradient_transfer=messages,
    )


def gpipe_period(chunks: int, table: Costs) -> float:
    """Period of GPipe with recomputation, for any number of micro-batches.

    Every further micro-batch adds the same once the pipeline is full, so a long schedule's period
    follows from two short ones (tests/test_anchors.py).
    """

    def period(m: int) -> float:
        return cycle_time(gpipe(table.num_stages, m, replay=True), table).period

    short = 4 * table.num_stages
    if chunks <= 2 * short:
        return period(chunks)
    first, second = period(short), period(2 * short)
    return first + (second - first) / short * (chunks - short)


# --- PipeDream ------------------------------------------------------------------------------------

PLAN = "the planner here"
SIMULATED = "its schedule"


def pipedream_plans(path: Path) -> Anchor:
    """What PipeDream's optimizer prints for its measured profiles: seconds of the slowest stage.

    The profiles lie beside the table, in pipedream/NAME.graph.txt.
    """
    found, longer = [], []
    for row in read_rows(path):
        name, straight = row.get("profile", ""), "--straight_pipeline" in row.get("extra", "")
        column = "bandwidth_Bps"
        bandwidth = number(path, {column: row.get(column, "").removesuffix("(default)")}, column)
        machines, published = int(number(path, row, "n")), number(path, row, "stage_time_s")
        graph = read_graph(path.parent / "pipedream" / f"{name}.graph.txt")
        plan = pipedream_plan(graph, machines, bandwidth, straight=straight)
        case = f"{name}, straight" if straight else name
        found.append(Comparison(PLAN, case, case, published, plan.stage_time, Role.PREDICTION))
        if all(stage.replicas == 1 for stage in plan.stages):
            table = plan_costs(graph, plan, bandwidth)
            bound = cycle_time(pipedream(len(plan.stages)), table)
            found.append(Comparison(SIMULATED, case, case, published, bound.period, Role.APART))
            if bound.period > 1.01 * published:
                longer.append(f"{case}: {bound.explain()}.")
    return Anchor(
        path.name,
        "PipeDream's optimizer on its own profiles",
        "s per mini-batch",
        PLAN,
        tuple(found),
        (
            "Nothing here was measured on a pipeline: the first row says that this package's"
            " planner, with PipeDream's assumptions, finds what PipeDream's own prints.",
            "The second row is the period of PipeDream's schedule with the stages of that plan, for"
            " plans without replicas. The plan's time is that of the slowest stage or link alone;"
            " the schedule has too few mini-batches in flight to hide large messages.",
            *longer,
        ),
    )


def plan_costs(graph: LayerGraph, plan: PipeDreamPlan, bandwidth: float) -> Costs:
    """Costs of a plan's stages; a link carries what later stages read, once."""
    inside = [set(stage.layers) for stage in plan.stages]
    messages = []
    for place in range(1, len(inside)):
        before, after = set().union(*inside[:place]), set().union(*inside[place:])
        senders = {source for source, target in graph.edges if source in before and target in after}
        messages.append(sum(graph.layers[layer].output_bytes for layer in senders) / bandwidth)
    return Costs(
        forward=tuple(sum(graph.layers[layer].forward for layer in own) for own in inside),
        backward=tuple(sum(graph.layers[layer].backward for layer in own) for own in inside),
        activation_transfer=tuple(messages),
        gradient_transfer=tuple(messages),
    )


# --- vTrain ---------------------------------------------------------------------------------------

VTRAIN_MAPE = 0.0837  # vTrain's own mean error on these runs (Bang et al. 2024, MICRO-57)
COLUMNS = (
    "global batch",
    "micro batch",
    "hidden size",
    "attention heads",
    "layers",
    "sequence length",
    "tensor parallelism",
    "data parallelism",
    "pipeline parallelism",
)
EVERY = 11  # 9 % of the rows
SEEDS = (1, 2, 3)


def vtrain(path: Path) -> Anchor:
    """GPT on up to 8 A100, seconds per iteration, tensor x data x pipeline parallel (vTrain)."""
    rows = read_rows(path, "GPUs", *COLUMNS, "ms")
    measured = {
        GptRun(*(int(number(path, row, column)) for column in COLUMNS)): number(path, row, "ms")
        for row in rows
    }
    runs = sorted(measured, key=astuple)
    constants = len(fields(GptMachine))
    chosen = {f"every {EVERY}th row, sorted": runs[::EVERY]}
    for seed in SEEDS:
        sample = np.random.default_rng(seed).choice(len(runs), len(runs) // 10, replace=False)
        chosen[f"a random tenth, seed {seed}"] = [runs[i] for i in sample]
    alone = [run for run in runs if run.pipeline == 1]
    chosen["every 6th row with pp = 1"] = alone[::6]
    found = []
    for variant, calibration in chosen.items():
        machine = calibrate(calibration, [measured[run] / 1e3 for run in calibration])
        for run in sorted(runs, key=lambda run: run.pipeline):
            found.append(
                Comparison(
                    f"from {variant} ({len(calibration)} of {len(runs)})",
                    "pp = 1" if run.pipeline == 1 else "pp >= 2",
                    str(run),
                    measured[run],
                    1e3 * machine.period(run),
                    Role.CALIBRATED if run in set(calibration) else Role.PREDICTION,
                )
            )
    equal, pairs = equal_steps(measured)
    return Anchor(
        path.name,
        "GPT on 2 to 8 A100, 1F1B (vTrain)",
        "ms per iteration",
        found[0].variant,
        tuple(found),
        (
            f"{constants} constants are calibrated, on less than 10 % of the rows, chosen without"
            f" looking at errors. vTrain's own mean error is {100 * VTRAIN_MAPE:.2f} %, from a"
            " profile of every layer on the same machine.",
            "The form of the model was chosen with all rows in sight, among some twenty whose"
            " errors were 5 to 8 %; the constants were not.",
            "The last variant has seen no pipeline: that pp >= 2 is no worse than pp = 1 is the"
            " schedule's merit. What misses is the cost of a layer, not the pipeline.",
            "The model misses most where kernels are small (tp = 8 or 4, small micro-batches): the"
            " host's time per layer depends on the collectives there, and the efficiency of a"
            " matrix product on its shape, which one constant each cannot follow. Rows that differ"
            " only in batches per iteration, layers or replicas miss alike.",
            f"Of {pairs} pairs of rows that differ in the same way in data parallelism only,"
            f" {equal} differ by the same time to the nanosecond. Runs that were timed whole would"
            " not: the published times are composed, at least in their data-parallel part.",
        ),
    )


def equal_steps(measured: dict[GptRun, float]) -> tuple[int, int]:
    """How many pairs of runs show that their times were composed.

    Two runs that differ in the number of replicas only differ by some step. The step is compared
    among such pairs of the same network, tensor and pipeline degrees and numbers of replicas.

    Returns:
        Pairs whose step is found again to the sixth decimal, and pairs that have another to be
        compared with.

    >>> runs = {GptRun(d * b, 1, 8, 2, 2, 8, 1, d, 1): 10.0 * b + d for d in (1, 2) for b in (1, 2)}
    >>> equal_steps(runs)
    (2, 2)
    """
    replicas: dict[GptRun, dict[int, float]] = defaultdict(dict)
    for run, time in measured.items():
        single = replace(run, global_batch=run.global_batch // run.data, data=1)
        replicas[single][run.data] = time
    steps: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for run, times in replicas.items():
        for few, many in combinations(sorted(times), 2):
            kind = (run.hidden, run.layers, run.tensor, run.pipeline, few, many)
            steps[kind].append(round(times[many] - times[few], 6))
    compared = [group for group in steps.values() if len(group) > 1]
    equal = sum(sum(group.count(step) > 1 for step in group) for group in compared)
    return equal, sum(map(len, compared))
