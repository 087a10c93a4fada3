"""PipeDream's ``graph.txt``: measured layers of a network and the edges between them.

The format is what msr-fiddle/pipedream (Narayanan et al., SOSP 2019) writes in ``graph/graph.py``,
one node per line and then, indented by a tab, one edge per line::

    node4 -- Conv2d(64, 64) -- forward_compute_time=46.201, backward_compute_time=113.330, \
activation_size=1644167168.000, parameter_size=147712.000 -- stage_id=0
        node3 -- node4

Times are milliseconds, sizes bytes, both of a whole mini-batch; a layer with several outputs lists
their sizes as ``[a; b]``; ``stage_id`` is there after PipeDream has partitioned the network.
"""

from __future__ import annotations

import heapq
import math
import re
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

from ddg_sim.files import read_text
from ddg_sim.layers import Layer, LayerError, LayerGraph, quoted

Edge = tuple[int, str, str]  # number of its line, source, target
FIELDS = ("forward_compute_time", "backward_compute_time", "activation_size", "parameter_size")


def read_graph(path: str | Path) -> LayerGraph:
    """Read a profile in PipeDream's format; it may branch.

    Layers are called "node4 Conv2d" and come in a topological order that follows the numbers of
    the nodes (their order of execution) wherever the edges leave a choice. ``Input`` nodes
    are dropped, as by PipeDream's own optimizer: their time is that of loading data, and whichever
    stage needs the input loads it. A ``stage_id`` is ignored: cutting is the partitioner's work.

    Raises:
        LayerError: in one line with path, number of the line and what is wrong.

    >>> read_graph("no/such/graph.txt")
    Traceback (most recent call last):
    ...
    ddg_sim.layers.LayerError: no/such/graph.txt: cannot be read: No such file or directory
    """
    return parse_graph(read_text(path, LayerError), path)


def parse_graph(text: str, path: str | Path = "graph.txt") -> LayerGraph:
    """Layers and edges from the text of a ``graph.txt``; see `read_graph`.

    Args:
        text: the whole file.
        path: where the text comes from, for messages.

    Raises:
        LayerError: as `read_graph`.

    >>> sizes = "backward_compute_time=2, activation_size=[8; 4], parameter_size=0"
    >>> graph = parse_graph(
    ...     f"n1 -- Input -- forward_compute_time=9, {sizes}\\n"
    ...     f"n2 -- ReLU() -- forward_compute_time=1, {sizes}\\n\\tn1 -- n2\\n")
    >>> graph.layers
    (Layer(name='n2 ReLU', forward=0.001, backward=0.002, output_bytes=12, parameter_bytes=0),)
    >>> parse_graph(f"n1 -- ReLU() -- {sizes}")
    Traceback (most recent call last):
    ...
    ddg_sim.layers.LayerError: graph.txt:1: node 'n1' has no forward_compute_time
    """
    layers: dict[str, Layer] = {}
    inputs: set[str] = set()
    edges: list[Edge] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            if line[0].isspace():
                edges.append((number, *_edge(line)))
                continue
            node, description, layer = _node(line)
            if node in layers:
                raise LayerError(f"node {quoted(node)} is there twice")
        except LayerError as error:
            raise LayerError(f"{path}:{number}: {error}") from None
        layers[node] = layer
        if description.startswith("Input"):
            inputs.add(node)
    if not layers:
        raise LayerError(f"{path}: holds no nodes: write one per line, as 'node1 -- Conv2d(...) --")

    before: dict[str, list[str]] = {node: [] for node in layers}
    for number, source, target in edges:
        for node in (source, target):
            if node not in layers:
                raise LayerError(
                    f"{path}:{number}: the edge names {quoted(node)}, which is no node"
                )
        before[target].append(source)
    inputs = {node for node in inputs if not before[node]}  # what others feed is a layer
    order = [node for node in _topological(edges, before, path) if node not in inputs]
    if not order:
        raise LayerError(f"{path}: holds only Input nodes: nothing in it computes")
    index = {node: position for position, node in enumerate(order)}
    if len(order) > 1 and not edges:
        raise LayerError(
            f"{path}: has {len(order)} nodes but no edge: write one per line, as '<TAB>node1 --"
            " node2' (is the file cut off?)"
        )
    kept = {(index[s], index[t]) for _, s, t in edges if s not in inputs}
    return LayerGraph(tuple(layers[node] for node in order), tuple(sorted(kept)))


def _edge(line: str) -> tuple[str, str]:
    ends = line.strip().split(" -- ")
    if len(ends) != 2:
        raise LayerError(f"an indented line is an edge, 'node1 -- node2', got {quoted(line)}")
    return ends[0].strip(), ends[1].strip()


def _node(line: str) -> tuple[str, str, Layer]:
    parts = line.strip().split(" -- ")
    if parts[-1].startswith("stage_id="):
        parts.pop()
    if len(parts) < 3:
        raise LayerError(
            f"a node is 'name -- description -- {FIELDS[0]}=..., ...', got {quoted(line)}"
        )
    node, description = parts[0].strip(), " -- ".join(parts[1:-1])
    sizes = [size.partition("=") for size in parts[-1].split(", ")]
    values = {name: value for name, _, value in sizes}
    for name in FIELDS:
        if name not in values:
            raise LayerError(f"node {quoted(node)} has no {name}")
    if len(sizes) != len(FIELDS):
        raise LayerError(
            f"node {quoted(node)}: give {', '.join(FIELDS)} once each and nothing else"
        )
    forward, backward, activation, parameter = (
        _size(f"node {quoted(node)}: {name}", values[name]) for name in FIELDS
    )
    kind = description.partition("(")[0].strip()  # its arguments can be hundreds of characters
    layer = Layer(
        f"{node} {kind}".strip(), forward / 1e3, backward / 1e3, round(activation), round(parameter)
    )
    return node, description, layer


def _size(what: str, value: str) -> float:
    """A number that is finite and at least 0; a list in brackets is summed."""
    listed = value.startswith("[") and value.endswith("]")
    try:
        numbers = [float(part) for part in (value[1:-1].split(";") if listed else [value])]
        if all(0 <= number < math.inf for number in numbers):
            return math.fsum(numbers)
    except (ValueError, OverflowError):
        pass
    raise LayerError(f"{what} is {quoted(value)}: give a finite number that is at least 0")


def _topological(edges: list[Edge], before: dict[str, list[str]], path: str | Path) -> list[str]:
    sorter = TopologicalSorter(before)
    try:
        sorter.prepare()
    except CycleError as error:
        cycle = error.args[1]
        steps = set(pairwise(cycle))
        line = max(number for number, *edge in edges if tuple(edge) in steps)
        shown = [quoted(node) for node in cycle]
        if len(shown) > 8:
            shown[4:-3] = [f"({len(shown) - 7} more)"]
        raise LayerError(f"{path}:{line}: edges form a cycle: {' -> '.join(shown)}") from None
    order: list[str] = []
    ready: list[tuple[list[tuple[int, str]], str]] = []
    while sorter.is_active():
        for node in sorter.get_ready():
            heapq.heappush(ready, (_by_number(node), node))
        order.append(heapq.heappop(ready)[1])
        sorter.done(order[-1])
    return order


def _by_number(node: str) -> list[tuple[int, str]]:
    """A key that sorts node2 before node10: of two numbers, the one with more digits is larger."""
    parts = re.split("([0-9]+)", node)  # text and digits in turns
    return [
        (len(digits), digits) if (digits := part.lstrip("0")).isdecimal() else (0, part)
        for part in parts
    ]
