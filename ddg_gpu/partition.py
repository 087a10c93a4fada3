"""Cutting an `nn.Sequential` into stages."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# On a CPU core, producing one element of an element-wise layer (batch norm, ReLU, addition) takes
# about as long as this many floating-point operations of a convolution. It only ranks layers for
# the default cut, which must not depend on a clock; a measured cut comes from a profile.
FLOPS_PER_ELEMENT = 200


def split(
    model: nn.Sequential, cuts: Sequence[int], tied: Sequence[int] = ()
) -> list[nn.Sequential]:
    """Cut a model before the layers with these indices; the stages share its parameters.

    Args:
        model: a sequence of L layers.
        cuts: K-1 increasing indices in 1..L-1, the first layer of stages 1..K-1.
        tied: two stages that may share parameters.

    Raises:
        ValueError: naming ``cuts`` if they are not increasing and within the model, or separate
            layers that share a parameter.

    >>> [len(stage) for stage in split(nn.Sequential(*map(nn.ReLU, [False] * 5)), [2, 4])]
    [2, 2, 1]
    """
    bounds = [0, *cuts, len(model)]
    if any(left >= right for left, right in pairwise(bounds)):
        raise ValueError(
            f"cuts must be increasing layer indices in 1..{len(model) - 1}, got {list(cuts)}"
        )
    layers = list(model)
    stages = [nn.Sequential(*layers[left:right]) for left, right in pairwise(bounds)]
    home: dict[int, int] = {}
    for index, stage in enumerate(stages):
        for name, parameter in stage.named_parameters():
            other = home.setdefault(id(parameter), index)
            if other != index and not {other, index} <= set(tied):
                raise ValueError(
                    f"cuts {list(cuts)} separate layers that share a parameter: {name!r} of stage"
                    f" {index} is also in stage {other}: only ouroboros' first and last may"
                )
    return stages


def balanced_cuts(costs: Sequence[float], num_stages: int) -> list[int]:
    """Cuts of contiguous layers into K stages that minimise the largest stage's cost.

    Exact, by dynamic programming; of equally good cuts, the one with the earliest cuts.

    Args:
        costs: cost of each of L layers, in any unit.
        num_stages: K in 1..L.

    Raises:
        ValueError: if there are more stages than layers, or fewer than one.

    >>> balanced_cuts([1, 1, 1, 3, 3], 3)
    [3, 4]
    """
    layers = len(costs)
    if not 1 <= num_stages <= layers:
        raise ValueError(
            f"stages must be between 1 and the model's {layers} layers, got {num_stages}"
        )
    total = [0.0, *accumulate(costs)]
    # best[l] = (largest stage cost, cuts) of the first l layers in as many stages as looked at.
    best: list[tuple[float, list[int]] | None] = [(cost, []) for cost in total]
    best[0] = None
    for _ in range(num_stages - 1):
        best = [
            min(
                (
                    (max(before[0], total[last] - total[cut]), [*before[1], cut])
                    for cut in range(1, last)
                    if (before := best[cut]) is not None
                ),
                default=None,
            )
            for last in range(layers + 1)
        ]
    found = best[layers]
    assert found is not None
    return found[1]


def layer_costs(model: nn.Sequential, example: Tensor) -> list[float]:
    """Estimated forward cost of every layer, in floating-point operations; reads no clock.

    Args:
        model: a sequence of layers; it is run in evaluation mode, its state does not change.
        example: a mini-batch of inputs, shape (B, ...).

    >>> layer_costs(nn.Sequential(nn.Linear(3, 2)), torch.zeros(1, 3))
    [412.0]
    """
    elements = 0

    def count(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        nonlocal elements
        elements += output.numel()

    leaves = [module for module in model.modules() if not list(module.children())]
    hooks = [leaf.register_forward_hook(count) for leaf in leaves]
    was_training = model.training
    model.eval()
    costs = []
    try:
        with torch.no_grad():
            for layer in model:
                elements = 0
                with FlopCounterMode(display=False) as counter:
                    example = layer(example)
                costs.append(float(counter.get_total_flops() + FLOPS_PER_ELEMENT * elements))
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    return costs
