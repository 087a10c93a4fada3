"""What crosses between stages, and what is refused before training starts, in one line."""

from __future__ import annotations

import copy

import pytest
import torch
from cut_models import Encoder, Gpt, Pairs, ResNet, Unet
from torch import Tensor, nn

from ddg_gpu.boundaries import TensorSpec, boundaries
from ddg_gpu.dryrun import SplitError, same_bits
from ddg_gpu.partition import cut_names, layer_names, split

INPUTS = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))


class Call(nn.Module):
    """A layer that calls a function, and can be trained."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.function(x)


def linear():
    return nn.Linear(4, 4)


# --- The dry run --------------------------------------------------------------------------------


def test_shapes_types_and_errors_of_tuples():
    first = Call(lambda x: (x, x.argmax(1), x.double().unsqueeze(1)))
    second = Call(lambda parts: parts[0] + parts[2][:, 0])
    found = boundaries([first, second], INPUTS)
    shapes = (
        TensorSpec(torch.Size([4]), torch.float32),
        TensorSpec(torch.Size([]), torch.int64),
        TensorSpec(torch.Size([1, 4]), torch.float64),
    )
    assert found == [shapes]
    assert [spec.carries_error for spec in shapes] == [True, False, True]
    assert shapes[2].batched(7) == (7, 1, 4)


def test_the_batch_size_of_the_example_does_not_matter():
    stages = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten()]
    for size in (1, 2, 5):
        found = boundaries(stages, torch.randn(size, 1, 4, 4))
        assert [spec.shape for spec in found] == [(2, 2, 2), (2, 2, 2)]


def test_autocast_lowers_what_crosses():
    stages = [linear(), linear()]
    assert boundaries(stages, INPUTS)[0].dtype is torch.float32
    assert boundaries(stages, INPUTS, autocast=torch.bfloat16)[0].dtype is torch.bfloat16


class Counts(nn.Module):
    """Puts another buffer in the place of the one it had."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return x


def test_the_dry_run_leaves_no_trace():
    stages = [nn.Sequential(linear(), nn.BatchNorm1d(4), nn.Dropout()), Counts()]
    stages[0].eval()
    before = copy.deepcopy([stage.state_dict() for stage in stages])
    held = [buffer for stage in stages for buffer in stage.buffers()]
    inputs, random = INPUTS.clone(), torch.get_rng_state()
    boundaries(stages, inputs)
    assert same_bits([stage.state_dict() for stage in stages], before)
    assert all(a is b for a, b in zip(held, (b for s in stages for b in s.buffers()), strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(inputs, INPUTS)
    assert [stage.training for stage in stages] == [False, True]
    assert all(parameter.grad is None for stage in stages for parameter in stage.parameters())


# --- Refusals -----------------------------------------------------------------------------------


def refused(match, model, stages=2, by="parameters", example=INPUTS):
    with pytest.raises(SplitError, match=match) as error:
        split(model, stages, by, example)
    assert isinstance(error.value, ValueError)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.ReLU(inplace=True), r"layer '1' \(ReLU\)"),
        (nn.Dropout(0.5, inplace=True), r"layer '1' \(Dropout\)"),  # in training only
        (Call(lambda x: x.view(-1).mul_(2).view_as(x)), r"layer '1' \(Call\)"),
        (nn.Sequential(nn.Flatten(), nn.Hardtanh(inplace=True)), r"layer '1.1' \(Hardtanh\)"),
    ],
)
def test_changing_the_input_in_place(layer, name):
    model = nn.Sequential(linear(), layer, linear())
    refused(rf"^{name} of stage 1 changes the stage's input in place.*inplace=False", model, by=[1])
    split(model, 2, by=[2], example=INPUTS)  # within a stage it may


def test_changing_it_in_place_by_an_operation_of_a_traced_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = linear(), linear()

        def forward(self, x):
            x = self.a(x)
            return self.b(nn.functional.relu_(x.view(-1, 2)).view(-1, 4))

    refused(
        "an operation before layer 'b' of stage 1 changes the stage's input in place",
        Model(),
        by=["view"],
    )
    assert cut_names(Model(), 2, "parameters", INPUTS) == ["b"]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (lambda x: {"x": x}, "dict"),
        (lambda x: None, "NoneType"),
        (lambda x: (x, 3), r"tuple\(Tensor, int\)"),
        (lambda x: (x, (x, x)), r"tuple\(Tensor, tuple\(Tensor, Tensor\)\)"),
        (lambda x: [x], r"list\(Tensor\)"),
    ],
)
def test_what_is_no_tensor_does_not_cross(value, kind):
    model = nn.Sequential(linear(), Call(value), Call(lambda x: x), linear())
    refused(
        rf"^what stage 0 \('0' to '1'\) passes to stage 1 \('2' to '3'\) is {kind}: ", model, by=[2]
    )


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda x: x.mean(0), r"\(4,\) and \(4,\)"),
        (lambda x: x.t(), r"\(4, 2\) and \(4, 3\)"),
        (lambda x: x @ x.t(), r"\(2, 2\) and \(3, 3\)"),
        (lambda x: x.sum(), r"\(\) and \(\)"),
        (lambda x: (x, x[:1]), r"\(1, 4\) and \(1, 4\)"),
    ],
)
def test_the_batch_is_the_first_dimension_and_no_other(function, shapes):
    model = nn.Sequential(linear(), Call(function), Call(lambda x: x))
    refused(rf"has shapes {shapes} for 2 and 3 examples: only the first", model, by=[2])


def test_a_model_gives_one_row_per_example():
    model = nn.Sequential(linear(), Call(lambda x: x.square().mean()))
    refused(r"^the output of stage 1 \('1' to '1'\) has shape \(\) for 2", model)


def test_what_crosses_is_the_same_in_both_modes():
    class Grows(nn.Linear):
        def forward(self, x):
            x = super().forward(x)
            return torch.cat([x, x], 1) if self.training else x

    model = nn.Sequential(Grows(4, 4), Call(lambda x: x))
    refused("is TensorSpec.* in evaluation and TensorSpec.* in training", model, by=[1])


def test_tied_weights_stay_on_one_stage():
    shared = linear()
    model = nn.Sequential(shared, linear(), shared, linear())
    refused("^stages 0 and 1 would share '0.weight': cut so that", model, by=[2])
    assert cut_names(model, 2, "parameters") == ["3"]
    gpt, ids = Gpt(1, tied=True), torch.zeros(2, 6, dtype=torch.long)
    refused("^stages 0 and 1 would share 'tokens.weight'", gpt, by=["blocks.0.mlp"], example=ids)
    refused("num_stages=2 is too many for this Gpt.* shared weights", gpt, example=ids)


def test_a_stage_without_parameters():
    model = nn.Sequential(linear(), nn.ReLU(), nn.Tanh(), linear())
    refused(
        r"^stage 1 \(layers '1' to '2'\) has no parameters to train: give its layers to a neigh",
        model,
        stages=3,
        by=[1, 3],
    )
    model[3].requires_grad_(False)
    refused(r"^stage 1 \(layers '3' to '3'\) has no parameters to train", model, by=[3])


def test_more_stages_than_layers():
    refused(
        "num_stages=3 is too many for this Sequential.* 2 of its layers only",
        nn.Sequential(linear(), linear()),
        3,
    )
    refused("num_stages=2 is too many for this Linear", linear())


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = linear(), linear()

    def forward(self, x):
        x = self.a(x)
        return self.b(x) if x.sum() > 0 else x


def test_control_flow_on_values():
    refused("^Branches cannot be traced: its control flow depends on the values", Branches())
    inside = nn.Sequential(linear(), Branches(), linear())  # one layer, for a sequence

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = inside

        def forward(self, x):
            return self.parts(x) + 1

    assert layer_names(Outer(), INPUTS) == ["parts.0", "parts.1", "parts.2", "add"]
    split(Outer(), 3, "parameters", INPUTS)


def test_what_tracing_cannot_see_is_found_out():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.calls = linear(), linear(), 0

        def forward(self, x):
            self.calls += 1
            return self.b(self.a(x)) * self.calls

    refused("^the stages of this Noisy do not compute what it computes in", Noisy())


def test_modules_that_differ_between_modes_stay_whole():
    class Drops(nn.Module):
        def forward(self, x):
            return x * torch.rand(len(x), 1).round() if self.training else x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.drop, self.b = linear(), Drops(), linear()

        def forward(self, x):
            return self.b(self.drop(self.a(x)))

    assert layer_names(Model(), INPUTS) == ["a", "drop", "b"]
    split(Model(), 2, "parameters", INPUTS)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((0,), "num_stages must be at least 1, got 0"),
        ((2, "speed", INPUTS), "by='speed' is unknown: give 'time', 'parameters' or"),
        ((2, "time"), "by='time' needs an example"),
        ((3, [1]), r"by must name num_stages - 1 = 2 first layers of stages, got \[1\]"),
        ((2, [4]), r"cuts must be layer indices in 1..3 .* got \[4\]"),
        ((3, [2, 1]), r"cuts must be in increasing order, none the first layer, got \[2, 1\]"),
        ((2, ["0"]), r"cuts must be in increasing order, none the first layer, got \['0'\]"),
        ((2, ["7"]), "cut '7' is no layer of the Sequential: its layers are 0, 1, 2, 3"),
        ((2, [1], [INPUTS]), r"example is list\(Tensor\): give a tensor, or a flat tuple"),
        ((2, [1], (INPUTS, INPUTS[:2])), r"example has shapes \[\(4, 4\), \(2, 4\)\]"),
        ((2, [1], torch.zeros(0, 4)), r"example has shapes \[\(0, 4\)\]"),
    ],
)
def test_arguments_are_named(arguments, match):
    with pytest.raises(SplitError, match=match):
        split(nn.Sequential(*(linear() for _ in range(4))), *arguments)


def test_a_model_that_is_no_sequence_is_looked_into_with_an_example():
    image = torch.zeros(2, 3, 32, 32)
    with pytest.raises(SplitError, match="ResNet is no nn.Sequential: give an example"):
        split(ResNet(), 2, "parameters")
    refused(
        "cut 'layer9' is no layer of the ResNet: its layers are conv1, bn1",
        ResNet(),
        by=["layer9"],
        example=image,
    )
    refused(
        "cut 3 of a ResNet, which has no numbered layers: give names",
        ResNet(),
        by=[3],
        example=image,
    )


def test_where_no_stage_can_begin_the_reason_is_given():
    class Summary(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = linear(), linear(), linear()

        def forward(self, x):
            x = self.a(x)
            return self.c(self.b(x) + x.mean(0))

    model = Summary()
    refused(
        r"^cut 'add' of the Summary: 'mean' would cross, whose shapes for 2 and 3 examples, \(4,\)"
        r" and \(4,\), do not begin with the batch, so no stage can begin there; it can at",
        model,
        by=["add"],
    )
    split(model, 3, ["b", "c"], INPUTS)


@pytest.mark.parametrize("make", [ResNet, Unet, Pairs, Encoder])
def test_a_refused_model_is_as_it_was(make):
    model = make()
    before = copy.deepcopy(model.state_dict())
    attributes = set(vars(model))
    example = {
        ResNet: torch.zeros(2, 3, 32, 32),
        Unet: INPUTS,
        Pairs: (INPUTS, INPUTS),
        Encoder: torch.zeros(2, 6, dtype=torch.long),
    }[make]
    refused("is no layer of the", model, by=["nothing"], example=example)
    assert same_bits(model.state_dict(), before)
    assert set(vars(model)) == attributes
    assert all(module.training for module in model.modules())
