"""The serial executor against plain PyTorch and against whole-model autograd, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    Toy,
    current_weights_chain,
    delayed_training,
    recursive_training,
    toy_layers,
    toy_stages,
    whole_model_loss,
)
from strategies import schedules
from torch import Tensor, nn

from ddg_gpu.execute import LocalTransport, run_serial
from ddg_gpu.stage import Stage, seeded
from ddg_gpu.train import one_thread
from ddg_sim.lowering import memory
from ddg_sim.methods import Semantics, bp, ddg
from ddg_sim.rule import Activations, Jacobian, Rule
from ddg_sim.schedule import OpKind, OpTemplate, Schedule, ScheduleError, Sync

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-3),
    # A fused step does not bump autograd's version counter, so it would go wrong silently.
    "fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
}
ITERATIONS = 9


def state(modules: list[nn.Module]) -> list[Tensor]:
    return [tensor for module in modules for tensor in module.state_dict().values()]


def assert_same_bits(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right) > 0
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def distance(left: list[Tensor], right: list[Tensor]) -> float:
    pairs = [(a.double(), b.double()) for a, b in zip(left, right, strict=True)]
    return float(sum(((a - b) ** 2).sum() for a, b in pairs) ** 0.5)


def run(schedule: Schedule, optimizer: str = "sgd", seed: int = 0) -> tuple[list[Tensor], Stage]:
    modules = toy_stages(schedule.num_stages)
    stages = [
        Stage(module, k, schedule, OPTIMIZERS[optimizer], seed) for k, module in enumerate(modules)
    ]
    with one_thread():
        run_serial(schedule, stages, Toy(), ITERATIONS)
    return state(modules), stages[-1]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("schedule", [bp(1), ddg(1), ddg(1, semantics=Semantics.REPLAY)], ids=str)
def test_one_stage_equals_a_plain_pytorch_loop(schedule: Schedule, optimizer: str) -> None:
    data, model = Toy(), nn.Sequential(*toy_layers())
    step = OPTIMIZERS[optimizer](list(model.parameters()))
    losses = []
    with one_thread():
        for sample in range(ITERATIONS):
            step.zero_grad()
            with seeded(0, 0, sample):
                output = model(data.inputs(sample))
            loss = nn.functional.cross_entropy(output, data.targets(sample))
            loss.backward()
            step.step()
            losses.append(loss.item())
    weights, last = run(schedule, optimizer)
    assert_same_bits(weights, state([model]))
    assert [last.losses[sample] for sample in range(ITERATIONS)] == losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_ddg_equals_whole_model_autograd_at_the_delayed_weights(
    num_stages: int, optimizer: str
) -> None:
    delays = [num_stages - 1 - k for k in range(num_stages)]
    modules = toy_stages(num_stages)
    with one_thread():
        losses = delayed_training(modules, OPTIMIZERS[optimizer], Toy(), ITERATIONS, delays)
    weights, last = run(ddg(num_stages), optimizer)
    assert_same_bits(weights, state(modules))
    assert [last.losses[sample] for sample in range(ITERATIONS)] == losses


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_bp_equals_the_undelayed_formula(num_stages: int) -> None:
    modules = toy_stages(num_stages)
    with one_thread():
        delayed_training(modules, OPTIMIZERS["sgd"], Toy(), ITERATIONS, [0] * num_stages)
    assert_same_bits(run(bp(num_stages))[0], state(modules))


@pytest.mark.parametrize("semantics", Semantics)
@pytest.mark.parametrize("num_stages", [2, 4])
def test_synchronisation_does_not_change_a_bit(num_stages: int, semantics: Semantics) -> None:
    results = [run(ddg(num_stages, sync, semantics))[0] for sync in Sync]
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_the_three_semantics_differ_measurably() -> None:
    found = {semantics: run(ddg(3, semantics=semantics))[0] for semantics in Semantics}
    stash = found[Semantics.STASH]
    assert distance(stash, found[Semantics.CURRENT]) > 1e-2
    assert distance(stash, found[Semantics.REPLAY]) > 1e-2
    assert distance(found[Semantics.CURRENT], found[Semantics.REPLAY]) > 1e-2


class LinearTanh(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.tanh(inputs.flatten(1) @ self.weight)


@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("semantics", [Semantics.CURRENT, Semantics.REPLAY])
def test_current_and_replay_equal_hand_written_backward_passes(
    num_stages: int, semantics: Semantics
) -> None:
    generator = torch.Generator().manual_seed(7)
    data = Toy(shape=(4,))
    weights = [torch.randn(4, 4, generator=generator).double() for _ in range(num_stages)]
    data.inputs = lambda sample: Toy(shape=(4,)).inputs(sample).double()  # type: ignore[method-assign]
    schedule = ddg(num_stages, semantics=semantics)
    delays = [num_stages - 1 - k for k in range(num_stages)]

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (outputs**2).sum() / len(outputs)

    modules = [LinearTanh(weight) for weight in weights]
    stages = [
        Stage(module, k, schedule, lambda p: torch.optim.SGD(p, lr=0.2), loss=loss)
        for k, module in enumerate(modules)
    ]
    run_serial(schedule, stages, data, ITERATIONS)
    expected = current_weights_chain(
        weights, data, ITERATIONS, delays, 0.2, replay=semantics is Semantics.REPLAY
    )
    for module, weight in zip(modules, expected, strict=True):
        torch.testing.assert_close(module.weight.detach(), weight, rtol=1e-12, atol=1e-12)


def varied(schedule: Schedule, lag: int, halves: bool) -> Schedule:
    """Forward passes at weights of up to ``lag`` versions ago, backward passes in two halves."""
    workers = []
    for body in schedule.workers:
        found: list[OpTemplate] = []
        for place, template in enumerate(body):
            if template.kind is OpKind.FORWARD:
                found.append(replace(template, version_lag=place % (lag + 1)))
            elif template.kind is OpKind.BACKWARD and halves:
                found.append(replace(template, kind=OpKind.BACKWARD_INPUT))
                found.append(replace(template, kind=OpKind.BACKWARD_WEIGHT))
            else:
                found.append(template)
        workers.append(tuple(found))
    return replace(schedule, workers=tuple(workers))


@given(schedules(max_stages=3), st.integers(1, 5), st.booleans(), st.integers(0, 2), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_stashing_schedule_equals_the_recursion_over_versions(
    schedule: Schedule, iterations: int, recomputes: bool, lag: int, halves: bool
) -> None:
    """Random lags, micro-batches and homes of stages; activations kept or recomputed."""
    schedule = varied(schedule, lag, halves)
    has_recompute = any(t.kind is OpKind.RECOMPUTE for t in schedule.templates())
    stored = Activations.INPUT if has_recompute and recomputes else Activations.GRAPH
    schedule = replace(schedule, rule=Rule(stored, Jacobian.STASHED))
    reads: dict[tuple[int, int], int] = {}
    groups: dict[tuple[int, int], list[int]] = {}
    m = schedule.samples_per_iteration
    for worker in range(len(schedule.workers)):
        for op in schedule.program(worker, iterations):
            if op.kind is OpKind.FORWARD:
                reads[op.stage, op.sample] = op.version
            elif op.kind is OpKind.UPDATE:
                groups[op.stage, op.version] = list(range(op.sample - m + 1, op.sample + 1))
    data, generator = Toy(shape=(3,)), torch.Generator().manual_seed(3)
    initial = [
        torch.randn(3, 3, generator=generator, dtype=torch.float64)
        for _ in range(schedule.num_stages)
    ]
    expected = recursive_training(reads, groups, initial, data, rate=0.05)

    class Double(Toy):
        def inputs(self, sample: int) -> Tensor:
            return super().inputs(sample).double()

    modules = [LinearTanh(weight) for weight in initial]
    stages = [
        Stage(
            module,
            k,
            schedule,
            lambda p: torch.optim.SGD(p, lr=0.05),
            loss=lambda outputs, targets: (outputs**2).sum(),
        )
        for k, module in enumerate(modules)
    ]
    run_serial(schedule, stages, Double(shape=(3,)), iterations)
    for module, weight in zip(modules, expected, strict=True):
        torch.testing.assert_close(module.weight.detach(), weight, rtol=1e-12, atol=1e-12)
    assert all(held == 0 and versions <= 1 + lag for held, versions in (s.held for s in stages))


def test_replay_moves_batch_norm_statistics_once() -> None:
    weights, _ = run(ddg(3, semantics=Semantics.REPLAY))
    counts = [tensor for tensor in weights if tensor.dtype is torch.int64]
    assert [int(count) for count in counts] == [ITERATIONS] * 3


@pytest.mark.parametrize("semantics", Semantics)
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_held_samples_and_versions_equal_the_predicted_ones(
    num_stages: int, semantics: Semantics
) -> None:
    schedule = ddg(num_stages, semantics=semantics)
    modules = toy_stages(num_stages)
    peaks = [(0, 0)] * num_stages

    class Watched(Stage):
        def forward(self, *args: object, **kwargs: object) -> Tensor:
            result = super().forward(*args, **kwargs)  # type: ignore[arg-type]
            now = self.held
            before = peaks[self.index]
            peaks[self.index] = (max(before[0], now[0]), max(before[1], now[1]))
            return result

    stages = [Watched(m, k, schedule, OPTIMIZERS["sgd"]) for k, m in enumerate(modules)]
    run_serial(schedule, stages, Toy(), ITERATIONS)
    assert peaks == [(stage.activations, stage.weight_versions) for stage in memory(schedule)]
    assert [stage.held for stage in stages] == [(0, 1)] * num_stages


def test_without_drain_the_delayed_samples_stay_in_flight() -> None:
    schedule = ddg(3)
    stages = [Stage(m, k, schedule, OPTIMIZERS["sgd"]) for k, m in enumerate(toy_stages(3))]
    run_serial(schedule, stages, Toy(), ITERATIONS, drain=False)
    assert [stage.held[0] for stage in stages] == [2, 1, 0]


def test_timeline_obeys_the_dependencies() -> None:
    schedule = ddg(3)
    stages = [Stage(m, k, schedule, OPTIMIZERS["sgd"]) for k, m in enumerate(toy_stages(3))]
    spans = run_serial(schedule, stages, Toy(), ITERATIONS).spans
    when = {
        (span.op.kind, span.op.stage, span.op.sample): span for span in spans if span.op is not None
    }
    assert len(when) == len(spans) == 3 * 3 * ITERATIONS
    for (kind, stage, sample), span in when.items():
        if kind is OpKind.FORWARD and stage > 0:
            assert when[kind, stage - 1, sample].end <= span.start
        if kind is OpKind.BACKWARD and stage < 2:
            assert when[kind, stage + 1, sample].end <= span.start


def test_updates_in_place_are_refused_where_nothing_was_stashed() -> None:
    # A schedule that lies about its staleness would read weights that are gone.
    schedule = ddg(2)
    stages = [Stage(m, k, bp(2), OPTIMIZERS["sgd"]) for k, m in enumerate(toy_stages(2))]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run_serial(schedule, stages, Toy(), ITERATIONS)


def test_a_deadlock_is_an_error() -> None:
    # With one-slot mailboxes, stage 0 would have to receive an error before it may start.
    stages = [Stage(m, k, bp(2), OPTIMIZERS["sgd"]) for k, m in enumerate(toy_stages(2))]
    with pytest.raises(ScheduleError, match="deadlock"):
        run_serial(replace(bp(2), sync=Sync.MAILBOX), stages, Toy(), 2)


def test_lost_messages_are_an_error_and_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalTransport, "ready", lambda self, instruction: False)
    stages = [Stage(m, k, ddg(2), OPTIMIZERS["sgd"]) for k, m in enumerate(toy_stages(2))]
    with pytest.raises(ScheduleError, match=r"workers \[0, 1\] wait for one another"):
        run_serial(ddg(2), stages, Toy(), 2)


def test_a_stage_without_parameters_trains_the_others() -> None:
    modules: list[nn.Module] = [nn.Flatten(), nn.Linear(72, 3)]
    schedule = ddg(2)
    stages = [Stage(m, k, schedule, OPTIMIZERS["sgd"]) for k, m in enumerate(modules)]
    before = modules[1].weight.detach().clone()  # type: ignore[operator, union-attr]
    run_serial(schedule, stages, Toy(), 3)
    assert not torch.equal(before, modules[1].weight)  # type: ignore[arg-type]


def test_dropout_depends_on_seed_stage_and_sample_only() -> None:
    first, _ = run(ddg(3), seed=5)
    again, _ = run(ddg(3), seed=5)
    other, _ = run(ddg(3), seed=6)
    assert_same_bits(first, again)
    assert distance(first, other) > 1e-3


def test_the_oracle_itself_uses_dropout_and_batch_norm() -> None:
    modules = toy_stages(2)
    weights = [dict(module.named_parameters()) for module in modules]
    one = whole_model_loss(modules, weights, Toy(), 0, seed=0)
    two = whole_model_loss(modules, weights, Toy(), 0, seed=1)
    assert one.item() != two.item()
