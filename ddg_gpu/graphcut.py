"""Where the graph of a model may be cut, and the parts that cuts leave."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ddg_gpu.chain import listed
from ddg_gpu.dryrun import SIZES, SplitError, batch_of, undisturbed
from ddg_gpu.traces import Trace, by_mode, follows_mode, graph_module
from ddg_gpu.value import Value

#: What a graph can hold as it is.
_LITERALS = (bool, int, float, str, type(None), torch.dtype, torch.device)
_RANDOM = ("rand", "normal", "bernoulli", "multinomial", "dropout", "empty", "exponential")


class GraphChain:
    """A traced model; its layers are what lies between two positions where tensors may cross.

    A position is between two operations. All that later operations need of earlier ones crosses
    there, and is passed on by every stage up to the one that needs it. Only tensors whose first
    dimension is the batch may cross. What depends on shapes, constants and buffers alone, such as
    a mask or positions, does not cross: it is computed again where it is needed. The batch size is
    read from a tensor that crosses; other sizes are those of the example.

    Args:
        model: what was traced.
        trace: its operations.
        example: the model's one argument, or the tuple of its arguments.
    """

    def __init__(self, model: nn.Module, trace: Trace, example: Value) -> None:
        self._model, self._trace = model, trace
        self._persistent = set(model.state_dict())
        self._small, self._large = _values(model, trace, example)
        self._argument = next(iter(trace.graph.nodes))
        self._unpack_early()
        nodes = list(trace.graph.nodes)
        self._forms: dict[fx.Node, Any] = {}
        self._free: set[fx.Node] = set()
        for node in nodes:
            self._forms[node] = self._form(node)
            if self._is_free(node):
                self._free.add(node)
        self._order = [node for node in nodes[1:] if node.op != "output" and node not in self._free]
        self._last = self._last_uses(nodes)
        self._names = self._layer_names()
        self._flaws = [self._flaw(position) for position in range(len(self._order))]
        self._starts = [0, *(i for i, flaw in enumerate(self._flaws) if i and not flaw)]
        self._ends = [*self._starts[1:], len(self._order)]
        self.names = [self._names[start] for start in self._starts]
        self.crossing = [len(self._crossing(start)) for start in self._starts]
        self.state = [
            [tensor for node in self._order[first:last] for tensor in self._state_of(node)]
            for first, last in zip(self._starts, self._ends, strict=True)
        ]

    def find(self, name: str) -> int:
        """See `Chain`."""
        for position, node in enumerate(self._order):
            module = self._trace.modules[node]
            if name in (self._names[position], node.name, module) or module.startswith(name + "."):
                break
        else:
            raise SplitError(
                f"cut {name!r} is no layer of the {type(self._model).__name__}: its layers are"
                f" {listed(self.names)}"
            )
        if position not in self._starts:
            raise SplitError(
                f"cut {name!r} of the {type(self._model).__name__}: {self._flaws[position]}, so no"
                f" stage can begin there; it can at {listed(self._near(position))}"
            )
        return self._starts.index(position)

    def join(self, first: int, last: int) -> fx.GraphModule:
        """See `Chain`."""
        start, end = self._starts[first], self._ends[last - 1]
        graph = fx.Graph()
        inputs = graph.placeholder("inputs")
        copies: dict[fx.Node, fx.Node] = {}
        arriving = self._crossing(start)
        if start == 0:
            copies[self._argument] = inputs
        elif len(arriving) == 1:
            copies[arriving[0]] = inputs
        else:
            for index, node in enumerate(arriving):
                copies[node] = graph.call_function(operator.getitem, (inputs, index))
        size: list[fx.Node] = []  # the batch size, once it is needed

        def literal(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(literal(item) for item in value)
            if not isinstance(value, _Batch):
                return value
            if not size:
                size.append(graph.call_method("size", (copies[arriving[0]], 0)))
            return size[0]

        def copy(node: fx.Node) -> Any:
            if node in copies:
                return copies[node]
            if self._forms[node] is not _UNKNOWN and not at_hand(node):
                return literal(self._forms[node])
            args, kwargs = fx.map_arg((node.args, node.kwargs), copy)  # before the node itself
            copies[node] = graph.create_node(node.op, node.target, args, kwargs, node.name)
            return copies[node]

        def at_hand(node: fx.Node) -> bool:
            needs = node.all_input_nodes
            return node in copies or (
                node in self._free and bool(needs) and all(map(at_hand, needs))
            )

        for node in self._order[start:end]:
            copy(node)
        if end == len(self._order):
            (output,) = (node for node in self._trace.graph.nodes if node.op == "output")
            graph.output(fx.map_arg(output.args[0], copy))
        else:
            leaving = [copy(node) for node in self._crossing(end)]
            graph.output(leaving[0] if len(leaving) == 1 else tuple(leaving))
        return self._module(graph)

    def _module(self, graph: fx.Graph) -> fx.GraphModule:
        stage = graph_module(graph, self._trace.attributes, self._persistent)
        for path, part in stage.named_modules():
            part.training = self._model.get_submodule(path).training
        return stage

    def _unpack_early(self) -> None:
        """Take tuples apart where they are made: a tuple cannot cross, but its tensors can."""
        for node in list(self._trace.graph.nodes):
            if node.target is operator.getitem and isinstance(node.args[1], int):
                source = node.args[0]
                if isinstance(source, fx.Node) and isinstance(self._small[source], tuple | list):
                    source.append(node)

    def _form(self, node: fx.Node) -> Any:
        """The value of a node that follows from the shapes, with `_Batch` for the batch size."""
        if node.op in ("get_attr", "output") or node.target is by_mode:
            return _UNKNOWN
        if any(follows_mode(need) for need in node.all_input_nodes):
            return _UNKNOWN
        return _form(self._small[node], self._large[node])

    def _is_free(self, node: fx.Node) -> bool:
        """Whether a node can be had anywhere without being passed on."""
        if node.op == "get_attr":
            return True
        if node.op in ("placeholder", "output", "call_module"):
            return False
        if self._forms[node] is not _UNKNOWN:
            return True
        return (
            not _changes(node)
            and not node.is_impure()
            and not any(word in _name(node) for word in _RANDOM)
            and all(need in self._free for need in node.all_input_nodes)
        )

    def _last_uses(self, nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
        """By node that is passed on, the index of the last operation that needs it."""
        last: dict[fx.Node, int] = {}
        index = {node: index for index, node in enumerate(self._order)}
        for node in nodes:
            end = len(self._order) if node.op == "output" else index.get(node)
            if end is None:
                continue
            for need in node.all_input_nodes:
                if need not in self._free:
                    last[need] = max(end, last.get(need, 0))
        return last

    def _crossing(self, position: int) -> list[fx.Node]:
        """What operations from a position on need of those before it."""
        before = [self._argument, *self._order[:position]]
        return [node for node in before if self._last.get(node, -1) >= position]

    def _flaw(self, position: int) -> str:
        """Why no stage can begin at a position; empty if one can."""
        before, after = (
            self._trace.modules[self._order[index]] for index in (position - 1, position)
        )
        if before == after != "" and not self._model.get_submodule(before)._modules:
            return f"it is inside layer {before!r}"
        crossing = self._crossing(position)
        for node in crossing:
            small, large = self._small[node], self._large[node]
            if not (isinstance(small, Tensor) and isinstance(large, Tensor)):
                return f"{node.name!r}, a {type(small).__name__}, would cross"
            if (*small.shape[:1], *large.shape[:1]) != SIZES or small.shape[1:] != large.shape[1:]:
                return (
                    f"{node.name!r} would cross, whose shapes for {SIZES[0]} and {SIZES[1]}"
                    f" examples, {tuple(small.shape)} and {tuple(large.shape)}, do not begin with"
                    " the batch"
                )
        return "" if crossing else "nothing would cross"

    def _near(self, position: int) -> list[str]:
        """Names of layers at which a stage can begin, the nearest first."""
        order = sorted(range(1, len(self._starts)), key=lambda i: abs(self._starts[i] - position))
        return [self.names[index] for index in order] or ["no layer"]

    def _layer_names(self) -> list[str]:
        """A module's name for its first operation, and the operation's own for others."""
        names, seen = [], {""}
        for node in self._order:
            module = self._trace.modules[node]
            names.append(node.name if module in seen else module)
            parts = module.split(".")
            seen |= {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
        return names

    def _state_of(self, node: fx.Node) -> list[Tensor]:
        """What an operation trains or writes."""
        found: list[Tensor] = []
        for need in (node, *self._sources(node)):
            if need.op == "call_module":
                module: nn.Module = self._trace.attributes[str(need.target)]
                found += [*module.parameters(), *module.buffers()]
            elif need.op == "get_attr":
                value = self._trace.attributes[str(need.target)]
                if isinstance(value, nn.Parameter) or (
                    isinstance(value, Tensor) and any(map(_changes, need.users))
                ):
                    found.append(value)
        return found

    def _sources(self, node: fx.Node) -> set[fx.Node]:
        """What is computed, or read, for a node wherever it is."""
        found: set[fx.Node] = set()
        waiting = [node]
        while waiting:
            for need in waiting.pop().all_input_nodes:
                if need in self._free and need not in found and self._forms[need] is _UNKNOWN:
                    found.add(need)
                    waiting.append(need)
        return found


class _Batch:
    """Stands for the batch size."""


_UNKNOWN = object()


def _form(small: Any, large: Any) -> Any:
    if isinstance(small, tuple) and isinstance(large, tuple) and len(small) == len(large):
        parts = [_form(a, b) for a, b in zip(small, large, strict=True)]
        return _UNKNOWN if any(part is _UNKNOWN for part in parts) else tuple(parts)
    if not (isinstance(small, _LITERALS) and type(small) is type(large)):
        return _UNKNOWN
    if small == large:
        return small
    return _Batch() if type(small) is int and (small, large) == SIZES else _UNKNOWN


def _name(node: fx.Node) -> str:
    target = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _changes(node: fx.Node) -> bool:
    """Whether an operation changes one of its arguments."""
    name = _name(node).split(".")[0]
    dunder = name.endswith("__")
    return (name.endswith("_") and not dunder) or name == "setitem" or "out" in node.kwargs


def _values(
    model: nn.Module, trace: Trace, example: Value
) -> tuple[dict[fx.Node, Any], dict[fx.Node, Any]]:
    """What every operation gives in evaluation mode, for two batch sizes; of tensors, the form."""
    found = []
    whole = graph_module(trace.graph, trace.attributes, set(model.state_dict()))
    for size in SIZES:
        values: dict[fx.Node, Any] = {}

        class Watch(fx.Interpreter):
            def run_node(self, n: fx.Node, values: dict[fx.Node, Any] = values) -> Any:
                value = super().run_node(n)
                values[n] = value.detach().to("meta") if isinstance(value, Tensor) else value
                return value

        with undisturbed(model, whole, training=False), torch.no_grad():
            Watch(whole).run(batch_of(example, size))
        found.append(values)
    return found[0], found[1]
