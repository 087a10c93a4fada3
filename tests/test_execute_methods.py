"""The catalogue's methods on tensors: against the NumPy executor, formulas, and one another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from oracles import Toy, ToyHead, snapshot, toy_stages, whole_model_loss
from torch import Tensor, nn

from ddg_gpu.execute import run_serial
from ddg_gpu.stage import Stage, seeded
from ddg_gpu.step import Motion
from ddg_gpu.train import one_thread
from ddg_gpu.weights import VersionStore
from ddg_sim.lowering import memory
from ddg_sim.methods import METHODS, method
from ddg_sim.notation import parse
from ddg_sim.schedule import Op, Schedule, ScheduleError
from theory.iterate import iterate

WIDTH, RATE = 3, 0.2


@dataclass
class TanhChain:
    """h_k = tanh(W_k h_{k-1}), loss ½‖h - y‖²: layered, differentiated by hand, in NumPy."""

    stages: int
    num_samples: int = 5
    name: str = "tanh-chain"

    def __post_init__(self) -> None:
        draw = np.random.default_rng(7)
        self.start = draw.normal(size=self.stages * WIDTH**2)
        self.x, self.y = draw.normal(size=(2, self.num_samples, WIDTH))
        cuts = range(0, len(self.start) + 1, WIDTH**2)
        self.blocks = tuple(slice(a, a + WIDTH**2) for a in cuts[:-1])

    def inputs(self, sample: Any) -> Any:
        return self.x[sample]

    def forward(self, stage: int, w_k: Any, h: Any) -> Any:
        return np.tanh(np.einsum("pij,pj->pi", w_k.reshape(-1, WIDTH, WIDTH), h))

    def backward(self, stage: int, w_k: Any, h_in: Any, h_out: Any, delta: Any) -> Any:
        inner = delta * (1 - h_out**2)
        gradient = np.einsum("pi,pj->pij", inner, h_in).reshape(len(inner), -1)
        return gradient, np.einsum("pij,pi->pj", w_k.reshape(-1, WIDTH, WIDTH), inner)

    def loss_gradient(self, h: Any, sample: Any) -> Any:
        return h - self.y[sample]


@dataclass
class Drawn:
    """The chain's samples in the order of a path, as mini-batches of one."""

    chain: TanhChain
    path: Any

    def inputs(self, sample: int) -> Tensor:
        return torch.tensor(self.chain.x[self.path[sample]])[None]

    def targets(self, sample: int) -> Tensor:
        return torch.tensor(self.chain.y[self.path[sample]])[None]


class Tanh(nn.Module):
    def __init__(self, weights: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weights.reshape(WIDTH, WIDTH)))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.tanh(inputs @ self.weight.T)


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * ((outputs - targets) ** 2).sum()


def compare_with_numpy(schedule: Schedule, momentum: float) -> None:
    """Same weights after a run with samples left in flight, as the NumPy executor leaves them."""
    chain, ticks = TanhChain(schedule.num_stages), schedule.num_ticks(0) + 5
    path = np.random.default_rng(3).integers(0, 5, ticks * schedule.samples_per_iteration)
    gammas = np.random.default_rng(4).uniform(0.5 * RATE, 1.5 * RATE, ticks)
    expected = iterate(schedule, chain, path[None], gammas, momentum=momentum)  # type: ignore[arg-type]
    modules = [Tanh(chain.start[block]) for block in chain.blocks]
    optimizers: list[torch.optim.Optimizer] = []

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizers.append(torch.optim.SGD(parameters, lr=RATE, momentum=momentum))
        return optimizers[-1]

    class Scheduled(Stage):
        """Has the tick's learning rate in force, whenever an operation of the tick runs."""

        def forward(self, op: Op, *rest: Any) -> Tensor:
            optimizers[self.index].param_groups[0]["lr"] = gammas[op.iteration]
            return super().forward(op, *rest)

        def backward(self, op: Op, *rest: Any) -> Tensor | None:
            optimizers[self.index].param_groups[0]["lr"] = gammas[op.iteration]
            return super().backward(op, *rest)

        def update(self, op: Op) -> None:
            optimizers[self.index].param_groups[0]["lr"] = gammas[op.iteration]
            super().update(op)

    stages = [
        Scheduled(module, k, schedule, make, loss=half_square, head=nn.Identity())
        for k, module in enumerate(modules)
    ]
    run_serial(schedule, stages, Drawn(chain, path), ticks, drain=False)
    found = np.concatenate([module.weight.detach().numpy().ravel() for module in modules])
    assert not np.allclose(found, chain.start, atol=1e-2)
    np.testing.assert_allclose(found, expected.w[-1, 0], rtol=0, atol=1e-11)


REFUSED = ("petra", "ouroboros", "pd-asgd", "dp")
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "fdg": [{"shrink": 0.7}],
    "dgl": [{"buffer": 1}],
    "gpipe": [{"replay": True}],
    "pb": [{"spike": True}, {"predict": True}, {"spike": True, "predict": True}],
    "pipedream": [{"vertical_sync": True}],
    "pipemare": [{"anneal": 4.0}, {"decay": 0.4}, {"anneal": 4.0, "decay": 0.4}],
    "pipedream-2bw": [{"micro_batches": 5}],
    "xpipe": [{"micro_batches": 1}, {"micro_batches": 3}],
    "zb-h1": [{"micro_batches": 2}],
}


def catalogue() -> list[Any]:
    cases = []
    for name in METHODS:
        for options in [{}, *OPTIONS.get(name, [])] if name not in REFUSED else []:
            for stages in (2, 4) if name == "interleaved" else (1, 2, 3, 4):
                text = ",".join(f"{key}={value}" for key, value in options.items())
                case = method(name, stages, **options)
                cases.append(pytest.param(case, id=f"{name}-{stages}-{text}"))
    return cases


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("schedule", catalogue())
def test_every_method_equals_the_numpy_executor(schedule: Schedule, momentum: float) -> None:
    compare_with_numpy(schedule, momentum)


def toy_run(schedule: Schedule, iterations: int = 5, optimizer: Any = None) -> list[Stage]:
    make = optimizer or partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3)
    modules = toy_stages(schedule.num_stages)
    stages = [Stage(m, k, schedule, make, head=ToyHead()) for k, m in enumerate(modules)]
    with one_thread():
        run_serial(schedule, stages, Toy(), iterations)
    return stages


def state(stages: list[Stage]) -> list[Tensor]:
    return [tensor for stage in stages for tensor in stage.module.state_dict().values()]


def assert_same_bits(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right) > 0
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_two_halves_of_a_backward_pass_make_a_whole_one(num_stages: int) -> None:
    """Bit for bit: the same gradients, added in the same order (of samples)."""
    halves, whole = (toy_run(method(name, num_stages, micro_batches=3)) for name in PAIR)
    assert_same_bits(state(halves), state(whole))
    assert halves[-1].losses == whole[-1].losses


PAIR = ("zb-h1", "1f1b")


def test_micro_batches_give_the_gradient_of_their_mini_batch() -> None:
    """Without batch norm and dropout, to rounding: means of means are added in another order."""
    weights = []
    for cut in (1, 3):
        torch.manual_seed(1)
        module = nn.Sequential(nn.Flatten(), nn.Linear(72, 3)).double()
        schedule = method("gpipe", 1, micro_batches=cut)
        stage = Stage(module, 0, schedule, partial(torch.optim.SGD, lr=0.1, momentum=0.9))
        run_serial(schedule, [stage], Cut(6 // cut, cut), 4)
        weights.append(module[1].weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-13, atol=1e-13)


class Cut:
    """Mini-batches of six examples, cut into ``parts`` of ``size``."""

    def __init__(self, size: int, parts: int) -> None:
        self.size, self.parts = size, parts

    def _part(self, whole: Tensor, sample: int) -> Tensor:
        start = (sample % self.parts) * self.size
        return whole[start : start + self.size]

    def inputs(self, sample: int) -> Tensor:
        return self._part(Toy().inputs(sample // self.parts).double(), sample)

    def targets(self, sample: int) -> Tensor:
        return self._part(Toy().targets(sample // self.parts), sample)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_two_buffered_weights_equal_whole_model_autograd(num_stages: int) -> None:
    """w^{t+1} = step(w^t, ∇f(w^{t-1})), the mean over 4 micro-batches; bit for bit."""
    modules, m, iterations = toy_stages(num_stages), 4, 5
    make = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3)
    steps = [make(list(module.parameters())) for module in modules]
    with one_thread():
        before = snapshot(modules)
        for t in range(iterations):
            now, found = snapshot(modules), []
            for sample in range(m * t, m * (t + 1)):
                loss = whole_model_loss(modules, before, Toy(), sample, seed=0)
                flat = [tensor for stage in before for tensor in stage.values()]
                found.append(torch.autograd.grad(loss, flat))
            means = iter([sum(parts) / m for parts in zip(*found, strict=True)])
            for module, step in zip(modules, steps, strict=True):
                for parameter in module.parameters():
                    parameter.grad = next(means)
                step.step()
            before = now
    stages = toy_run(method("pipedream-2bw", num_stages, micro_batches=m), iterations)
    assert_same_bits(state(stages), [t for k in modules for t in k.state_dict().values()])


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_local_losses_equal_stages_trained_one_by_one(num_stages: int) -> None:
    """Plain PyTorch: every stage with its head is a network on what the one before it gives."""
    modules, iterations = toy_stages(num_stages), 5
    heads = [ToyHead() for _ in modules]
    steps = [
        torch.optim.SGD(
            [*module.parameters(), *(head.parameters() if module is not modules[-1] else ())],
            lr=0.1,
            momentum=0.9,
            weight_decay=1e-3,
        )
        for module, head in zip(modules, heads, strict=True)
    ]
    with one_thread():
        for sample in range(iterations):
            value, targets = Toy().inputs(sample), Toy().targets(sample)
            for k, module in enumerate(modules):
                with seeded(0, k, sample):
                    output = module(value)
                logits = output if module is modules[-1] else heads[k](output)
                steps[k].zero_grad()
                nn.functional.cross_entropy(logits, targets).backward()
                steps[k].step()
                value = output.detach()
    stages = toy_run(method("dgl", num_stages), iterations)
    assert_same_bits(state(stages), [t for m in modules for t in m.state_dict().values()])
    assert all(len(stage.losses) == iterations for stage in stages)


def test_predictions_follow_adam() -> None:
    """w - s γ v, v the direction that Adam's own formula gives, on one weight."""
    beta, gamma, s = (0.9, 0.999), 0.01, 2.0
    schedule = parse(
        "p stages=1 sync=none activations=graph jacobian=current samples=1 predict-forward=2\n"
        "worker 0: F0(t) B0(t) U0(t)"
    )
    module = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(module.weight, 1.0)
    make = partial(torch.optim.Adam, lr=gamma, betas=beta)
    stage = Stage(module, 0, schedule, make, loss=lambda out, _: 0.5 * (out**2).sum())

    class One:
        def inputs(self, sample: int) -> Tensor:
            return torch.full((1, 1), 1.0 + sample, dtype=torch.float64)

        targets = inputs

    run_serial(schedule, [stage], One(), 6)
    w, v, mean, square = 1.0, 0.0, 0.0, 0.0
    for t in range(6):
        read, x = w - s * gamma * v, 1.0 + t
        # The output comes from the predicted weight; a linear layer keeps nothing else of it.
        g = (read * x) * x
        mean, square = beta[0] * mean + (1 - beta[0]) * g, beta[1] * square + (1 - beta[1]) * g * g
        v = (mean / (1 - beta[0] ** (t + 1))) / ((square / (1 - beta[1] ** (t + 1))) ** 0.5 + 1e-8)
        w -= gamma * v
    assert module.weight.item() == pytest.approx(w, abs=1e-12)


def test_spike_compensation_counts_the_penalty_as_gradient() -> None:
    """v ← m v + g, w ← w − γ (a v + b g), with g = ∇f + λ w as SGD takes it."""
    m, gamma, decay, delay = 0.8, 0.1, 0.3, 2
    schedule = parse(
        f"p stages=1 sync=none activations=graph jacobian=current samples=1 spike={delay}\n"
        "worker 0: F0(t) B0(t) U0(t)"
    )
    module = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(module.weight, 1.0)
    make = partial(torch.optim.SGD, lr=gamma, momentum=m, weight_decay=decay)
    stage = Stage(module, 0, schedule, make, loss=lambda out, _: out.sum())

    class One:
        def inputs(self, sample: int) -> Tensor:
            return torch.full((1, 1), 1.0 + sample, dtype=torch.float64)

        targets = inputs

    run_serial(schedule, [stage], One(), 6)
    w, v, a = 1.0, 0.0, m**delay
    for t in range(6):
        g = (1.0 + t) + decay * w
        v = m * v + g
        w -= gamma * (a * v + (1 - a) / (1 - m) * g)
    assert module.weight.item() == pytest.approx(w, abs=1e-12)


def test_a_prediction_takes_the_learning_rate_in_force() -> None:
    """w - s γ v with v = 2 of an update at γ = 0.5, s = 2: first at γ = 0.1, then at 0.2."""
    module, rate = nn.Linear(1, 1, bias=False), [0.1]
    nn.init.zeros_(module.weight)
    rule = method("pb", 2, predict=True).rule
    store = VersionStore(module, rule, 0, stale=True, rate=lambda: rate[0])
    store.updating()
    store.updated(Motion(0.5, [torch.tensor([[0.5 * 2.0]])], None))
    assert store.forward(1)["weight"].item() == pytest.approx(-2 * 0.1 * 2.0)
    rate[0] = 0.2
    assert store.forward(1)["weight"].item() == pytest.approx(-2 * 0.2 * 2.0)


def test_a_rescaled_learning_rate_is_put_back() -> None:
    made: list[torch.optim.Optimizer] = []

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        made.append(torch.optim.SGD(parameters, lr=0.1))
        return made[-1]

    toy_run(method("pipemare", 3, anneal=100.0), optimizer=make)
    assert [optimizer.param_groups[0]["lr"] for optimizer in made] == [0.1] * 3


@pytest.mark.parametrize(
    "schedule",
    [
        *(method("pipedream-2bw", k) for k in (1, 2, 3)),
        *(method("pipedream", k, vertical_sync=True) for k in (2, 3)),
        *(method(name, 3) for name in ("zb-h1", "spectrain", "pb", "adl", "1f1b")),
    ],
    ids=lambda schedule: f"{schedule.method}-{schedule.num_stages}",
)
def test_held_samples_and_versions_equal_the_predicted_ones(schedule: Schedule) -> None:
    peaks = [(0, 0)] * schedule.num_stages

    class Watched(Stage):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            result = super().forward(*args, **kwargs)
            held = zip(peaks[self.index], self.held, strict=True)
            peaks[self.index] = tuple(map(max, held))  # type: ignore[call-overload]
            return result

    make = partial(torch.optim.SGD, lr=0.1)
    stages = [Watched(m, k, schedule, make) for k, m in enumerate(toy_stages(schedule.num_stages))]
    run_serial(schedule, stages, Toy(), 8)
    assert peaks == [(stage.activations, stage.weight_versions) for stage in memory(schedule)]
    assert all(stage.held[0] == 0 for stage in stages)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("activations=reconstruct jacobian=current samples=1", "activations=reconstruct"),
        ("activations=graph jacobian=stashed samples=1 tied=0,1", "does not know tied=0,1"),
        (
            "activations=graph jacobian=stashed samples=1 predict-forward=1,0",
            "does not know stashed weights that are predicted",
        ),
        ("activations=newest jacobian=stashed samples=1", "newest activations at stashed weights"),
        ("activations=graph jacobian=current samples=1 spike=1", "spike=1 must have 2 numbers"),
        ("activations=graph jacobian=stashed samples=1 gradient=local", "stage 0: .* needs a head"),
        ("activations=graph jacobian=current samples=1 spike=2,0", "spike=2 .* is Adam: take sgd"),
    ],
)
def test_what_is_not_run_is_refused(text: str, message: str) -> None:
    schedule = parse(
        f"x stages=2 sync=none {text}\nworker 0: F0(t) B0(t-1) U0(t-1)\nworker 1: F1(t) B1(t) U1(t)"
    )
    with pytest.raises(ScheduleError, match=message):
        Stage(toy_stages(2)[0], 0, schedule, torch.optim.Adam)


def test_an_error_that_does_not_fit_the_newest_activations_is_refused() -> None:
    class Shrinking(Toy):
        def inputs(self, sample: int) -> Tensor:
            return super().inputs(sample)[: 6 - sample]

        def targets(self, sample: int) -> Tensor:
            return super().targets(sample)[: 6 - sample]

    schedule = method("sideways", 2)
    make = partial(torch.optim.SGD, lr=0.1)
    stages = [Stage(m, k, schedule, make) for k, m in enumerate(toy_stages(2))]
    with pytest.raises(ScheduleError, match="4 examples, not 6: take a batch size that divides"):
        run_serial(schedule, stages, Shrinking(), 4)
