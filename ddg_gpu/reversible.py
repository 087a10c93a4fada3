"""Layers whose input follows from their output, and the layers of a network made of them.

An activation is one tensor: its two streams are the halves of its channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn


class Coupling(nn.Module):
    """y1 = x1 + F(x2), y2 = x2 + G(y1), as in Gomez et al., "The reversible residual network".

    (NeurIPS 2017.) F and G are any functions; x2 = y2 - G(y1), then x1 = y1 - F(x2).

    >>> layer = Coupling(nn.Linear(1, 1), nn.Linear(1, 1))
    >>> inputs = torch.tensor([[1.0, 2.0]])
    >>> torch.allclose(layer.inverse(layer(inputs)), inputs)
    True
    """

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, inputs: Tensor) -> Tensor:
        """The outputs, N x C x ..., with C even."""
        x1, x2 = inputs.chunk(2, dim=1)
        y1 = x1 + self.first(x2)
        return torch.cat([y1, x2 + self.second(y1)], dim=1)

    def inverse(self, outputs: Tensor) -> Tensor:
        """The inputs, to rounding."""
        y1, y2 = outputs.chunk(2, dim=1)
        x2 = y2 - self.second(y1)
        return torch.cat([y1 - self.first(x2), x2], dim=1)


def is_reversible(module: nn.Module) -> bool:
    """Whether a layer, or every layer of a sequence, has an inverse.

    The inverse must not draw random numbers, for it would draw other ones than the layer did.

    >>> layer = Coupling(nn.Identity(), nn.Identity())
    >>> is_reversible(nn.Sequential(layer, layer)), is_reversible(nn.Sequential(layer, nn.ReLU()))
    (True, False)
    """
    if isinstance(module, nn.Sequential):
        return all(map(is_reversible, module))
    return hasattr(module, "inverse")


class Inverse(nn.Module):
    """Maps the outputs of a reversible module to its inputs; it has the module's weights.

    >>> layer = Coupling(nn.Identity(), nn.Identity())
    >>> Inverse(nn.Sequential(layer))(torch.tensor([[3.0, 5.0]]))
    tensor([[1., 2.]])
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, outputs: Tensor) -> Tensor:
        """The inputs."""
        layers = self.body if isinstance(self.body, nn.Sequential) else [self.body]
        for layer in reversed(list(layers)):
            outputs = cast(Coupling, layer).inverse(outputs)
        return outputs


def revnet_layers(
    blocks_per_width: int, channels: int, classes: int, widths: Sequence[int]
) -> list[nn.Module]:
    """A stem, couplings, and where the width grows a convolution of stride 2; then a head.

    Only the couplings are reversible. F and G are residual functions of two convolutions each, in
    the order of He et al., "Identity mappings in deep residual networks" (ECCV 2016).

    Args:
        blocks_per_width: n; there are 12 n + 4 convolutions and linear layers.
        channels: of the images.
        classes: number of logits.
        widths: three widths of an activation: of both streams together.
    """
    layers: list[nn.Module] = []
    for width in widths:
        layers.append(_entry(channels, width, stride=2 if layers else 1))
        layers += [Coupling(*map(_residual, [width // 2] * 2)) for _ in range(blocks_per_width)]
        channels = width
    flat = (nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return [*layers, nn.Sequential(*flat, nn.Linear(channels, classes))]


def _entry(channels: int, width: int, stride: int) -> nn.Module:
    convolution = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())


def _residual(width: int) -> nn.Module:
    half = [
        (nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False))
        for _ in range(2)
    ]
    return nn.Sequential(*half[0], *half[1])
