"""PETRA on networks with convolutions and batch norm: what is kept, once-moved buffers, processes.

That the formulas are right is compared with the NumPy executor in test_execute_methods.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddg_gpu.data import load
from ddg_gpu.execute import run_serial
from ddg_gpu.job import Job, network
from ddg_gpu.models import build
from ddg_gpu.partition import split
from ddg_gpu.stage import Stage
from ddg_gpu.train import one_thread, train
from ddg_sim.methods import bp, petra
from ddg_sim.schedule import Op, Schedule

SAMPLES = 8


class Images:
    def inputs(self, sample: int) -> Tensor:
        generator = torch.Generator().manual_seed(sample)
        return torch.randn(5, 1, 8, 8, dtype=torch.float64, generator=generator)

    def targets(self, sample: int) -> Tensor:
        return torch.randint(4, (5,), generator=torch.Generator().manual_seed(100 + sample))


class Frozen(torch.optim.SGD):
    """Notes the gradients that it is given, and changes nothing."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, lr=0.0)
        self.seen: list[list[Tensor]] = []

    def step(self, closure: Any = None) -> Any:
        (group,) = self.param_groups
        self.seen.append([p.grad.clone() for p in group["params"]])


def run(schedule: Schedule, cuts: Sequence[int]) -> tuple[list[Frozen], list[nn.Sequential]]:
    modules = split(build("revnet16", (1, 8, 8), classes=4).double(), len(cuts) + 1, by=cuts)
    optimizers: list[Frozen] = []

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizers.append(Frozen(parameters))
        return optimizers[-1]

    stages = [Stage(module, k, schedule, make) for k, module in enumerate(modules)]
    with one_thread():
        run_serial(schedule, stages, Images(), SAMPLES)
    return optimizers, modules


@pytest.mark.parametrize("cuts", [(), (1, 2, 3, 4), (1, 2, 5)])
def test_at_constant_weights_petra_gives_the_gradients_of_backpropagation(
    cuts: tuple[int, ...],
) -> None:
    """So does every buffer: batch norm sees each sample once, whatever is run again or undone."""
    num_stages = len(cuts) + 1
    ours, modules = run(petra(num_stages), cuts)
    theirs, expected = run(bp(num_stages), cuts)
    for own, wanted in zip(ours, theirs, strict=True):
        assert len(own.seen) == len(wanted.seen) == SAMPLES
        for mine, other in zip(own.seen, wanted.seen, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)
    for left, right in zip(modules, expected, strict=True):
        torch.testing.assert_close(dict(left.named_buffers()), dict(right.named_buffers()))
        counts = [b for n, b in left.named_buffers() if n.endswith("num_batches_tracked")]
        assert all(int(count) == SAMPLES for count in counts)


def test_a_reversible_stage_keeps_nothing_of_a_sample() -> None:
    schedule, kept = petra(4), [0] * 4

    class Watched(Stage):
        def forward(self, op: Op, *rest: Any) -> Any:
            output = super().forward(op, *rest)
            parts = [
                t
                for sample in self._flight.samples.values()
                for t in (sample.inputs, *(sample.roots or ()))
            ]
            kept[self.index] = max(kept[self.index], sum(isinstance(t, Tensor) for t in parts))
            return output

    modules = split(build("revnet16", (1, 8, 8), classes=4).double(), 4, by=(1, 2, 5))
    make = partial(torch.optim.SGD, lr=0.01)
    stages = [Watched(module, k, schedule, make) for k, module in enumerate(modules)]
    run_serial(schedule, stages, Images(), SAMPLES)
    assert kept == [7, 0, 3, 1]  # the others keep their inputs, and no graph: 2 (K - 1 - k) + 1


def test_processes_give_the_same_bits_as_one() -> None:
    job = Job("petra", 3, "revnet16", iterations=6, batch_size=16, cuts=(1, 2))
    serial, processes = (train(job, load("digits"), name) for name in ("serial", "distributed"))
    assert serial is not None
    assert processes is not None
    assert serial.weights_sha256 == processes.weights_sha256
    assert serial.losses == processes.losses


def test_a_network_without_reversible_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="'resnet8' has no layer that petra can reverse: take rev"):
        network(Job("petra", 2, "resnet8", iterations=1), load("digits"))
