"""How long the layers of a model take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ddg_gpu.boundaries import boundaries
from ddg_gpu.dryrun import tensors_of, undisturbed
from ddg_gpu.value import Value

#: Forward and backward passes of each layer that are timed, after some that are not.
TIMED, WARM_UP = 7, 2


def seconds(layers: Sequence[nn.Module], example: Value) -> list[float]:
    """Median seconds of forward plus backward pass of every layer in training, on one thread.

    Args:
        layers: modules, each taking what the one before returns; they are left as they are.
        example: the first one's input, a mini-batch.

    Raises:
        SplitError: as `boundaries`.

    >>> first, second = seconds([nn.Linear(9, 9), nn.Linear(9, 9)], torch.zeros(2, 9))
    >>> 0 < first < 1
    True
    """
    boundaries(layers, example)  # says what is wrong before anything is timed
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with undisturbed(*layers, training=True):
            found = []
            for index, layer in enumerate(layers):
                times = []
                for _ in range(WARM_UP + TIMED):
                    inputs = _detached(example, wanting_errors=index > 0)
                    start = _now(inputs)
                    outputs = layer(inputs)
                    _differentiate(layer, inputs, outputs)
                    times.append(_now(inputs) - start)
                found.append(median(times[WARM_UP:]))
                example = outputs
            return found
    finally:
        torch.set_num_threads(threads)


def _detached(value: Value, wanting_errors: bool) -> Value:
    parts = [part.detach().clone() for part in tensors_of(value) or ()]
    for part in parts:
        part.requires_grad_(wanting_errors and part.is_floating_point())
    return parts[0] if isinstance(value, Tensor) else tuple(parts)


def _differentiate(layer: nn.Module, inputs: Value, outputs: object) -> None:
    """A backward pass that leaves no gradients behind."""
    roots = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
    leaves = [t for t in (*layer.parameters(), *(tensors_of(inputs) or ())) if t.requires_grad]
    torch.autograd.grad(roots, leaves, [torch.ones_like(t) for t in roots], allow_unused=True)


def _now(value: Value) -> float:
    """Seconds on a clock, once the device of a value has finished."""
    device = (tensors_of(value) or ())[0].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
