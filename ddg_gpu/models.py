"""Networks as flat sequences of layers: a stage may be cut between two layers and nowhere else.

Every network is a plain `nn.Sequential`. Its children are called layers; a residual block is one
layer, so that a shortcut never crosses a cut, and so is a convolution with its normalisation.
No layer changes its input in place: at a cut the input is a received or saved tensor that a later
backward or recomputation reads again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddg_gpu.reversible import revnet_layers
from ddg_gpu.transformer import TokenLogits, gpt_layers

_RESNETS = {"resnet8": 1, "resnet20": 3, "resnet56": 9, "resnet110": 18}  # blocks per width: n
_RESNET_WIDTHS = (16, 32, 64)
_MLP_HIDDEN_LAYERS = 7
_MLP_WIDTH = 256
_REVNETS = {"revnet16": 1, "revnet40": 3}  # blocks per width: n
_GPTS = {"gpt-tiny": False, "gpt-tiny-tied": True}  # whether input and output share weights
_GPT_SIZE = {"width": 64, "heads": 4, "blocks": 4}

IMAGE_MODELS = ("mlp", *_RESNETS, *_REVNETS)
TEXT_MODELS = tuple(_GPTS)
MODELS = (*IMAGE_MODELS, *TEXT_MODELS)
"""The names that `build` knows."""


def build(name: str, input_shape: tuple[int, ...], classes: int, seed: int = 0) -> nn.Sequential:
    """Return the network `name` with freshly drawn weights, as a flat sequence of layers.

    Args:
        name: one of `MODELS`. `resnetN` is the CIFAR family of He et al., "Deep residual learning
            for image recognition" (CVPR 2016, section 4.2): N = 6n + 2 weighted layers and 3n + 2
            children (stem, 3n basic blocks, head). `mlp` has 8 children, each with one `Linear`.
            `revnetN`: see `reversible.revnet_layers`. `gpt-tiny` is a language model of 4 blocks
            of width 64; in `gpt-tiny-tied`, output and embedding share their weights.
        input_shape: (channels, height, width) of one example, or (characters,).
        classes: number of logits of the last layer.
        seed: the weights are a function of it alone; the global generators are left as they were.

    Returns:
        On the CPU, in training mode, mapping N x C x H x W to N x classes, or tokens N x T to
        N x classes x T.

    Raises:
        ValueError: for an unknown name, for inputs of the other kind, or for sizes that are not
            positive.

    Example:
        >>> network = build("resnet8", (1, 8, 8), classes=10, seed=0)
        >>> len(network)
        5
        >>> network(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    if name not in MODELS:
        raise ValueError(f"name={name!r} is not a known model; known are {', '.join(MODELS)}")
    reads, data, dimensions = ("text", "text", 1) if name in _GPTS else ("images", "digits", 3)
    if len(input_shape) != dimensions:
        others = IMAGE_MODELS if name in _GPTS else TEXT_MODELS
        raise ValueError(
            f"name={name!r} reads {reads}, not input_shape={input_shape!r}: take data such as"
            f" {data!r}, or the model {' or '.join(others[:2])}"
        )
    if min(input_shape) < 1:
        raise ValueError(f"input_shape={input_shape!r} must be at least 1 everywhere")
    if classes < 1:
        raise ValueError(f"classes={classes!r} must be at least 1")
    # Seeded on the CPU generator itself: torch.manual_seed would reseed the CUDA generators too,
    # which fork_rng(devices=[]) does not restore.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if name in _GPTS:  # which has first weights of its own
            return nn.Sequential(
                *gpt_layers(input_shape[0], classes, tied=_GPTS[name], **_GPT_SIZE)
            )
        network = nn.Sequential(*_image_layers(name, input_shape, classes))
        network.apply(_initialise)
    return network


def _image_layers(name: str, input_shape: tuple[int, ...], classes: int) -> list[nn.Module]:
    if name == "mlp":
        return _mlp_layers(math.prod(input_shape), classes)
    if name in _REVNETS:
        return revnet_layers(_REVNETS[name], input_shape[0], classes, _RESNET_WIDTHS)
    return _resnet_layers(_RESNETS[name], input_shape[0], classes)


def head(shape: Sequence[int], classes: int, seed: int = 0) -> nn.Sequential:
    """Return an auxiliary head for a stage's local loss: a linear layer on a small image.

    Images are averaged to 2 x 2 pixels first; every token of a text is normalised.
    Decoupled greedy learning's own heads are a little larger (Belilovsky, Eickenberg, Oyallon 2020
    try several).

    Args:
        shape: of one example's activation: (channels, height, width), (characters, features), or
            (features,).
        classes: number of logits.
        seed: the weights are a function of it alone.

    Example:
        >>> head((16, 8, 8), classes=10)(torch.zeros(2, 16, 8, 8)).shape
        torch.Size([2, 10])
    """
    pool = [nn.AdaptiveAvgPool2d(2)] if len(shape) == 3 else []
    features = 4 * shape[0] if pool else math.prod(shape)
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if len(shape) == 2:
            return nn.Sequential(TokenLogits(shape[1], classes))
        layers = nn.Sequential(*pool, nn.Flatten(), nn.Linear(features, classes))
        layers.apply(_initialise)
    return layers


def _mlp_layers(features: int, classes: int) -> list[nn.Module]:
    first = nn.Sequential(nn.Flatten(), nn.Linear(features, _MLP_WIDTH), nn.ReLU())
    hidden = [
        nn.Sequential(nn.Linear(_MLP_WIDTH, _MLP_WIDTH), nn.ReLU())
        for _ in range(_MLP_HIDDEN_LAYERS - 1)
    ]
    return [first, *hidden, nn.Linear(_MLP_WIDTH, classes)]


def _resnet_layers(blocks_per_width: int, channels: int, classes: int) -> list[nn.Module]:
    width = _RESNET_WIDTHS[0]
    layers: list[nn.Module] = [
        nn.Sequential(_convolution(channels, width, stride=1), nn.BatchNorm2d(width), nn.ReLU())
    ]
    for next_width in _RESNET_WIDTHS:
        for _ in range(blocks_per_width):
            layers.append(_BasicBlock(width, next_width))
            width = next_width
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))
    return [*layers, head]


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; where the width grows, the image is halved.

    The shortcut is option A of He et al.: it has no parameters. Where the shape changes it takes
    every second pixel and appends channels of zeros.
    """

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.stride = 1 if width_in == width_out else 2
        self.new_channels = width_out - width_in
        self.conv1 = _convolution(width_in, width_out, self.stride)
        self.norm1 = nn.BatchNorm2d(width_out)
        self.conv2 = _convolution(width_out, width_out, stride=1)
        self.norm2 = nn.BatchNorm2d(width_out)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = functional.relu(self.norm1(self.conv1(inputs)))
        return functional.relu(self.norm2(self.conv2(hidden)) + self._shortcut(inputs))

    def _shortcut(self, inputs: Tensor) -> Tensor:
        if self.new_channels == 0:
            return inputs
        subsampled = inputs[:, :, :: self.stride, :: self.stride]
        return functional.pad(subsampled, (0, 0, 0, 0, 0, self.new_channels))


def _convolution(width_in: int, width_out: int, stride: int) -> nn.Conv2d:
    # No bias: the normalisation that follows would remove it.
    return nn.Conv2d(width_in, width_out, kernel_size=3, stride=stride, padding=1, bias=False)


def _initialise(module: nn.Module) -> None:
    """Draw weights as in He et al., "Delving deep into rectifiers" (ICCV 2015); biases are zero."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
