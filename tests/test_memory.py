"""What stages hold while they run, against what their schedules say."""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from memory import LIMIT, Layers, layers_of, least, measured, run_stage, trainable

from ddg_gpu.job import Job
from ddg_gpu.weights import VersionStore
from ddg_sim.lowering import memory
from ddg_sim.rule import Jacobian
from ddg_sim.schedule import OpKind, Schedule, staleness, steady_iterations

# A step of its own has no temporary tensors, so one copy of the weights too many is seen.
PLAIN = partial(torch.optim.SGD, lr=1e-3, foreach=False)
# Where gradients of micro-batches are added, a second set of them is there for a moment; where
# weights are predicted, so are they: benchmarks/README.md has those ratios.
LEAN = ["bp", "ddg", "ddg/current", "ddg/replay", "fdg", "dsp", "dgl", "pipedream", "stale", "pb"]


class Reading(nn.Module):
    """A layer that notes the weights which its forward passes read."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3) + 0.1)
        self.read: list[Tensor] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.read.append(self.weight.detach().clone())
        return inputs @ self.weight


def without_corrections(schedule: Schedule) -> Schedule:
    """Its order and delays: predicted weights would be no version."""
    rule = schedule.rule
    jacobian = Jacobian.CURRENT if rule.jacobian is Jacobian.PREDICTED else rule.jacobian
    return replace(schedule, rule=replace(rule, transforms=(), jacobian=jacobian))


def cases() -> list[Any]:
    return [
        pytest.param(without_corrections(schedule), id=f"{name}-{stages}")
        for stages in (1, 2, 3, 4)
        for name, schedule in trainable(stages)
    ]


@pytest.mark.parametrize("schedule", cases())
def test_every_method_holds_and_reads_what_its_schedule_says(schedule: Schedule) -> None:
    """Samples in flight, versions held, and staleness: all counted, none read off operations."""
    settles = steady_iterations(schedule)
    iterations = settles + schedule.num_ticks(0) + 3
    for k in range(schedule.num_stages):
        shape = torch.Size((2, 3))
        last = k == schedule.num_stages - 1
        layers = Layers(
            Reading(), nn.Identity(), partial(torch.ones, 2, 3), shape, first=k == 0, last=last
        )
        versions, read, held = [torch.eye(3) + 0.1], {}, (0, 0)
        stale: dict[int, int] = defaultdict(int)
        for op, stage in run_stage(schedule, k, layers, iterations, partial(torch.optim.SGD, lr=1)):
            body: Any = stage.module
            held = tuple(map(max, zip(held, stage.held, strict=True)))  # type: ignore[assignment]
            if op.kind is OpKind.FORWARD:
                (read[op.sample],) = (
                    number
                    for number, weights in enumerate(versions)
                    if torch.equal(weights, body.read[-1])
                )
            elif op.kind is OpKind.UPDATE:
                for sample in range(op.sample - schedule.samples_per_iteration + 1, op.sample + 1):
                    age = len(versions) - 1 - read[sample]
                    stale[op.iteration] = max(stale[op.iteration], age)
                versions.append(body.weight.detach().clone())
        needs = memory(schedule)[k]
        assert held == (needs.activations, needs.weight_versions)
        settled = [stale[t] for t in sorted(stale) if t >= settles]
        assert settled
        assert set(settled) == {staleness(schedule)[k]}


def ratio(name: str, stage: int) -> float:
    schedule = dict(trainable(3))[name]
    job = Job(schedule.method, 3, "mlp", iterations=1, batch_size=4)
    layers = layers_of(job, schedule)[stage]
    return measured(schedule, stage, layers, PLAIN) / least(schedule, stage, layers, PLAIN)


@pytest.mark.parametrize("name", LEAN)
def test_a_stage_needs_no_more_memory_than_its_schedule(name: str) -> None:
    assert ratio(name, 0) <= LIMIT


def test_one_copy_of_the_weights_too_many_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    views = VersionStore._views

    def copies(store: VersionStore) -> Any:
        return {
            name: tensor.detach().clone().requires_grad_(tensor.requires_grad)
            for name, tensor in views(store).items()
        }

    monkeypatch.setattr(VersionStore, "_views", copies)
    assert ratio("ddg", 0) > LIMIT
