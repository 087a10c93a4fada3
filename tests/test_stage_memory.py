"""Weights and samples that a stage holds, counted in memory, against what the schedule needs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from oracles import Toy, delayed_training, toy_stages
from torch import Tensor, nn

from ddg_gpu.execute import run_serial
from ddg_gpu.stage import Stage
from ddg_gpu.train import one_thread
from ddg_sim.lowering import memory
from ddg_sim.methods import METHODS, Semantics, ddg, method
from ddg_sim.rule import Activations, Gradient, TransformKind
from ddg_sim.schedule import Op, Schedule

REFUSED = ("petra", "ouroboros", "pd-asgd", "dp")
BATCH = 3
WORKING = (
    TransformKind.PREDICT_FORWARD,
    TransformKind.PREDICT_BACKWARD,
    TransformKind.DISCREPANCY,
)


def trainable() -> Iterator[Any]:
    for name in METHODS:
        for stages in (2, 4) if name == "interleaved" else (1, 2, 3, 4):
            if name not in REFUSED:
                yield pytest.param(method(name, stages), id=f"{name}-{stages}")
    for semantics in (Semantics.CURRENT, Semantics.REPLAY):
        yield pytest.param(ddg(4, semantics=semantics), id=f"ddg-4-{semantics.value}")
    yield pytest.param(method("pipedream", 4, vertical_sync=True), id="pipedream-4-vertical")
    yield pytest.param(method("pb", 4, predict=True), id="pb-4-predict")
    yield pytest.param(method("pipemare", 4, decay=0.4), id="pipemare-4-decay")


class Head(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs[:, :3]


def leaves(*shape: int) -> int:
    """Storages of leaves of graphs with that shape; gradients and messages are no leaves."""
    found = (value for value in gc.get_objects() if type(value) in (Tensor, nn.Parameter))
    return len({t.data_ptr() for t in found if t.requires_grad and t.is_leaf and t.shape == shape})


@pytest.fixture
def _only_what_is_new() -> Iterator[None]:
    gc.freeze()  # `gc.get_objects` looks at what comes afterwards only
    yield
    gc.unfreeze()


def working_copies(schedule: Schedule, stage: int) -> int:
    """One more where forward or backward passes read weights that no version is."""
    numbers = [schedule.rule.values(kind)[-schedule.num_stages :] for kind in WORKING]
    return int(any(values and values[stage] for values in numbers))


@pytest.mark.usefixtures("_only_what_is_new")
@pytest.mark.parametrize("schedule", list(trainable()))
def test_storages_of_weights_and_inputs_are_those_that_the_schedule_needs(
    schedule: Schedule,
) -> None:
    peaks = [(0, 0, 0, 0)] * schedule.num_stages
    local = schedule.rule.gradient is Gradient.LOCAL

    class Watched(Stage):
        def watch(self) -> None:
            k = self.index
            weights, inputs = leaves(6 + k, 5 + k), leaves(BATCH, 5 + k)
            counts = (weights, inputs, self.held[1], self.held[0])
            peaks[k] = tuple(map(max, zip(peaks[k], counts, strict=True)))  # type: ignore[assignment]

        def forward(self, *args: Any) -> Any:
            result = super().forward(*args)
            self.watch()
            return result

        def backward(self, *args: Any) -> Any:
            result = super().backward(*args)
            self.watch()
            return result

        def recompute(self, op: Op) -> None:
            super().recompute(op)
            self.watch()

        def update(self, op: Op) -> None:
            super().update(op)
            self.watch()

    # Every stage has weights, and inputs, of a shape of its own; tanh so that graphs keep both.
    modules = [
        nn.Sequential(nn.Linear(5 + k, 6 + k, bias=False), nn.Tanh())
        for k in range(schedule.num_stages)
    ]
    make = partial(torch.optim.SGD, lr=0.1)
    stages = [Watched(m, k, schedule, make, head=Head()) for k, m in enumerate(modules)]
    iterations = max(4, 14 // schedule.samples_per_iteration)
    run_serial(schedule, stages, Toy(BATCH, (5,)), iterations)
    for k, wanted in enumerate(memory(schedule)):
        weights, inputs, versions, samples = peaks[k]
        assert versions == wanted.weight_versions
        assert samples == wanted.activations
        assert weights == wanted.weight_versions + working_copies(schedule, k)
        if k > 0 and not local:  # elsewhere inputs need no gradient
            assert inputs == wanted.activations
            newest = schedule.rule.activations is Activations.NEWEST
            assert leaves(BATCH, 5 + k) == newest  # after its backward pass nothing is left of one
        assert not any(p.grad is not None for p in modules[k].parameters())


OPTIMIZERS = {
    "sgd-foreach": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "sgd-fused": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3, fused=True),
    "adam-foreach": partial(torch.optim.Adam, lr=0.01, foreach=True, amsgrad=True),
    "adamw-fused": partial(torch.optim.AdamW, lr=0.01, fused=True),
    "adagrad": partial(torch.optim.Adagrad, lr=0.01),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True),
    "adafactor": partial(torch.optim.Adafactor, lr=0.01),
    "averaged": partial(torch.optim.ASGD, lr=0.01),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_follow_parameters_that_move_to_fresh_storage(make: Any) -> None:
    modules = toy_stages(3)
    with one_thread():
        delayed_training(modules, make, Toy(), 7, [2, 1, 0])
    trained = toy_stages(3)
    parameters = [p for module in trained for p in module.parameters()]
    before = parameters[0].data  # held, so that its memory is not given to another tensor
    schedule = ddg(3)
    stages = [Stage(module, k, schedule, make) for k, module in enumerate(trained)]
    with one_thread():
        run_serial(schedule, stages, Toy(), 7)
    expected = [t for module in modules for t in module.state_dict().values()]
    found = [t for module in trained for t in module.state_dict().values()]
    assert all(map(torch.equal, found, expected))
    assert before.data_ptr() != parameters[0].data_ptr()  # it did move
    again = [p for module in trained for p in module.parameters()]
    assert all(a is b for a, b in zip(parameters, again, strict=True))
