"""What passes between two stages: a tensor, or a flat tuple of tensors.

As in `nn.Sequential`, a module takes one argument: a tuple is passed to it as one tuple.

Gradients flow through the floating-point members only. Others (token ids, masks) may pass from
stage to stage too, without an error. So the error of a value has one tensor per floating-point
member, in their order: a tensor for a tensor, a tuple for a tuple.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Value = Tensor | tuple[Tensor, ...]


def checked(value: Any, what: str) -> Value:
    """The value, if it is one.

    Args:
        value: what a module returned, or the data.
        what: names it in the error.

    Raises:
        ValueError: saying what it is instead.

    >>> checked([torch.zeros(1)], "stage 1: the activation")
    Traceback (most recent call last):
    ...
    ValueError: stage 1: the activation must be a tensor or a flat tuple of tensors, not a list
    """
    if isinstance(value, Tensor):
        return value
    is_tuple = isinstance(value, tuple)
    strange = [member for member in value if not isinstance(member, Tensor)] if is_tuple else []
    if not is_tuple or not value or strange:
        found = f"a {type(value).__name__}"
        if strange:
            found += f" with a {type(strange[0]).__name__}"
        elif is_tuple:
            found = "an empty tuple"
        raise ValueError(f"{what} must be a tensor or a flat tuple of tensors, not {found}")
    return tuple(value)  # no named tuple, whose constructor takes other arguments


def members(value: Value | None) -> tuple[Tensor, ...]:
    """The tensors of a value; none of no value.

    >>> len(members(torch.zeros(2))), len(members((torch.zeros(2),) * 3))
    (1, 3)
    """
    if value is None:
        return ()
    return (value,) if isinstance(value, Tensor) else value


def like(tensors: tuple[Tensor, ...], value: Value) -> Value:
    """Tensors as a value of the other's form: a tensor, or a tuple.

    >>> like((torch.ones(1),), torch.zeros(1))
    tensor([1.])
    """
    return tensors[0] if isinstance(value, Tensor) else tensors


def detached(value: Value) -> Value:
    """The value without its graph."""
    return like(tuple(tensor.detach() for tensor in members(value)), value)


def floating(value: Value) -> tuple[Tensor, ...]:
    """The members through which gradients flow.

    >>> len(floating((torch.zeros(1), torch.tensor([3]))))
    1
    """
    return tuple(tensor for tensor in members(value) if torch.is_floating_point(tensor))
