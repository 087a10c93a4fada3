"""A stage's state between two operations: taken, stored, and gone on from, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from oracles import Toy, ToyHead, toy_layers, toy_stages
from torch import Tensor, nn

from ddg_gpu.reversible import Coupling
from ddg_gpu.stage import Stage, StageOptions
from ddg_gpu.state import StageState, flatten, nest
from ddg_gpu.train import one_thread
from ddg_sim.dependencies import Relation
from ddg_sim.lowering import Barrier, Receive, Send, instructions
from ddg_sim.methods import METHODS, Semantics, bp, ddg, method, petra
from ddg_sim.notation import parse
from ddg_sim.schedule import Op, OpKind, Schedule

#: Tied stages and replicas need more than a stage: see test_restart.py. PETRA: see below.
OTHERS = ("petra", "ouroboros", "dp")
RESTORABLE = StageOptions(restorable=True)
Make = Callable[[int], Stage]


def operations(schedule: Schedule, iterations: int, drain: bool = True) -> Iterator[Op]:
    """All operations in an order that respects the messages: a worker waits for what it needs."""
    programs = {
        worker: instructions(schedule, worker, iterations, drain)
        for worker in range(len(schedule.workers))
    }
    sent, waiting = set(), {}
    while programs:
        for worker, program in list(programs.items()):
            while True:
                instruction = waiting.pop(worker, None) or next(program, None)
                match instruction:
                    case None:
                        del programs[worker]
                        break
                    case Receive(message=message) if message not in sent:
                        waiting[worker] = instruction
                        break
                    case Send(message=message):
                        sent.add(message)
                    case Op():
                        yield instruction
                    case Receive() | Barrier():
                        pass


def play(op: Op, stage: Stage, values: dict[Any, Any], data: Toy) -> None:
    """Run one operation; what passes between stages lies in ``values``."""
    k, s = op.stage, op.sample
    if op.kind is OpKind.FORWARD:
        inputs = values.pop((Relation.ACTIVATION, k, s)) if k else data.inputs(s)
        output = stage.forward(op, inputs, data.targets(s) if stage.has_loss else None)
        if not stage.is_last:
            values[Relation.ACTIVATION, k + 1, s] = output
    elif op.kind is OpKind.RECOMPUTE:
        stage.recompute(op)
    elif op.kind is OpKind.UPDATE:
        stage.update(op)
    else:
        second = op.kind is OpKind.BACKWARD_WEIGHT
        none = stage.has_loss or second
        error = stage.backward(op, None if none else values.pop((Relation.GRADIENT, k, s)))
        if error is not None:
            values[Relation.GRADIENT, k - 1, s] = error


def stored(state: StageState) -> StageState:
    """Through JSON, and through other memory; nothing of the old stage is left in it."""
    parts = []
    for tree in (state.trained, state.flight):
        tensors, plain = flatten(tree, "some/where")
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        parts.append(nest(tensors, json.loads(json.dumps(plain))))
    return StageState(*parts)


def finished(
    schedule: Schedule, make: Make, iterations: int, resume: bool, data: Toy | None = None
) -> list[Stage]:
    """Stages after a run; with ``resume``, a new stage takes over after every operation."""
    stages = [make(k) for k in range(schedule.num_stages)]
    values: dict[Any, Any] = {}
    with one_thread():
        for op in operations(schedule, iterations):
            play(op, stages[op.stage], values, data or Toy())
            if resume:
                state = stored(stages[op.stage].state())
                stages[op.stage] = make(op.stage)
                stages[op.stage].restore(state)
    return stages


def maker(schedule: Schedule, optimizer: Any, options: StageOptions = RESTORABLE) -> Make:
    """Makes stages whose weights differ from one call to the next: the state must bring them."""
    calls = iter(range(10**6))

    def make(k: int) -> Stage:
        number = next(calls)
        seed = 0 if number < schedule.num_stages else number
        module = toy_stages(schedule.num_stages, seed)[k]
        return Stage(module, k, schedule, optimizer, head=ToyHead(), options=options)

    return make


def tensors(stages: list[Stage]) -> list[Tensor]:
    return [tensor for stage in stages for tensor in stage.module.state_dict().values()]


def assert_goes_on(schedule: Schedule, optimizer: Any, options: StageOptions = RESTORABLE) -> None:
    iterations = 5 if schedule.samples_per_iteration == 1 else 3
    runs = [
        finished(schedule, maker(schedule, optimizer, options), iterations, resume)
        for resume in (False, True)
    ]
    left, right = map(tensors, runs)
    assert all(map(torch.equal, left, right))
    assert [stage.losses for stage in runs[0]] == [stage.losses for stage in runs[1]]


def trainable() -> list[Any]:
    cases = [
        method(name, 4 if name == "interleaved" else 3) for name in METHODS if name not in OTHERS
    ]
    cases += [ddg(3, semantics=semantics) for semantics in Semantics]
    cases += [
        method("pipedream", 3, vertical_sync=True),
        method("pb", 3, spike=True, predict=True),
        method("pipemare", 3, anneal=4.0, decay=0.4),
        method("gpipe", 3, replay=True, micro_batches=2),
    ]
    return [pytest.param(case, id=f"{index}-{case.method}") for index, case in enumerate(cases)]


SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3)


@pytest.mark.parametrize("schedule", trainable())
def test_every_method_goes_on_from_any_instant(schedule: Schedule) -> None:
    assert_goes_on(schedule, SGD)


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.AdamW, lr=0.01, amsgrad=True, foreach=True),
        partial(torch.optim.Adam, lr=0.01, fused=True),
        partial(torch.optim.Adagrad, lr=0.01),
    ],
    ids=["adamw", "adam-fused", "adagrad"],
)
def test_optimizers_go_on(optimizer: Any) -> None:
    assert_goes_on(ddg(3), optimizer)


def reversible_stages(num_stages: int, seed: int) -> list[nn.Module]:
    """The first keeps its inputs, the last its outputs, the others nothing of a sample."""

    def half() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.Dropout(0.3))
        return [first, *(Coupling(half(), half()) for _ in range(num_stages - 1))]


HALVES = """x stages=3 sync=none activations=reconstruct jacobian=current samples=1
worker 0: F0(t) I0(t-2) W0(t-2) U0(t-2)
worker 1: F1(t) I1(t-1) W1(t-1) U1(t-1)
worker 2: F2(t) I2(t) W2(t) U2(t)"""


@pytest.mark.parametrize("schedule", [petra(3), petra(3, accumulate=2), parse(HALVES)])
def test_reversible_stages_go_on(schedule: Schedule) -> None:
    def maker() -> Make:
        calls = iter(range(1000))

        def make(k: int) -> Stage:
            module = reversible_stages(3, seed=0 if next(calls) < 3 else 77)[k]
            return Stage(module, k, schedule, SGD, options=RESTORABLE)

        return make

    runs = [finished(schedule, maker(), 5, resume) for resume in (False, True)]
    assert all(map(torch.equal, *map(tensors, runs)))
    assert [stage.losses for stage in runs[0]] == [stage.losses for stage in runs[1]]


class Reader(nn.Module):
    """Reads a buffer that its own forward pass changes, as spectral normalisation does."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mask", torch.ones(4))

    def forward(self, inputs: Tensor) -> Tensor:
        self.count += 1
        result: Tensor = torch.tanh(self.linear(inputs) * self.mask) * self.count.clone()
        return result


@pytest.mark.parametrize(
    ("semantics", "recompute"), [*((s, False) for s in Semantics), (Semantics.STASH, True)]
)
def test_modules_that_read_buffers_go_on(semantics: Semantics, recompute: bool) -> None:
    schedule = ddg(3, semantics=semantics)
    options = StageOptions(restorable=True, recompute=recompute)
    data = Toy(shape=(4,), classes=4)

    def maker() -> Make:
        calls = iter(range(1000))

        def make(k: int) -> Stage:
            return Stage(Reader(k if next(calls) < 3 else 77), k, schedule, SGD, options=options)

        return make

    runs = [finished(schedule, maker(), 5, resume, data) for resume in (False, True)]
    assert all(map(torch.equal, *map(tensors, runs)))


def test_what_is_kept_for_restoring_is_as_many_copies_as_versions_in_flight() -> None:
    """With current weights, the store itself holds one version only."""
    schedule = ddg(3, semantics=Semantics.CURRENT)
    stage = maker(schedule, SGD)(0)
    values: dict[Any, Any] = {}
    others = [maker(schedule, SGD)(k) for k in (1, 2)]
    for op in operations(schedule, 6, drain=False):
        play(op, [stage, *others][op.stage], values, Toy())
    flight = stage.state().flight["samples"]
    assert stage.held == (2, 1)
    assert len(flight["readings"]) == 2


def test_without_being_restorable_there_is_no_state_in_flight() -> None:
    schedule = ddg(2)
    stage = maker(schedule, SGD, StageOptions())(0)
    stage.state()
    stage.forward(next(operations(schedule, 1)), Toy().inputs(0))
    with pytest.raises(
        RuntimeError, match=r"stage 0 \(of 2\) has .* StageOptions\(restorable=True"
    ):
        stage.state()


def renamed(tree: Any, first_layer: int) -> Any:
    """Records under the names that they have in the whole model."""
    result: dict[str, Any] = {}
    for name, record in tree.items():
        layer, rest = name.split(".", 1)
        result[f"{int(layer) + first_layer}.{rest}"] = record
    return result


@pytest.mark.parametrize("anneals", [False, True])
def test_after_a_flush_other_stages_go_on(anneals: bool) -> None:
    """Two stages until all samples are used, then four: as plain training on one device."""

    def scheduler(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5], gamma=0.5)

    options = StageOptions(scheduler=scheduler if anneals else None)
    adam, data = partial(torch.optim.Adam, lr=0.01), Toy()
    runs = []
    for cuts in ([2, 4], [1, 1]):
        whole: dict[str, Any] = {"parameters": {}, "buffers": {}}
        samples = 0
        for number, cut in enumerate(cuts):
            schedule = bp(cut)
            modules = toy_stages(cut, seed=number)
            for module in modules:  # where dropout draws depends on the cut
                for layer in module.modules():
                    if isinstance(layer, nn.Dropout):
                        layer.p = 0.0
            stages = [Stage(m, k, schedule, adam, options=options) for k, m in enumerate(modules)]
            size = len(toy_layers()) // cut
            if samples:
                for k, stage in enumerate(stages):
                    own = {
                        kind: renamed(
                            {
                                n: r
                                for n, r in records.items()
                                if 0 <= int(n.split(".")[0]) - k * size < size
                            },
                            -k * size,
                        )
                        for kind, records in whole.items()
                    }
                    stage.load(own, samples=samples, updates=samples)
            values: dict[Any, Any] = {}
            with one_thread():
                for op in operations(schedule, 4):
                    shifted = Op(
                        op.kind, op.stage, op.iteration, op.sample + samples, op.version + samples
                    )
                    play(shifted, stages[op.stage], values, data)
            samples += 4
            for k, stage in enumerate(stages):
                for kind, records in stored(stage.state()).trained.items():
                    whole[kind] |= renamed(records, k * size)
        runs.append(whole)
    left, right = ({n: r["value"] for n, r in run["parameters"].items()} for run in runs)
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=1e-5, atol=1e-7)
    rates = {record["options"]["lr"] for run in runs for record in run["parameters"].values()}
    assert rates == {0.01 / 4 if anneals else 0.01}


def test_buffers_are_the_first_replica_s_wherever_a_run_goes_on() -> None:
    schedule = method("dp", 1, replicas=2)
    stage = maker(schedule, SGD)(0)
    stage.load(stored(stage.state()).trained, samples=5, updates=5)
    counts = []
    for sample in range(5, 9):
        op = Op(OpKind.FORWARD, 0, iteration=0, sample=sample, version=5)
        stage.forward(op, Toy().inputs(sample), Toy().targets(sample))
        counts.append(int(stage.module.get_buffer("0.1.num_batches_tracked")))
    assert counts == [1, 1, 2, 2]


def test_records_that_do_not_fit_are_refused() -> None:
    schedule = ddg(2)
    stage = maker(schedule, SGD)(0)
    trained = stored(stage.state()).trained
    del trained["parameters"]["0.0.bias"]
    with pytest.raises(ValueError, match="parameter '0.0.bias' is missing, the stage needs shape"):
        stage.load(trained)
    trained = stored(stage.state()).trained
    trained["buffers"]["1.1.running_mean"] = torch.zeros(9)
    with pytest.raises(ValueError, match=r"'1.1.running_mean' is of shape \(9,\), .* \(4,\)"):
        stage.load(trained)
    trained = stored(stage.state()).trained
    trained["parameters"]["0.0.bias"]["options"]["lr"] = 7.0
    with pytest.raises(ValueError, match="trained with different options"):
        stage.load(trained)


def test_what_is_no_plain_data_is_named() -> None:
    with pytest.raises(ValueError, match="here/a/0 is no plain data but a Toy"):
        flatten({"a": [Toy()]}, "here")
    with pytest.raises(ValueError, match="tensor 'x' is missing"):
        nest({}, {"$tensor": "x"})
