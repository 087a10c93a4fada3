"""Layers of a small language model, as in GPT-2 (Radford et al. 2019): pre-norm, causal.

Tokens go in as N x T, activations are N x T x width, and logits come out as N x classes x T: their
classes are where `cross_entropy` and an accuracy look for those of images too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

_STD = 0.02  # of GPT-2's first weights


def gpt_layers(
    length: int, classes: int, *, width: int, heads: int, blocks: int, tied: bool
) -> list[nn.Module]:
    """Return the layers of a language model: embedding, blocks, and normalisation with output.

    Args:
        length: most tokens T of an example; every position has an embedding.
        classes: number of different tokens.
        width: of the activations; a multiple of ``heads``.
        heads: of every block's attention.
        blocks: number of blocks, each one layer.
        tied: whether the output's weight is the embedding's: one parameter in both layers.

    >>> layers = gpt_layers(8, 5, width=4, heads=2, blocks=1, tied=True)
    >>> nn.Sequential(*layers)(torch.zeros(2, 8, dtype=torch.int64)).shape
    torch.Size([2, 5, 8])
    >>> layers[0].get_parameter("tokens.weight") is layers[2].get_parameter("output.weight")
    True
    """
    first, last = _Embedding(length, classes, width), TokenLogits(width, classes)
    middle = [_Block(width, heads) for _ in range(blocks)]
    layers: list[nn.Module] = [first, *middle, last]
    for layer in layers:
        layer.apply(_initialise)
    with torch.no_grad():
        for block in middle:  # whose 2 x blocks branches add up
            block.project.weight.div_(math.sqrt(2 * blocks))
            block.contract.weight.div_(math.sqrt(2 * blocks))
    if tied:
        last.output.weight = first.tokens.weight
    return layers


class _Embedding(nn.Module):
    """Vectors of the tokens and of their positions, added."""

    def __init__(self, length: int, classes: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(classes, width)
        self.positions = nn.Parameter(_STD * torch.randn(length, width))

    def forward(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.tokens(tokens)
        return embedded + self.positions[: tokens.shape[1]]


class _Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); a position sees itself and those before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs + self._attention(self.norm1(inputs))
        inner = functional.gelu(self.expand(self.norm2(hidden)), approximate="tanh")
        outputs: Tensor = hidden + self.contract(inner)
        return outputs

    def _attention(self, inputs: Tensor) -> Tensor:
        split = self.queries_keys_values(inputs).unflatten(2, (3, self.heads, -1))
        queries, keys, values = split.permute(2, 0, 3, 1, 4)  # each N x heads x T x width/heads
        mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        result: Tensor = self.project(mixed.transpose(1, 2).flatten(2))
        return result


class TokenLogits(nn.Module):
    """Normalisation and a linear layer, for every token: N x T x width to N x classes x T."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, classes, bias=False)
        _initialise(self.output)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.output(self.norm(inputs))
        return logits.transpose(1, 2)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=_STD)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
