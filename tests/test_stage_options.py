"""Clipping, learning-rate schedulers, autocast, recomputation and non-finite losses of stages."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from oracles import (
    Toy,
    ToyHead,
    delayed_training,
    snapshot,
    toy_layers,
    toy_stages,
    whole_model_loss,
)
from torch import Tensor, nn

from ddg_gpu.execute import run_serial
from ddg_gpu.stage import NonFiniteLossError, Stage, StageOptions, seeded
from ddg_gpu.train import one_thread
from ddg_sim.methods import Semantics, bp, ddg, method
from ddg_sim.schedule import Op, OpKind, Schedule, ScheduleError

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3)
ITERATIONS = 7


def trained(
    schedule: Schedule, options: StageOptions, kind: type[Stage] = Stage, **given: Any
) -> list[Stage]:
    data = given.pop("data", Toy())
    given.setdefault("optimizer", SGD)
    modules = toy_stages(schedule.num_stages)
    stages = [
        kind(m, k, schedule, head=ToyHead(), options=options, **given)
        for k, m in enumerate(modules)
    ]
    with one_thread():
        run_serial(schedule, stages, data, ITERATIONS)
    return stages


def tensors(stages: list[Any]) -> list[Tensor]:
    modules = [getattr(stage, "module", stage) for stage in stages]
    return [tensor for module in modules for tensor in module.state_dict().values()]


def assert_same_bits(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right) > 0
    assert all(map(torch.equal, left, right))


class Wrapped:
    """An optimizer with something before or after its step, as the oracle takes it."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.inner = SGD(parameters)
        self.calls = 0

    def step(self) -> None:
        self.inner.step()


def cosine(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)


class Clipped(Wrapped):
    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, 0.3)
        super().step()


class Annealed(Wrapped):
    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters)
        self.scheduler = cosine(self.inner)

    def step(self) -> None:
        super().step()
        self.scheduler.step()


BAD = 3


class Skipping(Wrapped):
    def step(self) -> None:
        if self.calls != BAD:
            super().step()
        self.calls += 1


def oracle(num_stages: int, wrapped: type[Wrapped]) -> list[Tensor]:
    modules = toy_stages(num_stages)
    with one_thread():
        delays = list(range(num_stages))[::-1]
        delayed_training(modules, wrapped, Toy(), ITERATIONS, delays)  # type: ignore[arg-type]
    return tensors(modules)


@pytest.mark.parametrize("num_stages", [1, 3])
def test_a_stage_clips_its_own_gradient(num_stages: int) -> None:
    found = tensors(trained(ddg(num_stages), StageOptions(clip_norm=0.3)))
    assert_same_bits(found, oracle(num_stages, Clipped))
    assert not torch.equal(found[0], tensors(trained(ddg(num_stages), StageOptions()))[0])


def test_clipping_leaves_the_error_on_its_way_alone() -> None:
    class Shift(nn.Module):
        """Autograd gives one tensor for both: the gradient of the bias, and of the input."""

        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(2, 3))

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs + self.bias

    stage = Stage(Shift(), 1, bp(2), SGD, options=StageOptions(clip_norm=1e-3))
    stage.forward(Op(OpKind.FORWARD, 1, 0, 0, 0), torch.ones(2, 3), torch.tensor([0, 1]))
    error = stage.backward(Op(OpKind.BACKWARD, 1, 0, 0, 0))
    assert isinstance(error, Tensor)
    before = error.clone()
    stage.update(Op(OpKind.UPDATE, 1, 0, 0, 1))
    assert torch.equal(error, before)


@pytest.mark.parametrize("num_stages", [1, 3])
def test_the_learning_rate_follows_its_scheduler(num_stages: int) -> None:
    found = tensors(trained(ddg(num_stages), StageOptions(scheduler=cosine)))
    assert_same_bits(found, oracle(num_stages, Annealed))
    assert not torch.equal(found[0], tensors(trained(ddg(num_stages), StageOptions()))[0])


def test_a_scheduler_that_wants_the_loss_is_refused() -> None:
    options = StageOptions(scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ReduceLROnPlateau needs the loss at every update"):
        Stage(toy_stages(1)[0], 0, bp(1), SGD, options=options)


STASHED = [
    *(method(name, 3) for name in ("ddg", "bp", "fdg", "adl", "dgl", "gpipe", "1f1b", "zb-h1")),
    *(method(name, 3) for name in ("pipedream", "pipedream-2bw")),
    method("pipedream", 3, vertical_sync=True),
    method("interleaved", 4),
]


@pytest.mark.parametrize("schedule", STASHED, ids=lambda schedule: schedule.method)
def test_recomputing_gives_the_same_bits_and_keeps_no_graph(schedule: Schedule) -> None:
    class Watched(Stage):
        def forward(self, *args: Any) -> Any:
            result = super().forward(*args)
            assert all(sample.roots is None for sample in self._flight.samples.values())
            return result

    kept = trained(schedule, StageOptions())
    again = trained(schedule, StageOptions(recompute=True), Watched)
    assert_same_bits(tensors(kept), tensors(again))
    assert kept[-1].losses == again[-1].losses


BF16 = StageOptions(precision=torch.bfloat16)


def test_autocast_equals_plain_autocast() -> None:
    model = nn.Sequential(*toy_layers())
    step, losses = SGD(model.parameters()), []
    with one_thread():
        for sample in range(ITERATIONS):
            with seeded(0, 0, sample), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                logits = model(Toy().inputs(sample))
            assert logits.dtype is torch.bfloat16
            loss = nn.functional.cross_entropy(logits.float(), Toy().targets(sample))
            step.zero_grad()
            loss.backward()
            step.step()
            losses.append(loss.item())
    (stage,) = trained(bp(1), BF16)
    assert_same_bits(tensors([stage]), tensors([model]))
    assert list(stage.losses.values()) == losses
    assert_same_bits(
        tensors(trained(ddg(3), BF16)),
        tensors(trained(ddg(3), StageOptions(precision=torch.bfloat16, recompute=True))),
    )


def test_activations_and_errors_cross_in_the_dtype_they_come_out_in() -> None:
    crossed = []

    class Watched(Stage):
        def forward(self, op: Op, inputs: Any, targets: Any = None) -> Any:
            output = super().forward(op, inputs, targets)
            crossed.append((self.index, output.dtype))
            return output

        def backward(self, op: Op, error: Any = None) -> Any:
            result = super().backward(op, error)
            if result is not None:
                crossed.append((self.index, result.dtype))
            assert all(
                total.dtype is torch.float32
                for own in self._flight.sums.values()
                for total in own.total
                if total is not None
            )
            return result

    # Of four, the first ends in a batch norm, whose output is in the dtype of its input: bfloat16.
    trained(ddg(4), BF16, Watched)
    assert {kind for _, kind in crossed} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        (method("stale", 2), BF16, "stale: precision torch.bfloat16 cannot differentiate a kept"),
        (method("spectrain", 2), BF16, "jacobian=predicted: take stashed weights or replay"),
        (method("sideways", 2), BF16, "precision"),
        (method("fr", 2), StageOptions(recompute=True), "recompute is for kept graphs at stashed"),
        (method("stale", 2), StageOptions(recompute=True), "not for .* jacobian=current"),
        (method("sideways", 2), StageOptions(non_finite="skip"), "take 'raise'"),
    ],
)
def test_options_that_do_not_go_with_a_method_are_refused(
    schedule: Schedule, options: StageOptions, message: str
) -> None:
    with pytest.raises(ScheduleError, match=message):
        Stage(toy_stages(2)[0], 0, schedule, SGD, options=options)


def test_autocast_runs_where_graphs_are_not_rewritten() -> None:
    for name in ("fr", "dsp", "pipedream", "dgl"):
        assert all(torch.isfinite(t).all() for t in tensors(trained(method(name, 3), BF16)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"clip_norm": 0.0}, "clip_norm must be positive, got 0.0"),
        ({"non_finite": "ignore"}, "non_finite must be 'raise' or 'skip', got 'ignore'"),
        ({"precision": torch.float16}, "precision must be torch.bfloat16 or None"),
    ],
)
def test_wrong_options_are_named(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StageOptions(**given)


class Marked(Toy):
    """Marks samples whose loss shall not be finite by negative labels."""

    def __init__(self, *bad: int) -> None:
        super().__init__()
        self.bad = bad

    def targets(self, sample: int) -> Tensor:
        found = super().targets(sample)
        return -1 - found if sample in self.bad else found


def spoilt(number: float) -> Any:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        found = nn.functional.cross_entropy(
            outputs, torch.where(targets < 0, -1 - targets, targets)
        )
        return found * number if targets[0] < 0 else found

    return loss


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error(number: float) -> None:
    given: Any = {"data": Marked(BAD), "loss": spoilt(number)}
    with pytest.raises(
        NonFiniteLossError, match=rf"stage 2 \(of 3\), sample 3: the loss is {number}"
    ):
        trained(ddg(3), StageOptions(), **given)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("num_stages", [1, 3])
def test_a_skipped_sample_is_left_out_by_every_stage(num_stages: int, recompute: bool) -> None:
    options = StageOptions(non_finite="skip", recompute=recompute)
    stages = trained(ddg(num_stages), options, data=Marked(BAD), loss=spoilt(math.nan))
    assert_same_bits(tensors(stages), oracle(num_stages, Skipping))
    assert [s for s, loss in stages[-1].losses.items() if not math.isfinite(loss)] == [BAD]
    assert all(stage.held == (0, 1) for stage in stages)


@pytest.mark.parametrize(
    "schedule",
    [
        *(ddg(3, semantics=semantics) for semantics in Semantics),
        method("spectrain", 3),
        method("pipemare", 3, anneal=4.0, decay=0.4),
        method("pb", 3, spike=True, predict=True),
        method("pipedream", 3, vertical_sync=True),
    ],
    ids=lambda schedule: str(schedule).partition(" samples")[0],
)
def test_a_skipped_update_moves_nothing_under_any_semantics(schedule: Schedule) -> None:
    class Watched(Stage):
        def update(self, op: Op) -> None:
            before = [p.detach().clone() for p in self.module.parameters()]
            momentum = [r.get("optimizer") for r in self._step.state(None).values()]
            kept = [None if m is None else m["momentum_buffer"].clone() for m in momentum if m]
            super().update(op)
            moved = not all(map(torch.equal, before, self.module.parameters()))
            assert moved == (op.sample != BAD)
            if op.sample == BAD:
                now = [m["optimizer"]["momentum_buffer"] for m in self._step.state(None).values()]
                assert_same_bits(kept, now)  # type: ignore[arg-type]
                rates.add(self._step.rate)

    rates: set[float] = set()
    slow = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=50)
    options = StageOptions(non_finite="skip", scheduler=slow)
    data = Marked(*range(BAD + 1 - schedule.samples_per_iteration, BAD + 1))
    stages = trained(schedule, options, Watched, data=data, loss=spoilt(math.inf))
    assert all(torch.isfinite(tensor).all() for tensor in tensors(stages))
    assert len(rates) == 1  # all stages had stepped their schedulers equally often


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1"])
def test_the_mean_goes_over_the_other_micro_batches(name: str) -> None:
    """Samples 4 of 3..5, and all of 6..8, are left out."""
    bad, m, num_stages = (4, 6, 7, 8), 3, 2
    modules = toy_stages(num_stages)
    steps = [SGD(module.parameters()) for module in modules]
    with one_thread():
        for t in range(ITERATIONS):
            now, found = snapshot(modules), []
            for sample in range(m * t, m * (t + 1)):
                loss = whole_model_loss(modules, now, Toy(), sample, seed=0)
                flat = [tensor for stage in now for tensor in stage.values()]
                if sample not in bad:
                    found.append(torch.autograd.grad(loss, flat))
            if name == "gpipe":  # adds gradients in the order in which it differentiates
                found.reverse()
            if not found:
                continue
            means = iter([sum(parts) / len(found) for parts in zip(*found, strict=True)])
            for module, step in zip(modules, steps, strict=True):
                for parameter in module.parameters():
                    parameter.grad = next(means)  # type: ignore[assignment]
                step.step()
    schedule = method(name, num_stages, micro_batches=m)
    options = StageOptions(non_finite="skip")
    stages = trained(schedule, options, data=Marked(*bad), loss=spoilt(math.nan))
    assert_same_bits(tensors(stages), tensors(modules))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_skipped_sample_does_not_spoil_running_means(recompute: bool) -> None:
    class Spoilt(Toy):
        def inputs(self, sample: int) -> Tensor:
            return super().inputs(sample) * (math.nan if sample == BAD else 1.0)

    options = StageOptions(non_finite="skip", recompute=recompute)
    stages = trained(ddg(3), options, data=Spoilt())
    expected = trained(ddg(3), options, data=Marked(BAD), loss=spoilt(math.nan))
    for stage, other in zip(stages, expected, strict=True):
        assert_same_bits(list(stage.module.parameters()), list(other.module.parameters()))
        buffers = dict(stage.module.named_buffers())
        assert all(buffer.isfinite().all() for buffer in buffers.values())
        counts = [own for name, own in buffers.items() if name.endswith("num_batches_tracked")]
        assert all(count == ITERATIONS - 1 for count in counts)


def test_an_error_that_is_not_finite_is_handed_on_as_nan() -> None:
    stage = Stage(toy_stages(3)[1], 1, bp(3), SGD, options=StageOptions(non_finite="skip"))
    output = stage.forward(Op(OpKind.FORWARD, 1, 0, 0, 0), torch.randn(6, 4, 6, 6))
    assert isinstance(output, Tensor)
    error = torch.zeros_like(output)
    error[0, 0] = math.inf
    sent = stage.backward(Op(OpKind.BACKWARD, 1, 0, 0, 0), error)
    assert isinstance(sent, Tensor)
    assert sent.isnan().all()
