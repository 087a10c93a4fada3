"""Long runs hold no more than short ones: no tensors, no file handles, no memory."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import Toy, ToyHead
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from growth import MIB, Watched, record_bytes

from ddg_gpu.distributed import run_stages
from ddg_gpu.execute import run_serial
from ddg_gpu.processes import run_together
from ddg_gpu.stage import Stage
from ddg_sim.methods import ddg, method
from ddg_sim.schedule import Schedule

FEW, MANY = 300, 1200
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="needs /proc/self/statm (Linux)"
)


class Vectors(Toy):
    """Cheap mini-batches: of two vectors."""

    def inputs(self, sample: int) -> Tensor:
        return torch.full((2, 4), sample / MANY)

    def targets(self, sample: int) -> Tensor:
        return torch.zeros(2, dtype=torch.int64)


def stages(schedule: Schedule) -> list[Stage]:
    make = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
    return [Stage(nn.Linear(4, 4), k, schedule, make, head=ToyHead()) for k in range(2)]


def check(found: dict[int, Any], needs: int) -> None:
    first, last = found.values()
    assert last.handles <= first.handles
    assert last.tensors <= first.tensors
    beyond = last.resident - first.resident - needs
    assert beyond < MIB, f"{beyond} bytes beyond records"


@pytest.mark.parametrize("name", ["ddg", "gpipe", "sideways"])
def test_one_process_does_not_grow(name: str) -> None:
    schedule = method(name, 2)
    m = schedule.samples_per_iteration
    watched = Watched(Vectors(), (m * FEW, m * (MANY - 1)))
    run_serial(schedule, stages(schedule), watched, MANY)
    check(watched.found, record_bytes(schedule, [0, 1], MANY - FEW))


def task(rank: int, given: dict[str, Any], report: Any) -> dict[str, Any]:
    schedule = ddg(2)
    watched = Watched(Vectors(), (FEW, MANY - 1))
    run_stages(
        schedule,
        rank,
        {rank: stages(schedule)[rank]},
        watched,
        lambda message: torch.empty(2, 4),
        MANY,
        timeout=60,
    )
    check(watched.found, record_bytes(schedule, [rank], MANY - FEW))
    return {"looks": len(watched.found)}


def test_processes_do_not_grow() -> None:
    assert [result["looks"] for result in run_together(task, 2, {})] == [2, 2]


def test_a_forgotten_tensor_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Tensor] = []
    update = Stage.update

    def keeps(stage: Stage, *args: Any) -> None:
        kept.append(torch.zeros(1))
        update(stage, *args)

    monkeypatch.setattr(Stage, "update", keeps)
    watched = Watched(Vectors(), (30, 60))
    run_serial(ddg(2), stages(ddg(2)), watched, 70)
    with pytest.raises(AssertionError, match="tensors"):
        check(watched.found, 0)
