"""Cutting a network into stages so that a schedule's own period is least.

The period of a schedule is the largest ratio of seconds to tokens over the cycles of its event
graph (`cycle_time`), and the seconds of a cycle are a sum of functions of single cuts
(`ddg_sim.separable`). So every schedule is partitioned by the same three steps, whatever its
method: cut so that the cycles known so far are short enough, ask `cycle_time` what bounds these
cuts, remember that cycle. A cycle exists for all cuts: the known ones give a lower bound, and when
`cycle_time` agrees with it the partition is optimal (cutting planes; derived here).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ddg_sim.costs import Costs
from ddg_sim.cycletime import CycleTime, cycle_time
from ddg_sim.dependencies import TRAVELS
from ddg_sim.descent import descend, enumerate_all
from ddg_sim.eventgraph import Event, event_graph
from ddg_sim.layers import LayerGraph
from ddg_sim.lowering import memory
from ddg_sim.network import FREE, Network
from ddg_sim.rule import Activations
from ddg_sim.schedule import OpKind, Schedule
from ddg_sim.separable import TOLERANCE, Array, Cuts, Minimum, Row, minimise

#: The functions of a cut's position of which everything else is a sum: what the layers before it
#: cost (forward and backward seconds, parameter and output bytes), seconds of one transfer across
#: it, and bytes that cross it.
FORWARD, BACKWARD, PARAMETERS, OUTPUTS, TRANSFER, CROSSING = range(6)

#: So many possible cuts are all looked at.
FEW = 20_000


class DoesNotFitError(ValueError):
    """No partition fits into the devices' memory; the message names a device."""


@dataclass(frozen=True, slots=True)
class Partition:
    """A network cut into the stages of a schedule.

    Args:
        cuts: first layer of stages 1..K-1 (stages and layers count from 0).
        costs: seconds of the stages and links.
        cycle: the period, and what bounds it.
        lower_bound: seconds; no partition that fits has a shorter period.
        memory: peak bytes per worker.
    """

    cuts: tuple[int, ...]
    costs: Costs
    cycle: CycleTime
    lower_bound: float
    memory: tuple[float, ...]

    @property
    def period(self) -> float:
        """Steady-state seconds per iteration."""
        return self.cycle.period

    @property
    def exact(self) -> bool:
        """Whether the partition is known to be optimal, to rounding."""
        return Minimum(self.cuts, self.period, self.lower_bound).exact


def partition(
    graph: LayerGraph,
    schedule: Schedule,
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
    quick: bool = False,
) -> Partition:
    """Cut a network into contiguous stages with the least period of this schedule.

    Optimal among all cuts of the layers' topological order, as `Partition.exact` says; of
    partitions whose periods agree to nine digits the one with the earliest cuts
    (lexicographically), so the same question has the same answer every time.

    The time for it depends on how many cycles bound partitions that are nearly as good. Where
    many do and the devices differ (barriers above all), it stops after some seconds: then
    `Partition.lower_bound` says how much better a partition could be at most.

    Peak memory of a stage: parameters times (weight versions + ``optimizer_state``), and per live
    sample the output of each of its layers and what came in; where the method does not keep them
    (recomputed, reconstructed, or only the newest sample's), those of one sample. A stage on
    several workers counts on the one that runs its updates.

    Args:
        graph: L layers; seconds and bytes are those of one sample of the schedule (a micro-batch
            where an iteration takes several).
        schedule: a valid schedule of K stages.
        speeds: of the schedule's workers; a layer takes its seconds divided by the speed.
        latency: seconds per message, one number or one per link; link k joins stages k and k+1.
        bandwidth: bytes per second, likewise.
        capacities: bytes of memory, of the schedule's workers.
        optimizer_state: bytes of gradients and optimizer state per byte of parameters: 1 for
            plain SGD (the gradient), 2 with momentum, 3 for Adam.
        barrier: seconds from the last worker's coming to a barrier until all go on.
        all_reduce_latency: seconds of an all-reduce whatever its size, one number or per stage.
        all_reduce_rate: its seconds per byte of parameters, likewise.
        overhead: host seconds that every operation costs on top.
        message: host seconds that an operation spends on each message it sends or receives.
        network: how messages travel; it has no buses.
        quick: whether, where there are many cuts and enough memory, to be content with those that
            moving a single one does not improve; `Partition.exact` says whether they are known to
            be optimal.

    Raises:
        DoesNotFitError: naming a device, what it needs and has, if nothing fits.
        ValueError: naming the argument, for fewer layers than stages, a wrong number of values,
            or a value out of range; from `Costs`, for operations without a known cost
            (all-reduce).

    >>> from ddg_sim.layers import Layer
    >>> from ddg_sim.methods import bp, ddg
    >>> layers = tuple(Layer(f"layer{n}", 1, 2, output_bytes=100 - n) for n in range(6))
    >>> chain = LayerGraph(layers, tuple((n, n + 1) for n in range(5)))
    >>> partition(chain, ddg(3)).cuts, partition(chain, ddg(3)).period
    ((2, 4), 6.0)
    >>> partition(chain, bp(3), bandwidth=1000).cuts  # cuts where least crosses
    (4, 5)
    >>> partition(chain, bp(3), capacities=250)
    Traceback (most recent call last):
    ...
    ddg_sim.partition.DoesNotFitError: does not fit: stage 2 needs 294 B of 250 B, ...
    """
    fixed = Costs(
        (0.0,) * schedule.num_stages,
        (0.0,) * schedule.num_stages,
        overhead=(overhead,) * schedule.num_stages,
        message=(message,) * schedule.num_stages,
        all_reduce=tuple(_values("all_reduce_latency", all_reduce_latency, schedule.num_stages, 0)),
        barrier=barrier,
        network=network,
    )
    rates = _values("all_reduce_rate", all_reduce_rate, schedule.num_stages, least=0.0)
    model = _Network(graph, schedule, speeds, latency, bandwidth, fixed, rates)
    if not (math.isfinite(optimizer_state) and optimizer_state >= 0):
        raise ValueError(f"optimizer_state is {optimizer_state}: give a number from 0 on")
    held = model.memory_rows(optimizer_state)
    sizes = _values("capacities", capacities, len(schedule.workers))
    problem = Cuts(model.basis)
    for row, size in zip(held, sizes, strict=True):
        if math.isfinite(size):
            problem.add(Row(row.coefficients, row.const, rate=0.0, limit=size))
    start = model.even_cuts()
    if not problem.within_limits(start):
        found = problem.earliest(0.0)  # only the limits are there yet
        if found is None:
            raise DoesNotFitError(_misfit(model, held, sizes))
        start = found
    for worker in range(len(schedule.workers)):
        problem.add(model.own_loop(worker))

    def period(cuts: tuple[int, ...]) -> float:
        bound = cycle_time(schedule, model.costs(cuts))
        if bound.period > problem.level(cuts) * (1 + TOLERANCE / 10):  # else it is known
            problem.add(model.cycle_row(bound.cycle, bound.tokens))
            # Else it would be found again and again: the row says what the cycle says.
            assert problem.level(cuts) >= bound.period * (1 - TOLERANCE)
        return bound.period

    if math.comb(len(graph.layers) - 1, schedule.num_stages - 1) <= FEW:
        best = enumerate_all(problem, period)
    else:
        starts = [model.even_cuts(), *(model.bottleneck_cuts(w) for w in (0, 1, 2))]
        best = descend(problem, period, [start, *starts])
        # Where memory is short, single moves lead nowhere, but there are fewer cuts to choose from.
        better = [cuts for cuts in problem.relaxed if problem.level(cuts) < best.value]
        if not quick or not (best.exact or all(map(problem.within_limits, [*starts, *better]))):
            best = minimise(problem, period, best.cuts)
    costs = model.costs(best.cuts)
    return Partition(
        best.cuts,
        costs,
        cycle_time(schedule, costs),
        best.lower_bound,
        tuple(model.value(row, best.cuts) for row in held),
    )


def memory_at(
    graph: LayerGraph, schedule: Schedule, cuts: tuple[int, ...], optimizer_state: float = 1.0
) -> tuple[float, ...]:
    """Peak bytes of every worker with these cuts; see `partition`.

    >>> from ddg_sim.layers import Layer
    >>> from ddg_sim.methods import ddg
    >>> pair = LayerGraph((Layer("a", 1, 2, 8, 4), Layer("b", 1, 2, 8, 4)), ((0, 1),))
    >>> memory_at(pair, ddg(2), (1,))  # 4 B x (2 versions + 1 gradient) + 8 B x 2 samples; 8 + 16
    (28.0, 24.0)
    """
    free = Costs((0.0,) * schedule.num_stages, (0.0,) * schedule.num_stages)
    model = _Network(graph, schedule, 1.0, 0.0, math.inf, free, (0.0,) * schedule.num_stages)
    return tuple(model.value(row, cuts) for row in model.memory_rows(optimizer_state))


class _Network:
    """What layers, devices and links say about any cuts: costs, and rows of constraints."""

    def __init__(
        self,
        graph: LayerGraph,
        schedule: Schedule,
        speeds: float | Iterable[float],
        latency: float | Iterable[float],
        bandwidth: float | Iterable[float],
        fixed: Costs,
        all_reduce_rate: Sequence[float],
    ) -> None:
        layers, stages = len(graph.layers), schedule.num_stages
        if layers < stages:
            raise ValueError(
                f"graph has {layers} layers, too few for the {stages} stages of schedule"
                f" {schedule.method!r}: give at least one layer per stage"
            )
        per_worker = _values("speeds", speeds, len(schedule.workers))
        if not all(map(math.isfinite, per_worker)):
            raise ValueError(f"speeds are {per_worker}: give finite numbers")
        links = stages - 1
        self.schedule = schedule
        self.fixed = fixed  # what does not depend on the cuts
        self.all_reduce_rate = np.array(all_reduce_rate)
        self.speed = np.array([per_worker[schedule.worker_of(k)] for k in range(stages)])
        for worker, body in enumerate(schedule.workers):
            for template in body:
                if per_worker[worker] != self.speed[template.stage]:
                    raise ValueError(
                        f"speeds[{worker}] is {per_worker[worker]}, but stage {template.stage} is"
                        f" also on a worker with speed {self.speed[template.stage]:g}: give"
                        " workers that share a stage the same speed"
                    )
        measured = [
            (layer.forward, layer.backward, layer.parameter_bytes, layer.output_bytes)
            for layer in graph.layers
        ]
        before = np.zeros((4, layers + 1))
        before[:, 1:] = np.cumsum(np.array(measured, dtype=float).T, axis=1)
        crossing = np.array(graph.crossings, dtype=float)
        self.basis = np.zeros((links, 6, layers + 1))
        self.basis[:, :TRANSFER] = before
        self.basis[:, CROSSING] = crossing
        delays = _values("latency", latency, links, least=0.0)
        rates = _values("bandwidth", bandwidth, links)
        for link, (delay, rate) in enumerate(zip(delays, rates, strict=True)):
            self.basis[link, TRANSFER] = delay + crossing / rate
        self.totals = np.append(before[:, -1], [0.0, 0.0])
        self.before = before

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

    def own_loop(self, worker: int) -> Row:
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

    def memory_rows(self, optimizer_state: float) -> list[Row]:
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
        return float(row.const + (row.coefficients * chosen).sum())

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
        return Row(coefficients, const + float(per_stage[-1] @ self.totals), rate)


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


def _misfit(network: _Network, held: list[Row], sizes: list[float]) -> str:
    """Say which device is overfull even where memory is shared out as well as can be."""
    problem = Cuts(network.basis)
    for row, size in zip(held, sizes, strict=True):
        if math.isfinite(size):
            problem.add(Row(row.coefficients, row.const, rate=size))
    cuts = minimise(problem, problem.level, network.even_cuts()).cuts
    needs = [network.value(row, cuts) for row in held]
    worker = max(range(len(sizes)), key=lambda w: needs[w] / sizes[w])
    stages = [
        str(stage + 1)
        for stage in range(network.schedule.num_stages)
        if network.schedule.worker_of(stage) == worker
    ]
    where = f"stage{'s' if len(stages) > 1 else ''} {', '.join(stages)}"
    return (
        f"does not fit: {where} need{'' if len(stages) > 1 else 's'} {bytes_text(needs[worker])}"
        f" of {bytes_text(sizes[worker])}, even where memory is shared out best"
        f" (cuts {list(cuts)}): give larger capacities or more stages"
    )


def bytes_text(size: float) -> str:
    """Bytes as a person would write them, to three digits.

    >>> bytes_text(18.2e9), bytes_text(16e9), bytes_text(500), bytes_text(0)
    ('18.2 GB', '16 GB', '500 B', '0 B')
    """
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.3g} B"
