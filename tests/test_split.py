"""Stages of a model do what the model does: forward, backward, buffers, in both modes."""

from __future__ import annotations

import copy
import time
from itertools import pairwise

import pytest
import torch
from cut_models import Encoder, Gpt, Pairs, ResNet, Unet, Unseen
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ddg_gpu.boundaries import TensorSpec, boundaries
from ddg_gpu.dryrun import SplitError, same_bits
from ddg_gpu.partition import cut_names, layer_names, split
from ddg_gpu.weights import call

IDS = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(0))
RANDOM = torch.Generator().manual_seed(1)


def nested():
    first = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True))
    second = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Dropout(0.4), nn.Linear(8, 6)))
    return nn.Sequential(first, second, nn.BatchNorm1d(6), nn.Linear(6, 3))


MODELS = {
    "nested": (nested, torch.randn(4, 4, generator=RANDOM)),
    "resnet": (ResNet, torch.randn(4, 3, 32, 32, generator=RANDOM)),
    "encoder": (Encoder, IDS),
    "list of layers": (lambda: Encoder(container=False), IDS),
    "gpt": (Gpt, IDS),
    "unet": (Unet, torch.randn(4, 4, generator=RANDOM)),
    "pairs": (Pairs, tuple(torch.randn(2, 4, 4, generator=RANDOM))),
    "exported": (Unseen, torch.randn(4, 4, generator=RANDOM)),
}


def built(name):
    make, example = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return make(), example


def rows(value, size):
    """Another batch of the same kind."""
    return pytree.tree_map(lambda t: t[torch.arange(size) * 3 % len(t)].clone(), value)


def through(stages, value):
    for stage in stages:
        value = stage(value)
    return value


def whole(model, value):
    return model(*value) if isinstance(value, tuple) else model(value)


def trained(run, module, value):
    """Outputs of a training pass, and the gradients of all parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        output = run(value)
    leaves = [leaf for leaf in pytree.tree_leaves(output) if leaf.requires_grad]
    sum((leaf.square().sum() for leaf in leaves), torch.zeros(())).backward()
    return output, {name: p.grad for name, p in module.named_parameters()}


def assert_same(model, stages, value):
    """Against a copy of the model that was never cut."""
    reference = copy.deepcopy(model)
    for module in (reference, *stages):
        module.train()
    expected = trained(lambda v: whole(reference, v), reference, value)
    found = trained(lambda v: through(stages, v), model, value)
    assert same_bits(found, expected)
    assert same_bits(model.state_dict(), reference.state_dict())  # with running statistics
    for module in (reference, *stages):
        module.eval()
    with torch.no_grad():
        assert same_bits(through(stages, value), whole(reference, value))
    assert same_bits(model.state_dict(), reference.state_dict())


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_stages_compute_what_the_model_computes(name, stages):
    model, example = built(name)
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    parts = split(model, stages, "parameters", example)
    assert same_bits(model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert len(parts) == stages
    assert_same(model, parts, rows(example, 5))


@pytest.mark.parametrize("name", MODELS)
def test_names_and_tensors_are_the_models(name):
    model, example = built(name)
    own = model.state_dict(keep_vars=True)
    found = {}
    for part in split(model, 3, "parameters", example):
        state = part.state_dict(keep_vars=True)
        assert not found.keys() & state.keys()
        found |= state
    assert found.keys() == own.keys()
    assert all(found[name] is own[name] for name in own)


@pytest.mark.parametrize("name", ["resnet", "gpt", "unet", "pairs", "exported"])
def test_errors_come_back_over_boundaries(name):
    """Every stage differentiates alone, on what it received and on copies of its weights."""
    model, example = built(name)
    parts = split(model, 3, "parameters", example)
    reference = copy.deepcopy(model)
    _, expected = trained(lambda v: whole(reference, v), reference, example)
    found, passes, value = {}, [], example
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for part in parts:
            received = [t.detach() for t in pytree.tree_leaves(value)]
            if passes:
                received = [t.requires_grad_(t.is_floating_point()) for t in received]
            value = tuple(received) if isinstance(value, tuple) else received[0]
            weights = {n: p.detach().clone().requires_grad_() for n, p in part.named_parameters()}
            value = call(part, weights, value)
            passes.append((received, weights, pytree.tree_leaves(value)))
    errors: list[Tensor | None] = [2 * t for t in passes[-1][2]]
    for received, weights, sent in reversed(passes):
        known = [(t, e) for t, e in zip(sent, errors, strict=True) if t.requires_grad]
        wanted = [t for t in received if t.requires_grad]
        gradients = torch.autograd.grad(
            [t for t, _ in known], [*weights.values(), *wanted], [e for _, e in known]
        )
        found |= dict(zip(weights, gradients, strict=False))
        back = iter(gradients[len(weights) :])
        errors = [next(back) if t.requires_grad else None for t in received]
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, msg=parameter)


def test_dropout_is_drawn_in_training_and_not_in_evaluation():
    for name in ("gpt", "encoder", "exported", "nested"):
        model, example = built(name)
        parts = split(model, 2, "parameters", example)
        for part in parts:
            part.train()
        first, second = through(parts, example), through(parts, example)
        assert not torch.equal(first, second), name
        for part in parts:
            part.eval()
        state = copy.deepcopy(model.state_dict())
        assert torch.equal(through(parts, example), through(parts, example)), name
        assert same_bits(model.state_dict(), state)


def test_a_stage_starts_in_the_mode_of_the_model():
    for name in ("gpt", "nested"):
        model, example = built(name)
        model.eval()
        parts = split(model, 2, "parameters", example)
        assert not any(module.training for part in parts for module in part.modules()), name


def test_skips_are_passed_on_by_stages_that_do_not_use_them():
    model, example = built("unet")
    parts = split(model, 4, ["down2", "bottom2", "up1"], example)
    six = TensorSpec(torch.Size([6]), torch.float32)
    assert boundaries(parts, example) == [
        six,
        (six, six, six),
        TensorSpec(torch.Size([12]), torch.float32),
    ]
    assert_same(model, parts, example)


def test_few_tensors_cross():
    model, example = built("resnet")
    for cut in cut_names(model, 4, "parameters", example):
        assert isinstance(boundaries(split(model, 2, [cut], example), example)[0], TensorSpec)


@pytest.mark.parametrize(
    ("name", "cut", "first"),
    [
        ("resnet", "layer2", "layer2.0.conv1"),
        ("resnet", "layer1.1", "layer1.1.conv1"),
        ("gpt", "blocks.1", "blocks.1.norm1"),
        ("encoder", "encoder.layers.2", "encoder.layers.2"),
        ("nested", "1.1", "1.1.0"),
    ],
)
def test_cuts_are_named_by_module(name, cut, first):
    model, example = built(name)
    assert cut_names(model, 2, [cut], example) == [first]
    second = split(model, 2, [cut], example)[1]
    held = [n for n, _ in model.named_parameters() if n.startswith(cut)]
    assert {n for n, _ in second.named_parameters()} >= set(held) != set()


def test_every_layer_listed_can_begin_a_stage():
    model, example = built("unet")
    names = layer_names(model, example)
    assert [len(split(model, 2, [name], example)) for name in names[1:-1]] == [2] * (len(names) - 2)


def test_indices_are_those_of_the_sequence():
    layers = [nn.Linear(3, 3) for _ in range(5)]
    model = nn.Sequential(*layers)
    first, second, third = split(model, 3, by=[1, 3])
    assert [*first, *second, *third] == layers
    assert list(second.state_dict()) == ["1.weight", "1.bias", "2.weight", "2.bias"]


class Slow(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.004)
        return super().forward(x)


def test_by_time_the_slow_layer_is_alone_and_by_parameters_the_large_one():
    model = nn.Sequential(Slow(4, 4), nn.Linear(4, 4), nn.Linear(4, 400), nn.Linear(400, 4))
    example = torch.zeros(2, 4)
    assert cut_names(model, 2, "time", example) == ["1"]
    assert cut_names(model, 2, "parameters") == ["3"]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_trains_nothing_stays_with_a_neighbour():
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU(inplace=True)
    )
    assert cut_names(model, 2, "parameters", torch.zeros(2, 2, 2)) == ["3"]
    model[1].requires_grad_(False)
    with pytest.raises(SplitError, match=r"num_stages=2 is too many .* begin at 1 of its layers"):
        split(model, 2, "parameters")


# --- Any model ----------------------------------------------------------------------------------

WIDTH = 4


@st.composite
def sequences(draw, depth=2):
    kinds = st.sampled_from(
        ["linear", "norm", "relu", "dropout", "tanh"] + ["nested"] * (depth > 0)
    )
    made: list[nn.Module] = []
    for kind in draw(st.lists(kinds, min_size=1, max_size=4)):
        made.append(
            {
                "linear": lambda: nn.Linear(WIDTH, WIDTH),
                "norm": lambda: nn.BatchNorm1d(WIDTH),
                "relu": nn.ReLU,
                "dropout": lambda: nn.Dropout(0.5),
                "tanh": nn.Tanh,
                "nested": lambda: draw(sequences(depth - 1)),
            }[kind]()
        )
    return nn.Sequential(*made)


class Woven(nn.Module):
    """Layers each of which reads the sum of some earlier values."""

    def __init__(self, plan):
        super().__init__()
        self.plan = plan
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in plan)
        self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in plan)

    def forward(self, x):
        values = [x]
        for (sources, kind), layer, norm in zip(self.plan, self.layers, self.norms, strict=True):
            y = sum(values[source] for source in sources)
            y = layer(y)
            if kind == "norm":
                y = norm(y)
            elif kind == "dropout":
                y = nn.functional.dropout(y, 0.3, self.training)
            elif kind == "view":
                y = y.view(y.size(0), 2, -1).flatten(1)
            elif kind == "batch":
                y = y * x.shape[0]
            values.append(y.relu())
        return values[-1], values[-2]


@st.composite
def woven(draw):
    kinds = st.sampled_from(["plain", "norm", "dropout", "view", "batch"])
    plan = [
        (sorted(draw(st.sets(st.integers(0, index), min_size=1, max_size=3))), draw(kinds))
        for index in range(draw(st.integers(2, 5)))
    ]
    return Woven(plan)


@settings(max_examples=25, deadline=None)
@given(st.one_of(sequences(), woven()), st.data())
def test_whatever_the_model_and_the_cuts(model, data):
    example = torch.randn(3, WIDTH, generator=RANDOM)
    names = layer_names(model, example)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(names) - 1)), max_size=3)))
    cuts = [names[cut] for cut in cuts if cut < len(names)]
    try:
        parts = split(model, len(cuts) + 1, cuts, example)
    except SplitError as error:
        assert "has no parameters to train" in str(error)  # noqa: PT017
        bounds = [0, *map(names.index, cuts), len(names)]
        assert any(not trains(model, names[i:j]) for i, j in pairwise(bounds))
        return
    model.train()
    assert_same(model, parts, torch.randn(4, WIDTH, generator=RANDOM))


def trains(model, names):
    modules = dict(model.named_modules())
    return any(list(modules[name].parameters()) for name in names if name in modules)
