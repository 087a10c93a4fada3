"""A model's operations as a graph, and modules made of graphs."""

from __future__ import annotations

import operator
from collections.abc import Container, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import fx, nn


@dataclass(frozen=True, slots=True)
class Trace:
    """A model's operations in order.

    Args:
        graph: takes one placeholder, the model's one argument or the tuple of its arguments.
        attributes: what the graph's targets name, by name.
        modules: by node, the name of the innermost module that it is part of; "" for the model's.
    """

    graph: fx.Graph
    attributes: dict[str, Any]
    modules: dict[fx.Node, str]


def by_mode(training: bool, in_training: object, in_evaluation: object) -> object:
    """An argument that depends on the mode, such as dropout's probability.

    >>> by_mode(False, 0.1, 0.0)
    0.0
    """
    return in_training if training else in_evaluation


def graph_module(
    graph: fx.Graph, attributes: Mapping[str, Any], persistent: Container[str] = ()
) -> fx.GraphModule:
    """A graph as a module that shares what its targets name.

    Args:
        graph: the operations.
        attributes: what targets name, by name.
        persistent: names of what the model saves in its state_dict.
    """
    targets = {str(n.target) for n in graph.nodes if n.op in ("get_attr", "call_module")}
    shared = {
        part: set(part._non_persistent_buffers_set)
        for target in targets
        if isinstance(attributes[target], nn.Module)
        for part in attributes[target].modules()
    }
    module = fx.GraphModule({target: attributes[target] for target in targets}, graph)
    for owner, part in module.named_modules():
        if part in shared:
            part._non_persistent_buffers_set = shared[part]
            continue
        for name, _ in part.named_buffers(recurse=False):
            # fx makes a saved buffer of every tensor.
            if f"{owner}.{name}".lstrip(".") not in persistent:
                part._non_persistent_buffers_set.add(name)
    return module


def follows_mode(node: fx.Node) -> bool:
    """Whether a node's value is the mode, or chosen by it."""
    return node.target is by_mode or (node.op == "get_attr" and node.target == "training")


def attributes_of(
    graph: fx.Graph, model: nn.Module, constants: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """What the targets of a graph name in a model, or among constants that it made."""
    targets = [str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")]
    return {
        target: constants[target] if target in constants else operator.attrgetter(target)(model)
        for target in targets
    }


def module_of(node: fx.Node) -> str:
    """The innermost module that a node is part of."""
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    return str(list(stack.values())[-1][0]).removeprefix("L['self'].")


def first_line(error: BaseException) -> str:
    """The first line of a message: torch's go on for pages."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__
