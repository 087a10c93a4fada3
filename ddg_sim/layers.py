"""A network as measured: its layers, what each costs, and which feeds which.

What importers produce and the partitioner cuts. A contiguous partition cuts one topological order
of the layers, and pays for every edge that it crosses.
"""

from __future__ import annotations

from dataclasses import dataclass


class LayerError(ValueError):
    """Layers or edges that make no network; the message names the offending one."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer on one mini-batch: seconds forward and backward, bytes of output and parameters.

    >>> Layer("conv1", forward=0.1, backward=0.2, output_bytes=400, parameter_bytes=36).forward
    0.1
    """

    name: str
    forward: float
    backward: float
    output_bytes: int = 0
    parameter_bytes: int = 0


@dataclass(frozen=True, slots=True)
class LayerGraph:
    """Layers in a topological order, and the edges (source, target) between their indices.

    Args:
        layers: at least one.
        edges: pairs of indices into ``layers``, each from an earlier to a later layer.

    Raises:
        LayerError: for no layers, an edge to nowhere or backwards, or a layer with a negative or
            not finite size.

    >>> LayerGraph((Layer("a", 1, 2, 8), Layer("b", 1, 2, 8)), ((0, 1),)).crossing(1)
    8
    """

    layers: tuple[Layer, ...]
    edges: tuple[tuple[int, int], ...]

    def crossing(self, cut: int) -> int:
        """Bytes that cross from the layers before index ``cut`` to those from it on.

        A layer's output counts once, however many later layers read it: it is sent once.
        """
        sources = {source for source, target in self.edges if source < cut <= target}
        return sum(self.layers[source].output_bytes for source in sources)
