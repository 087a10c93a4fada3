"""What layers, devices and links say about any cuts of a network: costs, and constraints.

Seconds of a cycle and bytes of a worker are sums of functions of single cuts (`separable`); the
rows here say which. They hold for every batch: what grows with it are the functions.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from ddg_sim.costs import Costs
from ddg_sim.dependencies import TRAVELS
from ddg_sim.eventgraph import Event, event_graph
from ddg_sim.layers import LayerGraph
from ddg_sim.lowering import memory
from ddg_sim.network import FREE, Network
from ddg_sim.rule import Activations
from ddg_sim.schedule import OpKind, Schedule
from ddg_sim.separable import Row
from ddg_sim.times import Array

#: The functions of a cut's position of which everything else is a sum: what the layers before it
#: cost (forward and backward seconds, parameter and output bytes), seconds of one transfer across
#: it, and bytes that cross it.
FORWARD, BACKWARD, PARAMETERS, OUTPUTS, TRANSFER, CROSSING = range(6)


class CutCosts:
    """What any cuts of a network cost, on given devices and links; see `partition.partition`.

    Args:
        graph: L layers.
        schedule: a valid schedule of K stages.
        batch: samples of an operation, in those of ``graph``: seconds of layers, their outputs and
            what crosses cuts are taken as proportional to it.

    The other arguments, and what is raised, are those of `partition.partition`.
    """

    def __init__(
        self,
        graph: LayerGraph,
        schedule: Schedule,
        batch: float = 1.0,
        *,
        speeds: float | Iterable[float] = 1.0,
        latency: float | Iterable[float] = 0.0,
        bandwidth: float | Iterable[float] = math.inf,
        capacities: float | Iterable[float] = math.inf,
        optimizer_state: float = 1.0,
        barrier: float = 0.0,
        all_reduce_latency: float | Iterable[float] = 0.0,
        all_reduce_rate: float | Iterable[float] = 0.0,
        overhead: float = 0.0,
        message: float = 0.0,
        network: Network = FREE,
    ) -> None:
        stages, workers = schedule.num_stages, len(schedule.workers)
        if len(graph.layers) < stages:
            raise ValueError(
                f"graph has {len(graph.layers)} layers, too few for the {stages} stages of schedule"
                f" {schedule.method!r}: give at least one layer per stage"
            )
        self.schedule = schedule
        self.fixed = Costs(  # what does not depend on the cuts
            (0.0,) * stages,
            (0.0,) * stages,
            overhead=(overhead,) * stages,
            message=(message,) * stages,
            all_reduce=tuple(_values("all_reduce_latency", all_reduce_latency, stages, 0)),
            barrier=barrier,
            network=network,
        )
        rates = _values("all_reduce_rate", all_reduce_rate, stages, least=0.0)
        self.all_reduce_rate = np.array(rates)
        self.speed = _speed_of_stages(schedule, _values("speeds", speeds, workers))
        delays = _values("latency", latency, stages - 1, least=0.0)
        widths = _values("bandwidth", bandwidth, stages - 1)
        if not (math.isfinite(optimizer_state) and optimizer_state >= 0):
            raise ValueError(f"optimizer_state is {optimizer_state}: give a number from 0 on")
        self.capacities = _values("capacities", capacities, workers)
        measured = [
            (layer.forward, layer.backward, layer.parameter_bytes, layer.output_bytes)
            for layer in graph.layers
        ]
        self._layers = np.zeros((4, len(graph.layers) + 1))
        self._layers[:, 1:] = np.cumsum(np.array(measured, dtype=float).T, axis=1)
        self._crossing = np.array(graph.crossings, dtype=float)
        self._links = np.array([delays, widths])
        self.loops = [self._own_loop(worker) for worker in range(workers)]
        self.held = self._memory_rows(optimizer_state)
        self._grow(batch)

    def _grow(self, batch: float) -> None:
        layers = self._layers * np.array([batch, batch, 1.0, batch])[:, None]
        crossing = self._crossing * batch
        delays, widths = self._links
        self.before = layers
        self.basis = np.zeros((len(delays), 6, layers.shape[1]))
        self.basis[:, :TRANSFER] = layers
        self.basis[:, TRANSFER] = delays[:, None] + crossing / widths[:, None]
        self.basis[:, CROSSING] = crossing
        self.totals = np.append(layers[:, -1], [0.0, 0.0])

    def at(self, batch: float) -> CutCosts:
        """The same for another batch; the rows are the same."""
        other = copy.copy(self)
        other._grow(batch)
        return other

    def unlimited(self) -> CutCosts:
        """The same with unlimited memory."""
        other = copy.copy(self)
        other.capacities = [math.inf] * len(self.capacities)
        return other

    def limits(self) -> list[Row]:
        """A constraint for each worker whose memory is limited."""
        return [
            replace(row, rate=0.0, limit=size)
            for row, size in zip(self.held, self.capacities, strict=True)
            if math.isfinite(size)
        ]

    def memory(self, cuts: tuple[int, ...]) -> tuple[float, ...]:
        """Peak bytes of every worker."""
        return tuple(self.value(row, cuts) for row in self.held)

    def costs(self, cuts: tuple[int, ...]) -> Costs:
        """Seconds of the stages and links that these cuts make."""
        bounds = np.array([0, *cuts, self.before.shape[1] - 1])
        sums = np.diff(self.before[:3, bounds], axis=1)
        forward, backward = sums[:2] / self.speed
        all_reduce = sums[PARAMETERS] * self.all_reduce_rate + self.fixed.all_reduce
        transfer = tuple(float(self.basis[link, TRANSFER, cut]) for link, cut in enumerate(cuts))
        return replace(
            self.fixed,
            forward=tuple(map(float, forward)),
            backward=tuple(map(float, backward)),
            recompute=tuple(map(float, forward)),
            all_reduce=tuple(map(float, all_reduce)),
            activation_transfer=transfer,
            gradient_transfer=transfer,
        )

    def even_cuts(self) -> tuple[int, ...]:
        """Cuts that give every stage about its device's share of the computation: a start."""
        stages, layers = len(self.speed), self.before.shape[1] - 1
        work = self.before[FORWARD] + self.before[BACKWARD]
        shares = np.cumsum(self.speed)[:-1] / self.speed.sum() * work[-1]
        cuts: list[int] = []
        for stage, cut in enumerate(np.searchsorted(work, shares), start=1):
            least = cuts[-1] + 1 if cuts else 1
            cuts.append(int(min(max(cut, least), layers - stages + stage)))
        return tuple(cuts)

    def bottleneck_cuts(self, transfers: int) -> tuple[int, ...]:
        """Cuts with the least longest stage, where a stage's time counts its transfers so often."""
        work = self.before[FORWARD] + self.before[BACKWARD]
        spent = work - work[:, None]  # (first layer, end)
        spent[np.tril_indices_from(spent)] = np.inf
        links = np.zeros((len(self.speed) + 1, len(work)))
        links[1:-1] = transfers * self.basis[:, TRANSFER]
        least = spent[0] / self.speed[0] + links[1]
        begins = []
        for stage in range(1, len(self.speed)):
            own = spent / self.speed[stage] + links[stage][:, None] + links[stage + 1]
            longest = np.maximum(least[:, None], own)
            begins.append(longest.argmin(axis=0))
            least = longest.min(axis=0)
        cuts: list[int] = []
        for begin in reversed(begins):
            cuts.insert(0, int(begin[cuts[0] if cuts else -1]))
        return tuple(cuts)

    def _own_loop(self, worker: int) -> Row:
        """A worker runs its loop body once per iteration."""
        events = event_graph(self.schedule, self.fixed.network).events
        own = [event for event in events if event.node is not None and event.node.worker == worker]
        return self.cycle_row(own, tokens=1)

    def cycle_row(self, cycle: Sequence[Event], tokens: int) -> Row:
        """The seconds of a cycle as a function of the cuts, at most the period times its tokens."""
        per_stage = np.zeros((len(self.speed), 6))
        per_cut = np.zeros((len(self.speed) - 1, 6))
        const = 0.0
        for event in cycle:
            const += event.seconds(self.fixed)
            if event.template is not None:
                self._count(per_stage, event.template.kind, event.template.stage)
            elif event.message is not None and event.ends[0] != event.ends[1]:
                per_cut[min(event.ends), TRANSFER] += event.message.relation in TRAVELS
        return self._row(per_stage, per_cut, const, rate=float(tokens))

    def _memory_rows(self, optimizer_state: float) -> list[Row]:
        """Peak bytes of every worker."""
        rows = []
        held = memory(self.schedule)
        kept = self.schedule.rule.activations
        for worker in range(len(self.schedule.workers)):
            per_stage = np.zeros((len(self.speed), 6))
            per_cut = np.zeros((len(self.speed) - 1, 6))
            for stage, need in enumerate(held):
                if self.schedule.worker_of(stage) == worker:
                    per_stage[stage, PARAMETERS] = need.weight_versions + optimizer_state
                    live = need.activations
                    per_stage[stage, OUTPUTS] = live if kept is Activations.GRAPH else 1
                    if stage > 0:
                        inputs = kept in (Activations.GRAPH, Activations.INPUT)
                        per_cut[stage - 1, CROSSING] = live if inputs else 1
            rows.append(self._row(per_stage, per_cut, 0.0, rate=1.0))
        return rows

    def value(self, row: Row, cuts: tuple[int, ...]) -> float:
        """The left side of a constraint."""
        chosen = self.basis[np.arange(len(cuts)), :, list(cuts)]
        return float(row.const + row.whole @ self.totals + (row.coefficients * chosen).sum())

    def _count(self, per_stage: Array, kind: OpKind, stage: int) -> None:
        """Add one operation: which share of its stage's forward and backward seconds it takes."""
        for column, unit in ((FORWARD, _UNIT_FORWARD), (BACKWARD, _UNIT_BACKWARD)):
            per_stage[stage, column] += unit.duration(kind, 0)
        if kind is OpKind.ALL_REDUCE:
            per_stage[stage, PARAMETERS] += self.all_reduce_rate[stage]

    def _row(self, per_stage: Array, per_cut: Array, const: float, rate: float) -> Row:
        """A stage's share is what lies before the cut after it, minus what lies before its own."""
        per_stage = per_stage.copy()
        per_stage[:, [FORWARD, BACKWARD]] /= self.speed[:, None]
        coefficients = per_stage[:-1] - per_stage[1:] + per_cut
        return Row(coefficients, const, rate, whole=per_stage[-1])


def _speed_of_stages(schedule: Schedule, per_worker: Sequence[float]) -> Array:
    if not all(map(math.isfinite, per_worker)):
        raise ValueError(f"speeds are {per_worker}: give finite numbers")
    speed = np.array([per_worker[schedule.worker_of(k)] for k in range(schedule.num_stages)])
    for worker, body in enumerate(schedule.workers):
        for template in body:
            if per_worker[worker] != speed[template.stage]:
                raise ValueError(
                    f"speeds[{worker}] is {per_worker[worker]}, but stage {template.stage} is"
                    f" also on a worker with speed {speed[template.stage]:g}: give"
                    " workers that share a stage the same speed"
                )
    return speed


_UNIT_FORWARD = Costs(forward=(1.0,), backward=(0.0,))
_UNIT_BACKWARD = Costs(forward=(0.0,), backward=(1.0,))


def _values(
    name: str, value: float | Iterable[float], count: int, least: float | None = None
) -> list[float]:
    """One value per worker or link; positive, or at least ``least``."""
    values = list(map(float, value)) if isinstance(value, Iterable) else [float(value)] * count
    if len(values) != count:
        raise ValueError(
            f"{name} has {len(values)} values, but {count} {'is' if count == 1 else 'are'} needed"
        )
    for index, number in enumerate(values):
        if not (number > 0 if least is None else number >= least):
            limit = "more than 0" if least is None else f"at least {least:g}"
            raise ValueError(f"{name}[{index}] is {number}: give a number that is {limit}")
    return values
