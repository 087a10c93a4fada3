"""PipeDream's optimizer with its own assumptions, to compare with what its authors print.

Narayanan et al., "PipeDream: Generalized Pipeline Parallelism for DNN Training", SOSP 2019,
section 3.1, on one level of equal machines and links. Its assumptions, which `partition` does not
make: stages may be replicated; a stage's forward and backward pass count as one time; r replicas
average gradients in 4(r-1)/r times the parameters over the bandwidth, spread over r mini-batches,
and not overlapped with computing; a boundary takes 2 activations/(r·bandwidth), overlapped;
nothing has latency. A stage boundary is not a cut of one topological order but any *state*: a set
of layers that holds all ancestors of each of its members.

Facts about details that the paper leaves open (which states are looked at, which bytes count as a
state's output) are from the code, msr-fiddle/pipedream, ``optimizer_graph_hierarchical.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ddg_sim.layers import LayerGraph

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PlanStage:
    """A stage of PipeDream's plan.

    Args:
        first: number of states before the stage's first one.
        last: the same for the state after its last one (exclusive).
        layers: indices of the layers in it.
        seconds: forward and backward seconds of one mini-batch on one machine.
        replicas: machines that run it, on different mini-batches.
    """

    first: int
    last: int
    layers: tuple[int, ...]
    seconds: float
    replicas: int


@dataclass(frozen=True, slots=True)
class PipeDreamPlan:
    """What PipeDream's optimizer prints.

    Args:
        stages: in the order of the pipeline.
        stage_time: seconds per mini-batch of the slowest stage or boundary.
        single_seconds: seconds per mini-batch on one machine.
        data_parallel_seconds: the same with all machines data parallel.
    """

    stages: tuple[PlanStage, ...]
    stage_time: float
    single_seconds: float
    data_parallel_seconds: float

    @property
    def speedup(self) -> float:
        """Over one machine."""
        return self.single_seconds / self.stage_time

    @property
    def data_parallel_speedup(self) -> float:
        """Of data parallelism over one machine."""
        return self.single_seconds / self.data_parallel_seconds

    @property
    def speedup_over_data_parallel(self) -> float:
        """Over as many machines, data parallel."""
        return self.data_parallel_seconds / self.stage_time


def pipedream_plan(
    graph: LayerGraph, machines: int, bandwidth: float = 1e9, *, straight: bool = False
) -> PipeDreamPlan:
    """Split a network over equal machines as PipeDream's optimizer does.

    Dynamic programming over states and numbers of machines. Of equally good plans this one has
    fewest replicas in the last stage, then the earliest last boundary, and so on backwards, where
    the original takes whichever comes first in a Python set.

    Args:
        graph: layers and edges; its first layer must be the first that computes.
        machines: number of machines, all of which are used.
        bandwidth: bytes per second between any two.
        straight: one machine per stage, no replication.

    Raises:
        ValueError: for fewer than one machine, a bandwidth that is not above 0, a network whose
            last layers nothing leads to, or too few states for a straight pipeline.

    >>> from ddg_sim.layers import Layer
    >>> sizes = [(1.0, 1000), (1.0, 10), (2.0, 10), (1.0, 10)]
    >>> layers = tuple(Layer(f"l{n}", s, s, size) for n, (s, size) in enumerate(sizes))
    >>> plan = pipedream_plan(LayerGraph(layers, ((0, 1), (1, 2), (2, 3))), 2, bandwidth=100.0)
    >>> [(stage.layers, stage.seconds, stage.replicas) for stage in plan.stages], plan.stage_time
    ([((0, 1, 2, 3), 10.0, 2)], 5.0)
    >>> straight = pipedream_plan(
    ...     LayerGraph(layers, ((0, 1), (1, 2), (2, 3))), 2, bandwidth=100.0, straight=True)
    >>> [(stage.layers, stage.seconds) for stage in straight.stages], straight.stage_time
    ([((0, 1), 4.0), ((2, 3), 6.0)], 6.0)
    """
    if machines < 1:
        raise ValueError(f"machines is {machines}: give at least 1")
    if not bandwidth > 0:
        raise ValueError(f"bandwidth is {bandwidth}: give bytes per second, more than 0")
    states = _States(graph)
    best, chosen = _tables(states, machines, bandwidth, straight)
    stage_time = float(best[machines - 1, -1])
    if not math.isfinite(stage_time):
        raise ValueError(
            f"machines is {machines}: a straight pipeline over {len(states.seconds)} states"
            " has fewer stages than that; give fewer machines"
        )
    total, parameters = float(states.seconds[-1]), float(states.parameters[-1])
    average = 4 * (machines - 1) * parameters / (bandwidth * machines)
    return PipeDreamPlan(
        _stages(states, chosen, machines),
        stage_time,
        total,
        (total + average) / machines,
    )


class _States:
    """The sets of layers that may lie before a boundary, smaller ones first.

    The first state is the first layer alone; from a state one comes to another by adding a layer
    that reads from it, with all its ancestors. Per state: forward and backward ``seconds``,
    ``parameters`` and ``output`` bytes; ``inside[k, j]``: whether state k is a part of state j.
    """

    def __init__(self, graph: LayerGraph) -> None:
        kept, edges = _without_unread_items(graph)
        count = len(kept)
        readers: list[list[int]] = [[] for _ in range(count)]
        self.ancestors = [1 << layer for layer in range(count)]  # bit sets, with the layer itself
        for source, target in edges:  # sorted by target, so that ancestors are complete
            readers[source].append(target)
            self.ancestors[target] |= self.ancestors[source]
        found = {1}
        waiting = [1]
        while waiting:
            state = waiting.pop()
            for layer in range(count):
                if state >> layer & 1:
                    for reader in readers[layer]:
                        larger = state | self.ancestors[reader]
                        if larger not in found:
                            found.add(larger)
                            waiting.append(larger)
        self.sets = sorted(found, key=lambda state: (state.bit_count(), state))
        self.layers = [graph.layers[layer] for layer in kept]
        self.kept = kept
        if self.sets[-1] != (1 << count) - 1:
            missing = next(n for n in range(count) if not self.sets[-1] >> n & 1)
            raise ValueError(
                f"graph: nothing that reads from the first layer leads to"
                f" {self.layers[missing].name!r}; PipeDream's optimizer starts at the first layer"
            )
        member = np.array([[state >> n & 1 for n in range(count)] for state in self.sets], float)
        time = np.array([layer.forward + layer.backward for layer in self.layers])
        weight = np.array([layer.parameter_bytes for layer in self.layers], float)
        self.seconds: Array = member @ time
        self.parameters: Array = member @ weight
        self.output = np.array([self._output(state, readers) for state in self.sets])
        common = member @ member.T
        sizes = member.sum(axis=1)
        self.inside = (common == sizes[:, None]) & (sizes[:, None] < sizes[None])

    def _output(self, state: int, readers: list[list[int]]) -> float:
        """Bytes that PipeDream lets a state send.

        Those of its last layers, and of every ancestor of a last layer that is also read by
        something else than that layer's ancestors: even if what reads it lies in the state.
        """
        members = [layer for layer in range(len(readers)) if state >> layer & 1]
        last = [layer for layer in members if not any(state >> r & 1 for r in readers[layer])]
        sending = set(last)
        for end in last:
            before = self.ancestors[end]
            for layer in members:
                if before >> layer & 1 and any(not before >> r & 1 for r in readers[layer]):
                    sending.add(layer)
        return float(sum(self.layers[layer].output_bytes for layer in sending))


def _without_unread_items(graph: LayerGraph) -> tuple[list[int], list[tuple[int, int]]]:
    """Layers without the ``__getitem__`` that nothing reads, and edges between what is left."""
    read = {source for source, _ in graph.edges}
    kept = [
        index
        for index, layer in enumerate(graph.layers)
        if index in read or not layer.name.split()[-1].startswith("__getitem__")
    ]
    place = {index: position for position, index in enumerate(kept)}
    edges = [(place[s], place[t]) for s, t in graph.edges if s in place and t in place]
    return kept, sorted(set(edges), key=lambda edge: edge[1])


def _tables(
    states: _States, machines: int, bandwidth: float, straight: bool
) -> tuple[Array, npt.NDArray[np.intp]]:
    """Least stage time per number of machines (minus 1) and state, and how it is attained.

    The second table holds the state before the last stage, or -1, and that stage's replicas.
    """
    count = len(states.seconds)
    best = np.full((machines, count), np.inf)
    chosen = np.full((machines, count, 2), -1, dtype=np.intp)
    for replicas in range(1, 2 if straight else machines + 1):
        average = 4 * (replicas - 1) * states.parameters / (bandwidth * replicas)
        best[replicas - 1] = (states.seconds + average) / replicas
        chosen[replicas - 1, :, 1] = replicas
    for number in range(1, machines):
        for replicas in range(1, 2 if straight else number + 1):
            boundary = 2.0 * states.output / (bandwidth * replicas)
            rate = 4 * (replicas - 1) / (bandwidth * replicas)
            for state in range(1, count):
                before = np.flatnonzero(states.inside[:, state])
                if not len(before):
                    continue
                seconds = states.seconds[state] - states.seconds[before]
                parameters = states.parameters[state] - states.parameters[before]
                times = np.maximum(
                    np.maximum(best[number - replicas, before], boundary[before]),
                    (seconds + rate * parameters) / replicas,
                )
                if state < count - 1:
                    times = np.maximum(times, boundary[state])
                first = int(np.argmin(times))
                if times[first] < best[number, state]:
                    best[number, state] = times[first]
                    chosen[number, state] = before[first], replicas
    return best, chosen


def _stages(states: _States, chosen: npt.NDArray[np.intp], machines: int) -> tuple[PlanStage, ...]:
    stages: list[PlanStage] = []
    state, number = len(states.sets) - 1, machines - 1
    while state >= 0:
        before, replicas = map(int, chosen[number, state])
        inside = states.sets[state] & ~(states.sets[before] if before >= 0 else 0)
        layers = tuple(index for n, index in enumerate(states.kept) if inside >> n & 1)
        seconds = states.seconds[state] - (states.seconds[before] if before >= 0 else 0.0)
        stages.insert(0, PlanStage(before + 1, state + 1, layers, float(seconds), replicas))
        state, number = before, number - replicas
    return tuple(stages)
