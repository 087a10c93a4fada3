"""Ouroboros: a language model whose first and last stage share the embedding."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ddg_gpu.data import load
from ddg_gpu.execute import run_serial
from ddg_gpu.job import Job, network
from ddg_gpu.partition import split
from ddg_gpu.stage import Stage
from ddg_gpu.train import one_thread, train
from ddg_gpu.transformer import gpt_layers
from ddg_sim.methods import ouroboros

LENGTH, CLASSES, SAMPLES = 6, 5, 7


class Tokens:
    def inputs(self, sample: int) -> Tensor:
        generator = torch.Generator().manual_seed(sample)
        return torch.randint(CLASSES, (3, LENGTH), generator=generator)

    def targets(self, sample: int) -> Tensor:
        return self.inputs(sample).roll(-1, 1)


def stages_of(num_stages: int) -> list[nn.Sequential]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layers = gpt_layers(LENGTH, CLASSES, width=8, heads=2, blocks=3, tied=True)
    cuts = [round(len(layers) * k / num_stages) for k in range(1, num_stages)]
    return split(nn.Sequential(*layers), num_stages, by=cuts, tied=(0, num_stages - 1))


def by_formula(stages: list[nn.Sequential], make: Any) -> None:
    """Whole-model autograd at what the paper's delays say, with two copies of what is shared.

    In tick t the last stage starts after the first one's update of the tick.
    """
    last = len(stages) - 1
    steps = [make(list(stage.parameters())) for stage in stages]
    found: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def copy(stage: nn.Module) -> dict[str, Tensor]:
        return {n: p.detach().clone().requires_grad_() for n, p in stage.named_parameters()}

    def apply(k: int, sample: int) -> None:
        if 0 <= sample < SAMPLES:
            for parameter, own in zip(stages[k].parameters(), found[k, sample], strict=True):
                parameter.grad = own
            steps[k].step()
            steps[k].zero_grad()

    for t in range(SAMPLES + last):
        read = [copy(stage) for stage in stages[:-1]]
        if last:
            apply(0, t - last)
        read.append(copy(stages[last]))
        if t < SAMPLES:
            value = Tokens().inputs(t)
            for stage, weights in zip(stages, read, strict=True):
                value = functional_call(stage, weights, (value,))
            loss = nn.functional.cross_entropy(value, Tokens().targets(t))
            flat = iter(torch.autograd.grad(loss, [w for own in read for w in own.values()]))
            for k, own in enumerate(read):
                found[k, t] = tuple(next(flat) for _ in own)
        for k in range(1 if last else 0, last + 1):
            apply(k, t - (last - k))


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_ouroboros_equals_whole_model_autograd(optimizer: str, num_stages: int) -> None:
    """Bit for bit, both gradients of the embedding included."""
    make = {
        "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
        "adam": partial(torch.optim.Adam, lr=0.01, weight_decay=1e-3),
    }[optimizer]
    expected, modules = stages_of(num_stages), stages_of(num_stages)
    schedule = ouroboros(num_stages)
    stages = [Stage(module, k, schedule, make) for k, module in enumerate(modules)]
    with one_thread():
        by_formula(expected, make)
        run_serial(schedule, stages, Tokens(), SAMPLES)
    shared = modules[0].get_parameter("0.tokens.weight")
    assert modules[-1][-1].get_parameter("output.weight") is shared
    assert not torch.equal(shared, stages_of(num_stages)[0].get_parameter("0.tokens.weight"))
    for own, wanted in zip(modules, expected, strict=True):
        for name, tensor in wanted.state_dict().items():
            assert torch.equal(own.state_dict()[name], tensor), name


def test_a_language_model_learns_and_processes_give_the_same_bits() -> None:
    job = Job(
        "ouroboros",
        3,
        "gpt-tiny-tied",
        iterations=25,
        batch_size=8,
        optimizer="adam",
        learning_rate=3e-3,
        weight_decay=0.0,
    )
    serial, processes = (train(job, load("text"), name) for name in ("serial", "distributed"))
    assert serial is not None
    assert processes is not None
    assert serial.weights_sha256 == processes.weights_sha256
    assert serial.losses == processes.losses
    assert serial.losses[-1] < 2.8 < 3.2 < serial.losses[0]
    state = processes.model.state_dict()
    assert torch.equal(state["0.tokens.weight"], state["5.output.weight"])


def test_other_methods_cannot_cut_what_is_shared() -> None:
    with pytest.raises(
        ValueError, match=r"stages 0 and 1 would share '0\.tokens\.weight': .*; only tied stages"
    ):
        network(Job("bp", 2, "gpt-tiny-tied", iterations=1), load("text"))
    assert len(network(Job("bp", 2, "gpt-tiny", iterations=1), load("text")).modules) == 2
    assert len(network(Job("bp", 1, "gpt-tiny-tied", iterations=1), load("text")).modules) == 1
