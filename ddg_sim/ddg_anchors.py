"""Published times of DDG: WRN-28-10, ResNet-56 and ResNet-110 on CIFAR-10.

What is predicted from what: the time on one GPU with backpropagation, the operations of the
network's layers (`convnets`), the cut of the published code, and the schedule. Times of the DDG
runs themselves enter only where a variant says so. The sources say nothing about the GPUs, so a
stage's share of the time is its share of the operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from scipy.optimize import brentq

from ddg_sim.comparison import Anchor, Comparison, Role, number, read_rows
from ddg_sim.convnets import Work, cifar_resnet, cut_bytes, stage_shares, wide_resnet
from ddg_sim.costs import Costs
from ddg_sim.cycletime import cycle_time
from ddg_sim.methods import bp, ddg
from ddg_sim.schedule import Sync

TWICE = 2.0  # a backward pass's operations for each of the forward pass, of convolutions
BATCH = 128  # both sources
ITERATIONS = math.ceil(50_000 / BATCH)  # per epoch; CIFAR-10 has 50 000 training images
#: First block of every stage but the first, per K: DG_models.py of ZHUANGHP/FDG, commit 6b1a29e.
WRN_BLOCKS = {2: (6,), 3: (4, 8), 4: (3, 6, 9)}
RESNET56_BLOCKS = {2: (13,), 3: (9, 18), 4: (6, 13, 20)}


@dataclass(frozen=True, slots=True)
class Runs:
    """DDG's published times on K GPUs, and what is needed to predict them.

    Args:
        alone: seconds per iteration of backpropagation on one GPU.
        published: seconds per iteration of DDG, by K.
        layers: the network.
        cuts: index of the first layer of every stage but the first, by K.
    """

    alone: float
    published: Mapping[int, float]
    layers: Sequence[Work]
    cuts: Mapping[int, Sequence[int]]

    def costs(self, stages: int, ratio: float = TWICE, seconds_per_byte: float = 0.0) -> Costs:
        """Costs per iteration: the stages' shares of the operations, and of the one GPU's time.

        Args:
            stages: K.
            ratio: seconds of a backward pass for each of the forward pass.
            seconds_per_byte: of the activations and gradients sent; 0 sends for nothing.
        """
        cuts = self.cuts[stages]
        shares = stage_shares(self.layers, cuts)
        messages = tuple(BATCH * size * seconds_per_byte for size in cut_bytes(self.layers, cuts))
        return Costs(
            forward=tuple(self.alone * share / (1 + ratio) for share in shares),
            backward=tuple(self.alone * share * ratio / (1 + ratio) for share in shares),
            activation_transfer=messages,
            gradient_transfer=messages,
        )

    def period(
        self,
        stages: int,
        sync: Sync = Sync.BARRIER,
        ratio: float = TWICE,
        seconds_per_byte: float = 0.0,
    ) -> float:
        """Seconds per iteration of DDG on ``stages`` GPUs."""
        table = self.costs(stages, ratio, seconds_per_byte)
        return cycle_time(ddg(stages, sync), table).period

    def ratio_from(self, stages: int) -> float:
        """The ratio of backward to forward with which the barrier's period is the published one."""
        return self._solve(stages, lambda ratio: self.period(stages, ratio=ratio), 0.01, 100.0)

    def seconds_per_byte_from(self, stages: int) -> float:
        """The speed of the links with which the barrier's period is the published one."""

        def period(speed: float) -> float:
            return self.period(stages, seconds_per_byte=speed)

        return self._solve(stages, period, 0.0, 1e-6)

    def _solve(
        self, stages: int, period: Callable[[float], float], low: float, high: float
    ) -> float:
        published = self.published[stages]
        if (period(low) - published) * (period(high) - published) > 0:
            raise ValueError(
                f"no constant between {low:g} and {high:g} explains the published time on"
                f" {stages} GPUs: check the row"
            )
        found: float = brentq(lambda value: period(value) - published, low, high, xtol=1e-15)
        return found


NOTHING = "B = 2 F, barrier: nothing calibrated"


def _comparisons(runs: Runs, scale: float) -> list[Comparison]:
    """All variants' comparisons; ``scale`` turns seconds per iteration to what was published."""

    def against(
        variant: str, period: Callable[[int], float], calibrated: int | None
    ) -> list[Comparison]:
        return [
            Comparison(
                variant,
                f"K={k}",
                f"K={k}",
                scale * published,
                scale * period(k),
                Role.CALIBRATED if k == calibrated else Role.PREDICTION,
            )
            for k, published in runs.published.items()
        ]

    found = against(NOTHING, runs.period, None)
    found += against("B = 2 F, mailboxes", partial(runs.period, sync=Sync.MAILBOX), None)
    found += against("B = 2 F, no synchronisation", partial(runs.period, sync=Sync.NONE), None)
    for k in sorted(runs.published, reverse=True):
        ratio = runs.ratio_from(k)
        found += against(_from_row(ratio, k), partial(runs.period, ratio=ratio), k)
    most = max(runs.published)
    speed = runs.seconds_per_byte_from(most)
    name = f"B = 2 F, links {1e-9 / speed:.1f} GB/s from K={most}"
    return found + against(name, partial(runs.period, seconds_per_byte=speed), most)


def _from_row(ratio: float, stages: int) -> str:
    return f"B = {ratio:.2f} F from K={stages}"


def _headline(runs: Runs) -> str:
    most = max(runs.published)
    return _from_row(runs.ratio_from(most), most)


CHOICE = (
    "One number is calibrated: seconds of a backward pass for each of the forward pass. It comes"
    " from the row with the most GPUs, where it has the most leverage; the rows below it show what"
    " the other choices give, and that one was made with them in sight."
)
BARRIER = (
    "Only the barrier (T_F + max_k B_k, the paper's cost model) comes near; all rows assume it but"
    " two. The same updates without it would take the times of the row 'no synchronisation'."
)


def wide_resnet_times(path: Path) -> Anchor:
    """DDG on WRN-28-10, seconds per epoch (Table 6 of the FDG paper)."""
    alone, published, busy = _table6(path, "WRN-28-10")
    runs = Runs(
        alone / ITERATIONS,
        {k: seconds / ITERATIONS for k, seconds in published.items()},
        wide_resnet(),
        {k: [1 + block for block in blocks] for k, blocks in WRN_BLOCKS.items()},
    )
    found = _comparisons(runs, ITERATIONS)
    name = "B = 2 F, stages' busy times in these runs"
    for k, seconds in published.items():
        whole = [share * seconds for share in busy[k]]
        table = Costs(tuple(s / 3 for s in whole), tuple(2 * s / 3 for s in whole))
        period = cycle_time(ddg(k, Sync.BARRIER), table).period
        found.append(Comparison(name, f"K={k}", f"K={k}", seconds, period, Role.APART))
    return Anchor(
        path.name,
        "DDG on WRN-28-10, CIFAR-10",
        "s per epoch",
        _headline(runs),
        tuple(found),
        (
            f"Inputs: the {alone:g} s that one GPU takes, operations per layer, FDG's cuts.",
            CHOICE,
            "The calibrated ratio is below the 2 of convolutions: it also holds what the model"
            " leaves out of the forward wave. FDG's code clones and sends every activation from"
            " one Python thread between the waves.",
            BARRIER,
            "The last row is a consistency check, no prediction: utilisation was measured in the"
            " run whose time it gives back. The stages' busy times add up to more than one GPU's"
            " time, so utilisation counts communication too.",
        ),
    )


def resnet56_times(path: Path) -> Anchor:
    """DDG on ResNet-56, seconds per epoch (Table 6 of the FDG paper): bound by the host."""
    alone, published, _ = _table6(path, "ResNet-56")
    runs = Runs(
        alone / ITERATIONS,
        {k: seconds / ITERATIONS for k, seconds in published.items()},
        cifar_resnet(9),
        {k: [3 + block for block in blocks] for k, blocks in RESNET56_BLOCKS.items()},
    )
    host = "one host for all GPUs: the time on one"
    found = []
    for k, seconds in published.items():
        bound = cycle_time(bp(1), Costs((alone / 3,), (2 * alone / 3,))).period
        for variant, predicted in ((host, bound), (NOTHING, ITERATIONS * runs.period(k))):
            found.append(Comparison(variant, f"K={k}", f"K={k}", seconds, predicted, Role.APART))
    return Anchor(
        path.name,
        "DDG on ResNet-56, CIFAR-10 (launch-bound: not counted)",
        "s per epoch",
        host,
        tuple(found),
        (
            "Backpropagation keeps one GPU about half busy: kernels are shorter than Python takes"
            " to launch them. FDG's code drives all stages from threads of one process, which share"
            " one interpreter lock, so K GPUs wait for the same host work as one does.",
            "Stage costs that are measured one by one cannot show this; worker processes would"
            " not have it.",
        ),
    )


def resnet110_times(path: Path) -> Anchor:
    """DDG on ResNet-110, seconds for the whole run of 300 epochs (figure in the released code)."""
    times = {
        int(number(path, row, "gpus")): number(path, row, "end_time_s") for row in read_rows(path)
    }
    if 1 not in times or len(times) < 2:
        raise ValueError(f"{path}: needs the row of 1 GPU and at least one other")
    steps = 300 * ITERATIONS
    layers = cifar_resnet(18)
    runs = Runs(
        times.pop(1) / steps,
        {k: seconds / steps for k, seconds in times.items()},
        layers,
        {k: released_cuts(len(layers), k) for k in times},
    )
    return Anchor(
        path.name,
        "DDG on ResNet-110, CIFAR-10",
        "s for 300 epochs",
        _headline(runs),
        tuple(_comparisons(runs, steps)),
        (
            "Inputs: the time on one GPU, operations per layer, the released code's cuts (equal"
            " numbers of layers). Published times are read off a figure, ±60 s.",
            CHOICE,
            BARRIER + " The released code has mailboxes; its README names another script as the one"
            " that was run.",
        ),
    )


def released_cuts(layers: int, stages: int) -> tuple[int, ...]:
    """Cuts of the released DDG code (models/resnet_ddg.py): equal numbers of layers, rounded up.

    >>> released_cuts(58, 3)
    (20, 40)
    """
    each = math.ceil(layers / stages)
    return tuple(each * k for k in range(1, stages))


def _table6(path: Path, model: str) -> tuple[float, dict[int, float], dict[int, tuple[float, ...]]]:
    """Seconds per epoch alone and by K, and by K the fraction of the time each GPU is busy."""
    alone: float | None = None
    published: dict[int, float] = {}
    busy: dict[int, tuple[float, ...]] = {}
    for row in read_rows(path):
        if row.get("model") != model:
            continue
        seconds = number(path, row, "sec_per_epoch")
        if row.get("method") == "BP":
            alone = seconds
            continue
        stages = int(number(path, row, "K"))
        parts = row.get("gpu_util_pct", "").split("/")
        busy[stages] = tuple(
            number(path, {"gpu_util_pct": part}, "gpu_util_pct") / 100 for part in parts
        )
        published[stages] = seconds
        if len(busy[stages]) != stages:
            raise ValueError(f"{path}: gpu_util_pct {row['gpu_util_pct']!r} is not {stages} values")
    if alone is None or not published:
        raise ValueError(f"{path}: needs a BP row and DDG rows for {model}")
    return alone, published, busy
