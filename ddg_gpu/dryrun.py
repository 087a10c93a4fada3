"""Running a model before training starts, without leaving a trace of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ddg_gpu.value import Value

SIZES = (2, 3)
"""Batch sizes of dry runs: what differs between them scales with the batch. Batch normalisation
cannot be trained on one example."""


class SplitError(ValueError):
    """A model that cannot be cut as asked; one line that names the layer and what to do."""


@contextmanager
def undisturbed(*modules: nn.Module, training: bool) -> Iterator[None]:
    """Inside, modules are in one mode; afterwards mode, buffers and generators are as before.

    Args:
        modules: what will be run.
        training: training or evaluation mode.

    >>> norm = nn.BatchNorm1d(2)
    >>> with undisturbed(norm, training=True):
    ...     _ = norm(torch.rand(3, 2))
    >>> norm.running_mean
    tensor([0., 0.])
    """
    owners = {id(part): part for module in modules for part in module.modules()}.values()
    modes = [(part, part.training) for part in owners]
    buffers = [
        (part, name, buffer, buffer.detach().clone())
        for part in owners
        for name, buffer in part.named_buffers(recurse=False)
    ]
    tensors = [t for part in owners for t in (*part.parameters(False), *part.buffers(False))]
    devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        for module in modules:
            module.train(training)
        try:
            yield
        finally:
            for part, mode in modes:
                part.training = mode
            with torch.no_grad():
                for part, name, buffer, before in buffers:
                    buffer.copy_(before)
                    setattr(part, name, buffer)  # a module may have put another in its place


def batch_of(example: Value, size: int) -> Value:
    """A batch of ``size`` examples that repeats the rows of another; shares no memory with it.

    Args:
        example: tensors of shape (B, ...), the same B.
        size: examples wanted.

    Raises:
        SplitError: if it is neither a tensor nor a flat tuple of tensors, or if their first
            dimensions are not one batch.

    >>> batch_of(torch.tensor([[1.0], [2.0]]), 3).flatten().tolist()
    [1.0, 2.0, 1.0]
    """
    parts = tensors_of(example)
    if parts is None:
        raise SplitError(
            f"example is {describe(example)}: give a tensor, or a flat tuple of tensors, as the"
            " model's one argument, or its arguments"
        )
    shapes = [tuple(part.shape) for part in parts]
    if not all(shape and shape[0] == (shapes[0] or (0,))[0] > 0 for shape in shapes):
        raise SplitError(
            f"example has shapes {shapes}: the first dimension of every tensor must be the batch,"
            " with at least one example"
        )
    rows = torch.arange(size) % len(parts[0])
    found = tuple(part.detach()[rows.to(part.device)] for part in parts)
    return found[0] if isinstance(example, Tensor) else found


def tensors_of(value: object) -> tuple[Tensor, ...] | None:
    """The tensors of a `Value`, or None if it is something else."""
    if isinstance(value, Tensor):
        return (value,)
    if type(value) is tuple and value and all(isinstance(part, Tensor) for part in value):
        return value
    return None


def describe(value: object) -> str:
    """What a value that should have been tensors is, in a few words.

    >>> describe((torch.zeros(1), {"mask": 1}))
    'tuple(Tensor, dict)'
    """
    if type(value) in (tuple, list):
        inner = ", ".join(describe(part) for part in value)  # type: ignore[attr-defined]
        return f"{type(value).__name__}({inner})"
    return type(value).__name__


def same_bits(first: Any, second: Any) -> bool:
    """Whether two structures of tensors agree in structure, shape and every bit (NaN is NaN).

    >>> same_bits({"a": torch.ones(1)}, {"a": torch.ones(1)})
    True
    """
    own, shape = pytree.tree_flatten(first)
    other, other_shape = pytree.tree_flatten(second)
    return shape == other_shape and all(
        torch.is_tensor(b)
        and a.shape == b.shape
        and a.dtype == b.dtype
        and torch.allclose(a, b, rtol=0, atol=0, equal_nan=a.is_floating_point())
        if torch.is_tensor(a)
        else a == b
        for a, b in zip(own, other, strict=True)
    )
