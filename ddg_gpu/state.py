"""What a stage holds at an instant between two operations, as plain nested data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tree = Any
"""Dictionaries and lists of tensors, strings, numbers, booleans and None."""

_TENSOR, _ITEMS = "$tensor", "$items"


@dataclass(frozen=True, slots=True)
class StageState:
    """What a stage holds. The tensors are its own: they change when it goes on.

    Args:
        trained: what does not depend on the cut: ``{"parameters": {name: record}, "buffers": {name:
            tensor}}``. A record holds a parameter's value, and where it is trained the state and
            the options of its optimizer, the state of the learning rate's scheduler, and what
            corrections remember. Names are the module's own, those of a head begin with "head:".
            So, when nothing is in flight, the records of some stages can be dealt out to others.
        flight: everything else, of this stage of this schedule only.
    """

    trained: Tree
    flight: Tree


def flatten(tree: Tree, prefix: str = "") -> tuple[dict[str, Tensor], Any]:
    """Take nested data apart: tensors by name, and what is left, which is plain JSON.

    Args:
        tree: what `Stage.state` gives.
        prefix: begins the names.

    Raises:
        ValueError: naming the entry that is no plain data.

    >>> flatten({"a": [1, torch.zeros(1)]}, "stage 0")
    ({'stage 0/a/1': tensor([0.])}, {'a': [1, {'$tensor': 'stage 0/a/1'}]})
    """
    tensors: dict[str, Tensor] = {}

    def walk(value: Tree, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value.detach()
            return {_TENSOR: name}
        if isinstance(value, dict):
            found = {key: walk(item, f"{name}/{key}".lstrip("/")) for key, item in value.items()}
            if all(isinstance(key, str) for key in found):
                return found
            return {_ITEMS: [list(item) for item in found.items()]}
        if isinstance(value, list | tuple):
            return [walk(item, f"{name}/{index}") for index, item in enumerate(value)]
        if value is None or isinstance(value, str | int | float):
            return value
        raise ValueError(f"{name} is no plain data but a {type(value).__name__}")

    return tensors, walk(tree, prefix)


def nest(tensors: dict[str, Tensor], plain: Any) -> Tree:
    """Put together what `flatten` took apart; tuples have become lists.

    Raises:
        ValueError: naming a tensor that is missing.

    >>> nest(*flatten({"a": (1, {2: None})}))
    {'a': [1, {2: None}]}
    """
    if isinstance(plain, dict):
        if plain.keys() == {_TENSOR}:
            if plain[_TENSOR] not in tensors:
                raise ValueError(f"tensor {plain[_TENSOR]!r} is missing")
            return tensors[plain[_TENSOR]]
        if plain.keys() == {_ITEMS}:
            return {key: nest(tensors, value) for key, value in plain[_ITEMS]}
        return {key: nest(tensors, value) for key, value in plain.items()}
    return [nest(tensors, value) for value in plain] if isinstance(plain, list) else plain


def copied(tree: Tree, device: torch.device | None = None) -> Tree:
    """Nested data with copies of its tensors, on a device (None: where they are); tuples as lists.

    >>> copied({"a": (torch.ones(1), 2)})
    {'a': [tensor([1.]), 2]}
    """
    if isinstance(tree, Tensor):
        return tree.detach().to(tree.device if device is None else device, copy=True)
    if isinstance(tree, dict):
        return {key: copied(value, device) for key, value in tree.items()}
    return [copied(value, device) for value in tree] if isinstance(tree, list | tuple) else tree


def shaped(value: Tree, like: Any) -> Any:
    """A value as it was before `flatten` knew only dictionaries and lists, after an example.

    >>> shaped([0.9, 0.999], like=(0.0, 0.0))
    (0.9, 0.999)
    """
    if isinstance(like, tuple | Counter) and isinstance(value, list | dict):
        return type(like)(value)
    return value
