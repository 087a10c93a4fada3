"""The operations of a model that is no plain sequence, as a graph that keeps both modes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ddg_gpu.dryrun import SIZES, SplitError, batch_of, undisturbed
from ddg_gpu.traces import Trace, attributes_of, by_mode, first_line, graph_module, module_of
from ddg_gpu.value import Value

#: What says something of a tensor's form, but nothing of its values.
FORM = frozenset(
    ("shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_nested", "is_sparse")
    + ("is_cuda", "is_quantized", "size", "dim", "ndimension", "numel", "nelement")
    + ("is_floating_point", "is_complex", "get_device", "element_size")
)
#: Classes of torch.nn whose layers are worth cutting between; all others are one layer each.
_CONTAINERS = (nn.TransformerEncoder, nn.TransformerDecoder, nn.Transformer)


def trace(model: nn.Module, example: Value) -> Trace:
    """Trace a model symbolically (`torch.fx`), in training and in evaluation mode.

    Layers of `torch.nn` stay modules, and so keep their state and their mode. So do modules that
    cannot be looked into: those that branch on tensors' values, or take other ways in training
    than in evaluation. Branches and loops on shapes are followed as for ``example``, provided
    that they do not depend on the batch size. Constants that depend on the mode, as in
    ``dropout(x, p, self.training)``, follow the mode of the stage.

    Raises:
        SplitError: if the model's own forward cannot be looked into.

    >>> class Twice(nn.Module):
    ...     def forward(self, x):
    ...         return nn.functional.dropout(x + x, 0.5, self.training)
    >>> [str(node) for node in trace(Twice(), torch.zeros(1)).graph.nodes]
    ['inputs', 'add', 'training', 'by_mode', 'dropout', 'output']
    """
    opaque: set[type[nn.Module]] = set()
    while True:
        try:
            (graph, constants), (twin, _) = (
                _traced(model, example, opaque, training) for training in (True, False)
            )
            graph = _merged(graph, twin, model)
            break
        except _Opaque as inner:
            if inner.module is model or type(inner.module) in opaque:
                raise SplitError(f"{type(model).__name__} cannot be traced: {inner}") from inner
            opaque.add(type(inner.module))
        except Exception as error:  # whatever a model's code does to a proxy
            raise SplitError(
                f"{type(model).__name__} cannot be traced: {first_line(error)}"
            ) from error
    attributes = attributes_of(graph, model, constants)
    return Trace(graph, attributes, {node: module_of(node) for node in graph.nodes})


def _traced(
    model: nn.Module, example: Value, opaque: set[type[nn.Module]], training: bool
) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Graph of one mode, and the constant tensors in it.

    Tracing begins anew whenever it must know a value, for nothing can be run meanwhile.
    """
    forms: dict[Form, Any] = {}
    while True:
        tracer = _Tracer(example, opaque, forms)
        with undisturbed(model, training=training):
            try:
                graph = tracer.trace(model)
            except _Unknown:
                pass
            else:
                _forget_questions(graph)
                return graph, tracer.constants
        attributes = attributes_of(tracer.graph, model, tracer.constants)
        with undisturbed(model, training=False), torch.no_grad():
            forms |= _forms(tracer.graph, attributes, example)


Form = tuple[str, bool]
"""A node's name, and whether its length is meant, or its value."""


def _forms(traced: fx.Graph, attributes: Mapping[str, Any], example: Value) -> dict[Form, Any]:
    """What is known of form in an unfinished graph, and `_VARIES` what depends on the batch."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in traced.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies.values()))
    run = graph_module(graph, attributes)
    found: dict[Form, Any] = {}
    runs = [run(batch_of(example, size)) for size in (1, *SIZES)]
    for node, *values in zip(traced.nodes, *runs, strict=True):
        if _is_decided(node):  # a tensor of several values decides nothing
            first, *others = map(_plain, values)
            found[node.name, False] = _VARIES if any(first != v for v in others) else first
        lengths = {
            len(v) if isinstance(v, tuple | list) or (isinstance(v, Tensor) and v.dim()) else -1
            for v in values
        }
        found[node.name, True] = lengths.pop() if len(lengths) == 1 else _VARIES
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else _VARIES
    return value


_VARIES = object()


class _Unknown(Exception):
    """A value that a model's control flow depends on is not known yet."""


class _Opaque(Exception):
    """A module that cannot be looked into."""

    def __init__(self, module: nn.Module, reason: str) -> None:
        super().__init__(reason)
        self.module = module


class _Tracer(fx.Tracer):
    """Symbolic tracing of a model of one argument that knows the example's shapes."""

    proxy_buffer_attributes = True

    def __init__(
        self, example: Value, opaque: set[type[nn.Module]], forms: Mapping[Form, Any]
    ) -> None:
        super().__init__()
        self.constants: dict[str, Tensor] = {}
        self._example, self._opaque, self._forms = example, opaque, forms

    def trace(
        self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None
    ) -> fx.Graph:
        try:
            return super().trace(root, concrete_args)
        finally:  # fx leaves tensors that a forward pass makes on the module
            for name in [name for name in vars(root) if name.startswith("_tensor_constant")]:
                self.constants[name] = vars(root).pop(name)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        inputs = self.create_proxy("placeholder", "inputs", (), {})
        if isinstance(self._example, Tensor):
            return root_fn, [self.root, inputs]
        return root_fn, [
            self.root,
            *(operator.getitem(inputs, i) for i in range(len(self._example))),
        ]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if type(m) in self._opaque:
            return True
        return not isinstance(m, _CONTAINERS) and super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().call_module(m, *args, **kwargs)
        except (_Opaque, _Unknown):
            raise
        except Exception as error:
            raise _Opaque(m, first_line(error)) from error

    def create_arg(self, a: Any) -> Any:
        return a.node if type(a) is _ShapedProxy else super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _ShapedProxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.known(obj))

    def known(self, proxy: fx.Proxy, length: bool = False) -> Any:
        """A value, or its length, that follows from the example's shapes, whatever the batch."""
        inside = isinstance(
            self.root.get_submodule(next(reversed(self.module_stack), "")), _CONTAINERS
        )
        if not (length or _says_form(proxy.node) or (inside and _is_decided(proxy.node))):
            raise fx.proxy.TraceError("its control flow depends on the values of a tensor")
        form = proxy.node.name, length
        if form not in self._forms:
            raise _Unknown
        if self._forms[form] is _VARIES:
            raise fx.proxy.TraceError("its control flow depends on the batch size")
        if length and self._forms[form] < 0:
            raise fx.proxy.TraceError("it takes a value apart that has no length")
        return self._forms[form]


class _ShapedProxy(fx.Proxy):
    """A proxy that knows lengths and sizes that are the same for every batch."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What `isinstance` takes it for, since models ask whether they were given a tensor."""
        return _ShapedProxy if _says_form(self.node) else Tensor

    def __len__(self) -> int:
        assert isinstance(self.tracer, _Tracer)
        return int(self.tracer.known(self, length=True))

    def __index__(self) -> int:
        assert isinstance(self.tracer, _Tracer)
        return operator.index(self.tracer.known(self))

    def __iter__(self) -> Iterator[Any]:
        return iter([operator.getitem(self, index) for index in range(len(self))])


def _is_decided(node: fx.Node) -> bool:
    """Whether a value depends on shapes and buffers only.

    A buffer may change, so that this decides nothing but whether a mask, which torch's
    transformers look at, is causal.
    """
    if node.op == "get_attr" or _says_form(node):
        return True
    calls = node.op in ("call_function", "call_method")
    return calls and all(map(_is_decided, node.all_input_nodes))


def _says_form(node: fx.Node) -> bool:
    """Whether a value says something of tensors' form only, so that an example may decide it."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in FORM
    if node.op == "call_method":
        return node.target in FORM
    if node.op == "call_function" and getattr(node.target, "__module__", "") == "_operator":
        return bool(node.all_input_nodes) and all(map(_says_form, node.all_input_nodes))
    return False


def _forget_questions(graph: fx.Graph) -> None:
    """Remove what was only asked of form, of which the modes may ask different things."""
    for node in reversed(graph.nodes):
        if not node.users and (node.op == "get_attr" or _says_form(node)):
            graph.erase_node(node)


def _merged(training: fx.Graph, evaluation: fx.Graph, model: nn.Module) -> fx.Graph:
    """The graph of training mode, with constants that differ in evaluation made to follow it."""
    own, other = list(training.nodes), list(evaluation.nodes)
    twins = dict(zip(own, other, strict=False))
    for node, twin in zip(own, other, strict=False):

        def merge(a: Any, b: Any, node: fx.Node = node) -> Any:
            if isinstance(a, fx.Node) or isinstance(b, fx.Node):
                if isinstance(a, fx.Node) and twins[a] is b:
                    return a
            elif type(a) is type(b) and isinstance(a, tuple | list) and len(a) == len(b):
                return type(a)(merge(x, y) for x, y in zip(a, b, strict=True))
            elif isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
                return {key: merge(a[key], b[key]) for key in a}
            elif isinstance(a, slice) and isinstance(b, slice):
                return slice(*(merge(getattr(a, f), getattr(b, f)) for f in _SLICE))
            elif type(a) is type(b) and a == b:
                return a
            elif isinstance(a, bool | float | int) and isinstance(b, bool | float | int):
                with training.inserting_before(node):
                    mode = training.create_node("get_attr", "training")
                    return training.call_function(by_mode, (mode, a, b))
            raise _differs(node, model)

        if (node.op, node.target) != (twin.op, twin.target):
            raise _differs(node, model)
        arguments = merge(node.args, twin.args), merge(node.kwargs, twin.kwargs)
        node.args, node.kwargs = arguments
    if len(own) != len(other):
        raise _differs(own[-1], model)
    return training


_SLICE = ("start", "stop", "step")


def _differs(node: fx.Node, model: nn.Module) -> _Opaque:
    reason = "its operations are others in training than in evaluation"
    return _Opaque(model.get_submodule(module_of(node)), reason)
