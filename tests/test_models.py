"""The networks: published sizes, seeding that stays private, and layers that a stage may end at."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ddg_gpu.models import IMAGE_MODELS, TEXT_MODELS, build, head
from ddg_gpu.reversible import Inverse, is_reversible

CIFAR = (3, 32, 32)


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# He et al. 2016, table 6, gives 0.27M, 0.85M and 1.7M. The exact counts below follow from the
# architecture: 3x3 convolutions without bias, two numbers per normalised channel, a 64x10 head,
# and shortcuts without parameters (projections, option B, would add to them).
@pytest.mark.parametrize(
    ("name", "count", "published"),
    [("resnet20", 269_722, 0.27e6), ("resnet56", 853_018, 0.85e6), ("resnet110", 1_727_962, 1.7e6)],
)
def test_resnets_have_the_published_number_of_parameters(
    name: str, count: int, published: float
) -> None:
    network = build(name, CIFAR, classes=10, seed=0)
    assert parameters(network) == count
    assert count == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize("blocks", [1, 3, 9, 18])
def test_a_resnet_has_6n_plus_2_weighted_layers_and_3n_plus_2_children(blocks: int) -> None:
    name = f"resnet{6 * blocks + 2}"
    network = build(name, CIFAR, classes=10, seed=0)
    weighted = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) == 6 * blocks + 2
    assert len(network) == 3 * blocks + 2


def test_mlp_has_eight_children_with_one_linear_each() -> None:
    network = build("mlp", (1, 8, 8), classes=10, seed=0)
    linears = [[m for m in child.modules() if isinstance(m, nn.Linear)] for child in network]
    assert [len(found) for found in linears] == [1] * 8
    assert [found[0].out_features for found in linears] == [256] * 7 + [10]
    assert isinstance(network[-1], nn.Linear)


@pytest.mark.parametrize("name", IMAGE_MODELS)
@pytest.mark.parametrize("shape", [(1, 8, 8), CIFAR])
def test_every_model_trains_on_digits_and_on_cifar_shapes(
    name: str, shape: tuple[int, int, int]
) -> None:
    network = build(name, shape, classes=7, seed=0)
    logits = network(torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_widths_double_where_the_image_is_halved() -> None:
    network = build("resnet20", CIFAR, classes=10, seed=0)
    activations, shapes = torch.zeros(1, *CIFAR), []
    for layer in network:
        activations = layer(activations.expand(2, -1, -1, -1))
        shapes.append(tuple(activations.shape[1:]))
    assert shapes == [(16, 32, 32)] * 4 + [(32, 16, 16)] * 3 + [(64, 8, 8)] * 3 + [(10,)]


def test_the_shortcut_takes_every_second_pixel_and_appends_zero_channels() -> None:
    block = build("resnet8", CIFAR, classes=10, seed=0)[2]
    # With the second normalisation scaled to nothing, only the shortcut is left.
    nn.init.zeros_(block.get_parameter("norm2.weight"))
    inputs = torch.rand(2, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    outputs = block(inputs)
    assert torch.equal(outputs[:, :16], inputs[:, :, ::2, ::2])
    assert outputs.shape == (2, 32, 16, 16)
    assert not outputs[:, 16:].any()


@pytest.mark.parametrize("name", [*IMAGE_MODELS, *TEXT_MODELS])
@pytest.mark.parametrize("requires_grad", [False, True])  # autograd guards only the second case
def test_no_layer_changes_its_input(name: str, requires_grad: bool) -> None:
    example = (8,) if name in TEXT_MODELS else (1, 8, 8)
    network = build(name, example, classes=10, seed=0)
    generator = torch.Generator().manual_seed(1)
    shape = torch.Size((4, *example))
    for index, layer in enumerate(network):
        if index == 0 and name in TEXT_MODELS:
            inputs = torch.randint(10, shape, generator=generator)
        else:
            inputs = torch.randn(shape, generator=generator).requires_grad_(requires_grad)
        before = inputs.detach().clone()
        outputs = layer(inputs)
        outputs.sum().backward()
        assert torch.equal(inputs, before)
        shape = outputs.shape


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_a_character_sees_no_later_one(name: str) -> None:
    network = build(name, (8,), classes=10, seed=0).double()
    tokens = torch.randint(10, (3, 8), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[:, 5] = (tokens[:, 5] + 1) % 10
    differs = (network(tokens) - network(changed)).abs().amax(dim=(0, 1)) > 1e-9
    assert differs.tolist() == [False] * 5 + [True] * 3


def test_tied_layers_are_one_parameter_and_start_as_the_untied_do() -> None:
    tied, untied = (build(name, (8,), classes=10, seed=0) for name in TEXT_MODELS[::-1])
    assert parameters(untied) - parameters(tied) == 10 * 64
    own = tied.state_dict()
    assert torch.equal(own["0.tokens.weight"], own["5.output.weight"])
    assert torch.equal(own["0.tokens.weight"], untied.state_dict()["0.tokens.weight"])


def test_a_head_of_a_text_gives_logits_for_every_character() -> None:
    assert head((8, 6), classes=5)(torch.zeros(2, 8, 6)).shape == (2, 5, 8)


def test_couplings_of_a_revnet_are_undone_and_nothing_else_can_be() -> None:
    network = build("revnet16", CIFAR, classes=10, seed=0).double()
    assert [is_reversible(layer) for layer in network] == [False, True] * 3 + [False]
    activation = torch.randn(
        4, *CIFAR, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    for layer in network:
        outputs = layer(activation)
        if is_reversible(layer):
            assert not torch.allclose(outputs, activation, atol=0.1)
            torch.testing.assert_close(Inverse(layer)(outputs), activation, rtol=0, atol=1e-12)
        activation = outputs


@pytest.mark.parametrize(("name", "blocks"), [("revnet16", 1), ("revnet40", 3)])
def test_a_revnet_has_12n_plus_4_weighted_layers(name: str, blocks: int) -> None:
    network = build(name, CIFAR, classes=10, seed=0)
    weighted = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) == 12 * blocks + 4 == int(name.removeprefix("revnet"))


def test_weights_are_a_function_of_the_seed_alone() -> None:
    first = build("resnet8", CIFAR, classes=10, seed=3).state_dict()
    torch.rand(5)
    again = build("resnet8", CIFAR, classes=10, seed=3).state_dict()
    other = build("resnet8", CIFAR, classes=10, seed=4).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["0.0.weight"], other["0.0.weight"])


def test_building_leaves_the_global_generator_as_it_was() -> None:
    before = torch.random.get_rng_state()
    build("mlp", (1, 8, 8), classes=10, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_convolutions_are_drawn_with_the_variance_that_relu_keeps() -> None:
    network = build("resnet20", CIFAR, classes=10, seed=0)
    weight = network[-2].get_parameter("conv2.weight")
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("resnet18", CIFAR, 10), r"name='resnet18' .*known are mlp, resnet8, .*resnet110"),
        (("mlp", (3, 0, 32), 10), r"input_shape=\(3, 0, 32\)"),
        (("mlp", CIFAR, 0), r"classes=0 must be at least 1"),
        (("mlp", (8,), 10), r"'mlp' reads images, not .*=\(8,\): .*'digits', or .* gpt-tiny or"),
        (("gpt-tiny", CIFAR, 10), r"'gpt-tiny' reads text, not .*'text', or the model mlp or"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[str, tuple[int, ...], int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        build(*arguments, seed=0)
