"""The operations of a model that `tracing` cannot look into, by `torch.export`."""

from __future__ import annotations

import operator
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ddg_gpu.dryrun import SIZES, SplitError, batch_of, tensors_of, undisturbed
from ddg_gpu.traces import Trace, attributes_of, by_mode, first_line, module_of
from ddg_gpu.value import Value


def export(model: nn.Module, example: Value) -> Trace:
    """Trace a model with `torch.export`, for what `trace` cannot look into.

    It is exported in training mode; arguments called ``training`` or ``train``, the probability
    of attention's dropout and the counters of batch normalisation then follow the stage's mode.
    Layers become single operations; parameters and buffers stay the model's own.

    Raises:
        SplitError: if it cannot be exported either.
    """
    inputs = batch_of(example, SIZES[0])
    parts = tensors_of(inputs) or ()
    dynamic = tuple({0: torch.export.Dim.AUTO} for _ in parts)
    try:
        with undisturbed(model, training=True), warnings.catch_warnings(action="ignore"):
            program = torch.export.export(model, parts, dynamic_shapes=dynamic)
        exported: Any = program.module()
    except Exception as error:  # a dozen types, and more with every release
        raise SplitError(
            f"{type(model).__name__} cannot be exported: {first_line(error)}"
        ) from error
    graph = fx.Graph()
    argument = graph.placeholder("inputs")
    source: list[fx.Node] = list(exported.graph.nodes)
    places = [node for node in source if node.op == "placeholder"]
    copies: dict[fx.Node, fx.Node] = {places[0]: argument}
    if not isinstance(example, Tensor):
        for index, place in enumerate(places):
            copies[place] = graph.call_function(operator.getitem, (argument, index))
    for node in source:
        if node.op == "output":
            flat = [copies[leaf] for leaf in pytree.tree_leaves(node.args)]
            specification = exported._out_spec
            graph.output(pytree.tree_unflatten(flat, specification))
        elif node.op != "placeholder" and "_guards_fn" not in str(node.target):
            copies[node] = graph.node_copy(node, copies.__getitem__)
    _follow_mode(graph)
    names = {copy: module_of(node) for node, copy in copies.items()}
    modules = {node: names.get(node, "") for node in graph.nodes}
    return Trace(graph, attributes_of(graph, exported), modules)


def _follow_mode(graph: fx.Graph) -> None:
    """Make the operations of a graph that was exported in training mode follow the mode."""
    mode: fx.Node | None = None
    for node in list(graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None:
            continue
        if mode is None:
            with graph.inserting_before(node):
                mode = graph.create_node("get_attr", "training")
        arguments = list(node.args)
        for index, argument in enumerate(schema.arguments):
            given = arguments[index] if index < len(arguments) else node.kwargs.get(argument.name)
            if argument.name in ("training", "train", "use_input_stats") and given is True:
                new: Any = mode
            elif argument.name == "dropout_p" and given:
                with graph.inserting_before(node):
                    new = graph.call_function(by_mode, (mode, given, 0.0))
            elif "num_batches_tracked" in str(arguments[0]) and given == 1:
                new = mode  # True counts as one
            else:
                continue
            if index < len(arguments):
                arguments[index] = new
            else:
                node.kwargs = {**node.kwargs, argument.name: new}
        node.args = tuple(arguments)
