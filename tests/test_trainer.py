"""A training loop of one's own: the same bits as the executor's, alone and on several processes."""

from __future__ import annotations

import copy
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import Toy, ToyHead, toy_stages

from ddg_gpu.execute import run_serial
from ddg_gpu.options import NonFiniteLossError, StageOptions
from ddg_gpu.processes import WorkerError, run_together
from ddg_gpu.stage import Stage
from ddg_gpu.trainer import Trainer
from ddg_gpu.transport import MOST_MEMBERS
from ddg_sim.methods import METHODS, bp, ddg, method
from ddg_sim.notation import parse
from ddg_sim.schedule import Schedule, ScheduleError

STEPS = 9


def sgd(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def heads(num_stages: int) -> list[ToyHead]:
    torch.manual_seed(5)
    return [ToyHead() for _ in range(num_stages - 1)]


def reference(schedule: Schedule, steps: int = STEPS) -> list[torch.Tensor]:
    modules = toy_stages(schedule.num_stages)
    made = [*heads(schedule.num_stages), None]
    stages = [Stage(m, k, schedule, sgd, head=made[k]) for k, m in enumerate(modules)]
    run_serial(schedule, stages, Toy(), steps)
    return [tensor for module in modules for tensor in module.state_dict().values()]


def fed(trainer: Trainer, steps: range = range(STEPS)) -> list[Any]:
    """Feed the samples of `Toy`, those of a step together."""
    parts = trainer.schedule.samples_per_iteration * trainer.schedule.replicas
    finished = []
    for step in steps:
        samples = range(step * parts, (step + 1) * parts)
        x = torch.cat([Toy().inputs(sample) for sample in samples])
        y = torch.cat([Toy().targets(sample) for sample in samples])
        finished.append(trainer.step(x, y))
    return finished


def own(trainer: Trainer) -> list[torch.Tensor]:
    return [tensor for module in trainer.modules for tensor in module.state_dict().values()]


CASES = [name for name in METHODS if name not in ("petra", "ouroboros", "interleaved")]


@pytest.mark.parametrize("name", CASES)
def test_steps_give_the_bits_of_the_executor(name: str) -> None:
    schedule = method(name, 3)
    trainer = Trainer(schedule, toy_stages(3), sgd, heads=heads(3))
    finished = [item for item in fed(trainer) if item is not None] + trainer.flush()
    assert [item.step for item in finished] == list(range(STEPS))
    assert all(item.loss > 0 for item in finished)
    wanted = reference(schedule)
    assert all(torch.equal(a, b) for a, b in zip(own(trainer), wanted, strict=True))


def test_the_loss_of_an_older_step_comes_back_with_its_number() -> None:
    trainer = Trainer(method("fdg", 3), toy_stages(3), sgd)
    assert [None if item is None else item.step for item in fed(trainer)] == [
        None,
        None,
        *range(STEPS - 2),
    ]
    assert [item.step for item in trainer.flush()] == [STEPS - 2, STEPS - 1]


def test_after_a_flush_the_pipeline_begins_anew() -> None:
    """BP has no delay: so flushes change nothing there, and something with DDG."""
    for schedule, same in ((bp(2), True), (ddg(2), False)):
        trainer = Trainer(schedule, toy_stages(2), sgd)
        fed(trainer, range(4))
        trainer.flush()
        fed(trainer, range(4, STEPS))
        trainer.flush()
        wanted = reference(schedule)
        assert same == all(torch.equal(a, b) for a, b in zip(own(trainer), wanted, strict=True))


def test_evaluation_disturbs_nothing_in_flight() -> None:
    trainer = Trainer(ddg(3), toy_stages(3), sgd)
    batches = [(Toy().inputs(sample), Toy().targets(sample)) for sample in (100, 101)]
    fed(trainer, range(5))
    first = trainer.evaluate(batches)
    assert first == trainer.evaluate(batches)
    assert 0 <= first <= 1
    assert all(module.training for module in trainer.modules)
    fed(trainer, range(5, STEPS))
    trainer.flush()
    wanted = reference(ddg(3))
    assert all(torch.equal(a, b) for a, b in zip(own(trainer), wanted, strict=True))


def test_state_goes_on_in_another_trainer(tmp_path: Path) -> None:
    options = StageOptions(restorable=True)
    first = Trainer(ddg(3), toy_stages(3), sgd, options=options)
    fed(first, range(4))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = Trainer(ddg(3), toy_stages(3, seed=1), sgd, options=options)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.iteration == 4
    fed(second, range(4, STEPS))
    second.flush()
    wanted = reference(ddg(3))
    assert all(torch.equal(a, b) for a, b in zip(own(second), wanted, strict=True))


def test_after_an_error_a_state_is_gone_back_to() -> None:
    options = StageOptions(restorable=True)
    trainer = Trainer(ddg(3), toy_stages(3), sgd, options=options)
    fed(trainer, range(4))
    state = copy.deepcopy(trainer.state_dict())
    with pytest.raises(NonFiniteLossError, match="sample 4"):
        trainer.step(Toy().inputs(4) * math.nan, Toy().targets(4))
    for go_on in (lambda: fed(trainer, range(5, 6)), trainer.flush):
        with pytest.raises(RuntimeError, match=r"cannot go on after an error: NonFinite.*sample 4"):
            go_on()
    for _ in range(2):  # the second time from a flushed run
        trainer.load_state_dict(copy.deepcopy(state))
        found = fed(trainer, range(4, STEPS)) + trainer.flush()
        assert [item.step for item in found] == list(range(4, STEPS))
        # What the bad sample did to the running means is undone, too.
        wanted = reference(ddg(3))
        assert all(torch.equal(a, b) for a, b in zip(own(trainer), wanted, strict=True))


def process(name: str, rank: int, given: dict[str, Any], report: Any) -> dict[str, Any]:
    schedule = method(name, 2)
    modules = toy_stages(2)
    trainer = Trainer(schedule, modules, sgd, heads=heads(2), example=Toy().inputs(0), timeout=30)
    fed(trainer, range(5))
    accuracy = trainer.evaluate([(Toy().inputs(100), Toy().targets(100))])
    fed(trainer, range(5, STEPS))
    trainer.flush()
    return {"state": modules[rank].state_dict(), "accuracy": accuracy}


@pytest.mark.parametrize("name", ["ddg", "gpipe", "dgl"])
def test_processes_that_step_together_give_the_same_bits(name: str) -> None:
    results = run_together(partial(process, name), 2, {})
    found = [tensor for result in results for tensor in result["state"].values()]
    wanted = reference(method(name, 2))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert results[0]["accuracy"] == results[1]["accuracy"]


def lower(rank: int, given: dict[str, Any], report: Any) -> dict[str, Any]:
    options = StageOptions(precision=torch.bfloat16)
    trainer = Trainer(ddg(2), toy_stages(2), sgd, example=Toy().inputs(0), options=options)
    fed(trainer, range(3))
    return {"found": trainer.evaluate([(Toy().inputs(100), Toy().targets(100))], score)}


def score(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    return float(outputs.double().sum())


def test_processes_evaluate_in_full_precision() -> None:
    alone = Trainer(ddg(2), toy_stages(2), sgd, options=StageOptions(precision=torch.bfloat16))
    fed(alone, range(3))
    expected = alone.evaluate([(Toy().inputs(100), Toy().targets(100))], score)
    assert run_together(lower, 2, {}) == [{"found": expected}] * 2


class Many(torch.nn.Linear):
    def forward(self, inputs: torch.Tensor) -> Any:
        return (super().forward(inputs),) * MOST_MEMBERS


class Together(torch.nn.Linear):
    def forward(self, inputs: Any) -> torch.Tensor:
        return super().forward(sum(inputs))


def many(rank: int, given: dict[str, Any], report: Any) -> dict[str, Any]:
    x, y = torch.ones(5, 4), torch.zeros(5, dtype=torch.long)
    trainer = Trainer(ddg(2), [Many(4, 4), Together(4, 2)], sgd, example=x, timeout=30)
    for _ in range(3):
        trainer.step(x, y)
    return {"rest": len(trainer.flush())}


def test_as_many_tensors_cross_as_are_promised() -> None:
    assert run_together(many, 2, {}) == [{"rest": 0}] * 2


def absent(victim: int, rank: int, given: dict[str, Any], report: Any) -> dict[str, Any]:
    trainer = Trainer(ddg(2), toy_stages(2), sgd, example=Toy().inputs(0), timeout=1.0)
    if rank == victim:
        time.sleep(20)
    trainer.evaluate([(Toy().inputs(100), Toy().targets(100))])
    return {}


@pytest.mark.parametrize("victim", [0, 1])
def test_an_evaluation_does_not_wait_for_ever(victim: int) -> None:
    begin = time.monotonic()
    text = f"evaluation: worker {victim} is gone or did not answer within 1 s"
    with pytest.raises(WorkerError, match=text):
        run_together(partial(absent, victim), 2, {})
    assert time.monotonic() - begin < 15


def flushed(alone: bool, rank: int, given: dict[str, Any], report: Any) -> dict[str, Any]:
    """Steps of different sizes, with a flush between them."""
    modules = toy_stages(2)
    trainer = Trainer(ddg(2), modules, sgd, example=None if alone else Toy().inputs(0), timeout=30)
    for step, size in enumerate((6, 6, 4, 6, 5, 6)):
        if step == 3:
            trainer.flush()
            trainer.flush()
        trainer.step(Toy().inputs(step)[:size], Toy().targets(step)[:size])
    trainer.flush()
    return {"state": [module.state_dict() for module in modules]}


def test_processes_go_on_after_a_flush() -> None:
    alone = flushed(True, 0, {}, None)["state"]
    for rank, result in enumerate(run_together(partial(flushed, False), 2, {})):
        own_state = result["state"][rank]
        assert all(torch.equal(tensor, own_state[name]) for name, tensor in alone[rank].items())


def mismatched(victim: int, rank: int, given: dict[str, Any], report: Any) -> dict[str, Any]:
    trainer = Trainer(ddg(2), toy_stages(2), sgd, example=Toy().inputs(0), timeout=30)
    size = len(Toy().inputs(0)) - (rank == victim)
    for step in range(3):
        trainer.step(Toy().inputs(step)[:size], Toy().targets(step)[:size])
    return {}


@pytest.mark.parametrize("victim", [0, 1])
def test_other_batch_sizes_on_other_processes_are_told(victim: int) -> None:
    with pytest.raises(WorkerError, match=r"examples, stage \d has \d+: give all processes"):
        run_together(partial(mismatched, victim), 2, {}, timeout=30)


def wrong_size(rank: int, given: dict[str, Any], report: Any) -> dict[str, Any]:
    Trainer(ddg(3), toy_stages(3), sgd, example=Toy().inputs(0))
    return {}


def test_another_number_of_processes_is_refused() -> None:
    with pytest.raises(WorkerError, match="has 3 workers, the process group 2 processes: start 3"):
        run_together(wrong_size, 2, {})


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="modules must be 3, one per stage of ddg, got 2"):
        Trainer(ddg(3), toy_stages(2), sgd)
    trainer = Trainer(method("gpipe", 2, micro_batches=4), toy_stages(2), sgd)
    with pytest.raises(ValueError, match="inputs must have at least 4 examples, got 3"):
        trainer.step(Toy().inputs(0)[:3], Toy().targets(0)[:3])
    with pytest.raises(ValueError, match=r"must have one batch size, got \[\d, 2\]"):
        trainer.step(Toy().inputs(0), Toy().targets(0)[:2])
    with pytest.raises(ValueError, match="batches is empty"):
        trainer.evaluate([])
    ahead = "x stages=2 sync=none activations=graph jacobian=stashed samples=1\n"
    ahead += "worker 0: F0(t) B0(t-1) U0(t-1)\nworker 1: F1(t-1) B1(t-2) U1(t-2)"
    with pytest.raises(ScheduleError, match="a step of one worker waits for a later step"):
        Trainer(parse(ahead), toy_stages(2), sgd)


def test_mistakes_are_told() -> None:
    def forgets(parameters: list[torch.nn.Parameter]) -> Any:
        sgd(parameters)

    with pytest.raises(ValueError, match="optimizer must be a function .* not a NoneType"):
        Trainer(ddg(2), toy_stages(2), forgets)
    bad = StageOptions(scheduler=lambda optimizer: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="scheduler must be a function .* not a NoneType"):
        Trainer(ddg(2), toy_stages(2), sgd, options=bad)
    shared = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match="modules 0 and 1 share the parameter 'weight'"):
        Trainer(ddg(2), [shared, shared], sgd)
    trainer = Trainer(ddg(2), toy_stages(2), sgd)
    with pytest.raises(ValueError, match="targets must be a tensor"):
        trainer.step(Toy().inputs(0), [0, 1])
    with pytest.raises(ValueError, match="inputs must be a tensor"):
        trainer.step(Toy().inputs(0).numpy(), Toy().targets(0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="state must be what state_dict"):
        trainer.load_state_dict({})
    state = trainer.state_dict()
    del state["session"]["stage 0"]
    with pytest.raises(ValueError, match="of another process: it has no stage 0"):
        trainer.load_state_dict(state)
