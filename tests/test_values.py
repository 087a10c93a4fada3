"""Stages that pass tuples: token ids and masks beside activations, and shortcuts over a stage."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from oracles import Toy, delayed_training
from torch import Tensor, nn

from ddg_gpu.execute import run_serial
from ddg_gpu.stage import Stage
from ddg_gpu.train import one_thread
from ddg_sim.methods import METHODS, Semantics, ddg, method
from ddg_sim.schedule import Op, OpKind, Schedule

#: Not run by the backend, or not on three stages.
OTHERS = ("petra", "ouroboros", "pd-asgd", "dp", "interleaved")
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Tokens(Toy):
    """Pairs (token ids, positions that count), with labels."""

    def inputs(self, sample: int) -> Any:
        generator = torch.Generator().manual_seed(sample)
        ids = torch.randint(7, (self.size, 5), generator=generator)
        return ids, ids != 0


class Embed(nn.Module):
    """(ids, mask) -> (activation, mask, what skips the next stage)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        ids, mask = pair
        rows = self.table(ids)
        return torch.tanh(rows), mask, rows.sum(1)


class Mix(nn.Module):
    """The middle: passes mask and shortcut on as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, triple: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, mask, shortcut = triple
        return nn.functional.dropout(self.linear(hidden), 0.3), mask, shortcut


class Read(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, triple: tuple[Tensor, ...]) -> Tensor:
        hidden, mask, shortcut = triple
        result: Tensor = self.linear((hidden * mask[..., None]).mean(1) + shortcut)
        return result


class Pick(nn.Module):
    """A head for a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, triple: tuple[Tensor, ...]) -> Tensor:
        result: Tensor = self.linear(triple[0].mean(1))
        return result


def parts() -> list[nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return [Embed(), Mix(), Read()]


def trained(schedule: Schedule) -> list[Tensor]:
    modules = parts()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        stages = [Stage(m, k, schedule, SGD, head=Pick()) for k, m in enumerate(modules)]
    with one_thread():
        run_serial(schedule, stages, Tokens(), 7)
    return [tensor for module in modules for tensor in module.state_dict().values()]


def test_tuples_equal_whole_model_autograd_at_the_delayed_weights() -> None:
    modules = parts()
    with one_thread():
        delayed_training(modules, SGD, Tokens(), 7, [2, 1, 0])
    expected = [tensor for module in modules for tensor in module.state_dict().values()]
    assert all(map(torch.equal, trained(ddg(3)), expected))


@pytest.mark.parametrize(
    "schedule",
    [
        *(method(name, 3) for name in METHODS if name not in OTHERS),
        *(ddg(3, semantics=semantics) for semantics in Semantics),
    ],
    ids=lambda schedule: schedule.method,
)
def test_every_method_passes_tuples(schedule: Schedule) -> None:
    start = [t for module in parts() for t in module.state_dict().values()]
    assert not any(map(torch.equal, trained(schedule), start))


def test_two_halves_make_a_whole_one() -> None:
    halves, whole = (trained(method(name, 3, micro_batches=3)) for name in ("zb-h1", "1f1b"))
    assert all(map(torch.equal, halves, whole))


def op(kind: OpKind, stage: int) -> Op:
    return Op(kind, stage, iteration=0, sample=0, version=0)


def test_the_error_has_a_tensor_per_floating_point_member() -> None:
    stage = Stage(Read(), 2, ddg(3), SGD)
    hidden, mask, shortcut = (
        torch.randn(2, 5, 4),
        torch.ones(2, 5, dtype=torch.bool),
        torch.ones(2, 4),
    )
    stage.forward(op(OpKind.FORWARD, 2), (hidden, mask, shortcut), torch.tensor([0, 1]))
    error = stage.backward(op(OpKind.BACKWARD, 2))
    assert isinstance(error, tuple)
    assert [part.shape for part in error] == [hidden.shape, shortcut.shape]


def test_what_the_loss_does_not_depend_on_gets_an_error_of_zeros() -> None:
    class First(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
            return pair[0]

    class Constant(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return torch.zeros(2, 3)

    pair = (torch.randn(2, 3), torch.randn(4))
    stage = Stage(First(), 1, ddg(2), SGD)
    stage.forward(op(OpKind.FORWARD, 1), pair, torch.tensor([0, 1]))
    error = stage.backward(op(OpKind.BACKWARD, 1))
    assert isinstance(error, tuple)
    assert error[0].abs().sum() > 0
    assert torch.equal(error[1], torch.zeros(4))
    stage = Stage(Constant(), 1, ddg(2), SGD)
    stage.forward(op(OpKind.FORWARD, 1), pair[0], torch.tensor([0, 1]))
    alone = stage.backward(op(OpKind.BACKWARD, 1))
    assert isinstance(alone, Tensor)
    assert torch.equal(alone, torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"logits": 1}, "not a dict"),
        ((), "not an empty tuple"),
        ((torch.zeros(1), (torch.zeros(1),)), "not a tuple with a tuple"),
        (None, "not a NoneType"),
    ],
)
def test_other_activations_are_refused(output: Any, message: str) -> None:
    class Strange(nn.Module):
        def forward(self, inputs: Tensor) -> Any:
            return output

    stage = Stage(Strange(), 1, ddg(3), SGD)
    with pytest.raises(ValueError, match=f"stage 1: the activation must be .*, {message}"):
        stage.forward(op(OpKind.FORWARD, 1), torch.zeros(2, 3))


def test_a_cut_through_which_no_error_can_flow_is_refused() -> None:
    stage = Stage(nn.Embedding(7, 3), 1, ddg(2), SGD)
    with pytest.raises(ValueError, match="stage 0 gets no error: cut the network elsewhere"):
        stage.forward(op(OpKind.FORWARD, 1), torch.tensor([1, 2]), torch.tensor([0, 1]))
