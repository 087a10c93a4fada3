"""A network as measured: its layers, what each costs, and which feeds which.

What importers produce and the partitioner cuts. A contiguous partition cuts one topological order
of the layers, and pays for every edge that it crosses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from ddg_sim.costs import MAX_SECONDS

MAX_BYTES = 2**60  # an exbibyte: a larger size is a broken file, not a network


class LayerError(ValueError):
    """Layers, edges or cuts that make no network, or a file that holds none; one line says why."""


def quoted(text: str) -> str:
    """A text from a file as a message shows it: in quotes, in one line, cut off where it is long.

    >>> quoted("conv1\\n")
    "'conv1\\\\n'"
    """
    shown = repr(text)
    return shown if len(shown) <= 60 else shown[:58] + "…" + shown[-1]


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer on one mini-batch: seconds forward and backward, bytes of output and parameters.

    Names need not be unique: a network may well have two layers "relu". What counts is the index
    in a `LayerGraph`.

    Raises:
        LayerError: for a size that is negative, not finite or absurdly large.

    >>> Layer("conv1", forward=0.1, backward=0.2, output_bytes=400, parameter_bytes=36).forward
    0.1
    >>> Layer("conv1", forward=0.1, backward=-0.2)
    Traceback (most recent call last):
    ...
    ddg_sim.layers.LayerError: layer 'conv1': backward is -0.2: give seconds from 0 to 1e+12
    """

    name: str
    forward: float
    backward: float
    output_bytes: int = 0
    parameter_bytes: int = 0

    def __post_init__(self) -> None:
        for field, unit, limit in (
            ("forward", "seconds", MAX_SECONDS),
            ("backward", "seconds", MAX_SECONDS),
            ("output_bytes", "bytes", MAX_BYTES),
            ("parameter_bytes", "bytes", MAX_BYTES),
        ):
            value, name = getattr(self, field), quoted(self.name)
            if not 0 <= value <= limit:  # NaN is in no range
                raise LayerError(
                    f"layer {name}: {field} is {value}: give {unit} from 0 to {limit:g}"
                )


@dataclass(frozen=True, slots=True)
class Stages:
    """The sizes of K stages, folded from their layers.

    Args:
        forward: seconds of the forward pass, per stage.
        backward: seconds of the backward pass, per stage.
        parameter_bytes: bytes of the weights, per stage.
        activation_bytes: bytes that a stage keeps from a forward pass to its backward pass, taken
            as the outputs of all its layers, per stage.
        cut_bytes: bytes sent over each of the K-1 cuts, one way; see `LayerGraph.crossings`.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    parameter_bytes: tuple[int, ...]
    activation_bytes: tuple[int, ...]
    cut_bytes: tuple[int, ...]


@dataclass(frozen=True)  # no slots: `crossings` is computed once and kept
class LayerGraph:
    """Layers in a topological order, and the edges (source, target) between their indices.

    Args:
        layers: at least one.
        edges: pairs of indices into ``layers``, each from an earlier to a later layer; a pair
            that occurs twice counts once.

    Raises:
        LayerError: for no layers, or an edge to nowhere, to itself or backwards.

    >>> LayerGraph((Layer("a", 1, 2, 8), Layer("b", 1, 2, 8)), ((0, 1),)).crossing(1)
    8
    >>> LayerGraph((Layer("a", 1, 2), Layer("b", 1, 2)), ((1, 0),))
    Traceback (most recent call last):
    ...
    ddg_sim.layers.LayerError: edges[0] is (1, 0), from 'b' back to 'a': order the layers so that
    every edge leads to a later one
    """

    layers: tuple[Layer, ...]
    edges: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise LayerError("layers is empty: a network has at least one layer")
        last = len(self.layers) - 1
        for index, (source, target) in enumerate(self.edges):
            if not (0 <= source <= last and 0 <= target <= last):
                raise LayerError(
                    f"edges[{index}] is ({source}, {target}), but layers go from 0 to {last}"
                )
            if source >= target:
                back, to = quoted(self.layers[source].name), quoted(self.layers[target].name)
                raise LayerError(
                    f"edges[{index}] is ({source}, {target}), from {back} back to {to}:"
                    " order the layers so that every edge leads to a later one"
                )

    @cached_property
    def crossings(self) -> tuple[int, ...]:
        """Bytes that cross each of the n+1 cuts of n layers; cut c is before layer c.

        A layer's output counts once per cut, however many later layers read it: it is sent once.
        One that skips a stage crosses both cuts: it is passed on from neighbour to neighbour.

        >>> layers = tuple(Layer(name, 1, 2, size) for name, size in (("a", 5), ("b", 7), ("c", 1)))
        >>> LayerGraph(layers, ((0, 1), (0, 2), (1, 2))).crossings
        (0, 5, 12, 0)
        """
        last_reader = list(range(len(self.layers)))
        for source, target in self.edges:
            last_reader[source] = max(last_reader[source], target)
        change = [0] * (len(self.layers) + 1)
        for source, reader in enumerate(last_reader):
            change[source + 1] += self.layers[source].output_bytes
            change[reader + 1] -= self.layers[source].output_bytes
        return tuple(accumulate(change))

    def crossing(self, cut: int) -> int:
        """Bytes that cross from the layers before index ``cut`` to those from it on.

        Raises:
            LayerError: for a cut outside of 0..n.
        """
        if not 0 <= cut <= len(self.layers):
            raise LayerError(f"cut is {cut}: give one from 0 to {len(self.layers)}")
        return self.crossings[cut]

    def stages(self, cuts: Sequence[int]) -> Stages:
        """Fold the layers into K stages.

        Args:
            cuts: the first layer of stages 1..K-1, increasing; none for one stage.

        Raises:
            LayerError: for cuts that do not increase, or that leave a stage without layers.

        >>> pair = LayerGraph((Layer("a", 1, 2, 8, 4), Layer("b", 3, 4, 8)), ((0, 1),))
        >>> pair.stages([1])
        Stages(forward=(1.0, 3.0), backward=(2.0, 4.0), parameter_bytes=(4, 0),
               activation_bytes=(8, 8), cut_bytes=(8,))
        """
        bounds = [0, *cuts, len(self.layers)]
        if any(after <= before for before, after in pairwise(bounds)):
            raise LayerError(
                f"cuts is {list(cuts)}: give indices that increase strictly between 0 and"
                f" {len(self.layers)}, the number of layers"
            )
        parts = [self.layers[start:end] for start, end in pairwise(bounds)]
        return Stages(
            forward=tuple(math.fsum(layer.forward for layer in part) for part in parts),
            backward=tuple(math.fsum(layer.backward for layer in part) for part in parts),
            parameter_bytes=tuple(sum(layer.parameter_bytes for layer in part) for part in parts),
            activation_bytes=tuple(sum(layer.output_bytes for layer in part) for part in parts),
            cut_bytes=tuple(self.crossings[cut] for cut in cuts),
        )
