"""Work per layer of the convolutional networks whose training times were published.

Counted by hand from the published code of each network, so that a stage's share of the time can be
predicted instead of measured. A multiply-add is two operations; activations are 4-byte floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

FLOAT = 4  # bytes


@dataclass(frozen=True, slots=True)
class Work:
    """A layer's forward pass on one sample.

    Args:
        name: for messages.
        flops: floating-point operations.
        traffic: bytes of activations read and written; weights are reused by the whole batch.
        output: bytes of the result, which cross to the next stage if the network is cut here.
    """

    name: str
    flops: float
    traffic: float
    output: float


def stage_shares(
    layers: Sequence[Work], cuts: Sequence[int], flops_per_byte: float = 0.0
) -> tuple[float, ...]:
    """Fraction of the network's time that each stage takes.

    A layer takes flops / peak + traffic / bandwidth seconds; only the quotient of the device's two
    rates matters for the fractions.

    Args:
        layers: in the order in which they run.
        cuts: index of the first layer of every stage but the first, ascending.
        flops_per_byte: the device's peak divided by its memory bandwidth; 0, an infinite
            bandwidth, counts operations alone.

    Raises:
        ValueError: for cuts that are not ascending or leave a stage empty.

    >>> two = [Work("a", 10, 100, 8), Work("b", 30, 100, 8)]
    >>> stage_shares(two, [1])
    (0.25, 0.75)
    >>> stage_shares(two, [1], flops_per_byte=0.2)
    (0.375, 0.625)
    """
    bounds = [0, *cuts, len(layers)]
    if any(first >= after for first, after in pairwise(bounds)):
        raise ValueError(f"cuts {list(cuts)} leave an empty stage: ascend from 1 to {bounds[-1]}")
    seconds = [layer.flops + layer.traffic * flops_per_byte for layer in layers]
    total = sum(seconds)
    return tuple(sum(seconds[first:after]) / total for first, after in pairwise(bounds))


def cut_bytes(layers: Sequence[Work], cuts: Sequence[int]) -> tuple[float, ...]:
    """Bytes per sample that cross each cut, in one direction.

    >>> cut_bytes([Work("a", 1, 1, 8), Work("b", 1, 1, 4)], [1])
    (8,)
    """
    return tuple(layers[cut - 1].output for cut in cuts)


def _conv(name: str, kernel: int, channels: tuple[int, int], size: int, stride: int = 1) -> Work:
    """A convolution with padding, from ``size`` x ``size`` pixels."""
    inner, outer = channels
    pixels = (size // stride) ** 2
    output = FLOAT * outer * pixels
    return Work(
        name, 2 * kernel**2 * inner * outer * pixels, FLOAT * inner * size**2 + output, output
    )


def _elementwise(name: str, channels: int, size: int, passes: int) -> Work:
    """Passes over a tensor: batch normalisation reads it twice and writes it, ReLU 1 + 1."""
    output = FLOAT * channels * size**2
    return Work(name, 0, passes * output, output)


def _norm(channels: int, size: int) -> Work:
    return _elementwise("norm", channels, size, 3)


def _relu(channels: int, size: int) -> Work:
    return _elementwise("relu", channels, size, 2)


def _add(channels: int, size: int) -> Work:
    return _elementwise("add", channels, size, 3)


def _block(name: str, parts: Sequence[Work], output: float) -> Work:
    return Work(name, sum(p.flops for p in parts), sum(p.traffic for p in parts), output)


def cifar_resnet(blocks: int) -> tuple[Work, ...]:
    """ResNet with 6n+2 layers for CIFAR (He et al. 2016), n = ``blocks`` per group.

    Its layers are those that the released DDG code and FDG's code cut between: convolution, norm,
    ReLU, 3n basic blocks, and the classifier. Shortcuts subsample and pad, which costs next to
    nothing.

    >>> round(sum(layer.flops for layer in cifar_resnet(18)) / 2e6)  # ResNet-110, 253 M in the code
    253
    """
    layers = [_conv("conv", 3, (3, 16), 32), _norm(16, 32), _relu(16, 32)]
    inner, size = 16, 32
    for outer in (16, 32, 64):
        for _ in range(blocks):
            stride = outer // inner
            first = _conv("conv", 3, (inner, outer), size, stride)
            size //= stride
            second = _conv("conv", 3, (outer, outer), size)
            rest = [_norm(outer, size), _relu(outer, size)] * 2 + [_add(outer, size)]
            layers.append(_block(f"block{outer}", [first, second, *rest], second.output))
            inner = outer
    layers.append(Work("head", 2 * 64 * 10, FLOAT * 64 * 64, FLOAT * 10))
    return tuple(layers)


def wide_resnet(blocks: int = 4, widen: int = 10) -> tuple[Work, ...]:
    """Wide ResNet with 6n+4 layers for CIFAR as in FDG's code, whose blocks stride in the second
    convolution; ``wide_resnet()`` is WRN-28-10.

    Its layers are a convolution, 3n blocks and the classifier.

    >>> round(sum(layer.flops for layer in wide_resnet()) / 2e9, 2)  # 5.2 with stride in the first
    5.95
    """
    layers = [_conv("conv", 3, (3, 16), 32)]
    inner, size = 16, 32
    for group, outer in enumerate((16 * widen, 32 * widen, 64 * widen)):
        for number in range(blocks):
            stride = 2 if group and not number else 1
            parts = [_norm(inner, size), _relu(inner, size)]
            parts += [_conv("conv", 3, (inner, outer), size), _norm(outer, size)]
            parts += [_relu(outer, size), _conv("conv", 3, (outer, outer), size, stride)]
            if inner != outer:
                parts.append(_conv("shortcut", 1, (inner, outer), size, stride))
            size //= stride
            parts.append(_add(outer, size))
            layers.append(_block(f"block{outer}", parts, FLOAT * outer * size**2))
            inner = outer
    head = [_norm(inner, size), _relu(inner, size), Work("linear", 20 * inner, 0, 0)]
    layers.append(_block("head", head, FLOAT * 10))
    return tuple(layers)


def resnet101() -> tuple[Work, ...]:
    """ResNet-101 on 224 x 224 pixels as torchgpipe's benchmark lays it out: 370 layers in sequence.

    4 layers of stem, 33 bottlenecks of 11 (identity, three convolutions with norm and ReLU, the
    addition before the last ReLU, which holds the shortcut's convolution), pooling, flattening and
    the classifier.

    >>> len(resnet101()), round(sum(layer.flops for layer in resnet101()) / 2e9, 1)
    (370, 7.8)
    """
    pooled = Work("pool", 0, FLOAT * 64 * (112**2 + 56**2), FLOAT * 64 * 56**2)
    layers = [_conv("conv", 7, (3, 64), 224, 2), _norm(64, 112), _relu(64, 112), pooled]
    inner, size = 64, 56
    for group, (count, planes) in enumerate(zip((3, 4, 23, 3), (64, 128, 256, 512), strict=True)):
        for number in range(count):
            stride = 2 if group and not number else 1
            outer = 4 * planes
            layers.append(Work("identity", 0, 0, FLOAT * inner * size**2))
            layers += [_conv("conv1", 1, (inner, planes), size)]
            layers += [_norm(planes, size), _relu(planes, size)]
            layers.append(_conv("conv2", 3, (planes, planes), size, stride))
            before, size = size, size // stride
            layers += [_norm(planes, size), _relu(planes, size)]
            layers += [_conv("conv3", 1, (planes, outer), size), _norm(outer, size)]
            residual = [_add(outer, size)]
            if not number:
                residual += [_conv("shortcut", 1, (inner, outer), before, stride)]
                residual.append(_norm(outer, size))
            layers.append(_block("residual", residual, FLOAT * outer * size**2))
            layers.append(_relu(outer, size))
            inner = outer
    layers.append(Work("pool", 0, FLOAT * inner * size**2, FLOAT * inner))
    layers.append(Work("flatten", 0, 0, FLOAT * inner))
    layers.append(Work("linear", 2 * inner * 1000, FLOAT * (inner + 1000), FLOAT * 1000))
    return tuple(layers)
