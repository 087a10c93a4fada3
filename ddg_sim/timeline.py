"""What happened when: the record of a simulated or measured run.

Engines and executors make timelines; period, utilisation, memory, traces and pictures come from
them, by the same code for predicted and measured runs.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ddg_sim.costs import costs
from ddg_sim.dependencies import BACKWARDS, Relation
from ddg_sim.eventgraph import event_graph, retiming, state_ticks
from ddg_sim.lowering import Message, StageMemory, stage_memory
from ddg_sim.schedule import Op, OpKind, Schedule
from ddg_sim.steady import Regime, find_regime, robust_period


@dataclass(frozen=True, slots=True)
class Span:
    """One thing that took place: an operation, the transfer of a message, or neither.

    ``start`` and ``end`` are seconds. ``lane`` is where it is drawn, see `worker_lane`.
    """

    lane: str
    label: str
    start: float
    end: float
    op: Op | None = None
    message: Message | None = None

    @property
    def duration(self) -> float:
        """Seconds from start to end.

        >>> Span("stage 1", "load data", 1.0, 1.5).duration
        0.5
        """
        return self.end - self.start


def worker_lane(schedule: Schedule, worker: int) -> str:
    """Lane of a worker's operations; stages are counted from 1 here, as in prose.

    >>> from ddg_sim.methods import ddg
    >>> worker_lane(ddg(3), 0)
    'stage 1'
    """
    stages = sorted({template.stage for template in schedule.workers[worker]})
    kinds = {template.kind for template in schedule.workers[worker]}
    if len(stages) == 1 and {OpKind.FORWARD, OpKind.UPDATE} <= kinds:
        return f"stage {stages[0] + 1}"
    plural = "s" if len(stages) > 1 else ""
    return f"worker {worker + 1} (stage{plural} {', '.join(str(k + 1) for k in stages)})"


def op_span(lane: str, op: Op, start: float, end: float) -> Span:
    """Span of an operation in its worker's lane, labelled with its kind and sample.

    >>> op_span("stage 2", Op(OpKind.FORWARD, 1, 5, 5, 4), 7.0, 8.0).label
    'F5'
    """
    return Span(lane, f"{op.kind.value}{op.sample}", start, end, op=op)


def message_span(message: Message, start: float, end: float) -> Span:
    """Span of the transfer of a message, in seconds.

    >>> message_span(Message(Relation.GRADIENT, 1, 0, 3), 1.0, 1.5).lane
    'link 2→1'
    """
    lane = f"link {message.source + 1}→{message.target + 1}"
    return Span(lane, f"{message.relation.value} {message.sample}", start, end, message=message)


@dataclass(frozen=True)
class Timeline:
    """Spans of a run of ``schedule`` that was fed ``iterations`` iterations.

    Args:
        schedule: what was run.
        iterations: iterations of samples that were fed (the drain comes on top).
        spans: in any order; operations must carry their ``op``.
        deterministic: whether an engine computed it from fixed costs. Such a run repeats itself
            exactly in the end and its period is read off; of any other run the period is a robust
            slope. Measured runs leave it False.

    >>> from ddg_sim.costs import costs
    >>> from ddg_sim.cycletime import evaluate
    >>> from ddg_sim.methods import ddg
    >>> run = evaluate(ddg(2), costs(2, forward=1.0, backward=2.0), iterations=8)
    >>> run.makespan, run.period, run.utilisation, run.bubble
    (27.0, 3.0, (1.0, 1.0), 0.0)
    """

    schedule: Schedule
    iterations: int
    spans: tuple[Span, ...]
    deterministic: bool = False

    @property
    def start(self) -> float:
        """Seconds at which the first span starts; 0 without spans."""
        return min((span.start for span in self.spans), default=0.0)

    @property
    def makespan(self) -> float:
        """Seconds from the start of the first span to the end of the last; 0 without spans."""
        return max((span.end for span in self.spans), default=0.0) - self.start

    @cached_property
    def operations(self) -> tuple[tuple[Span, Op], ...]:
        """Spans that are operations, with their operation, by start.

        The end decides between an operation that takes no time and what follows it.
        """
        found = [(span, span.op) for span in self.spans if span.op is not None]
        return tuple(sorted(found, key=lambda pair: (pair[0].start, pair[0].end)))

    @cached_property
    def period(self) -> float:
        """Steady-state seconds per iteration.

        Exact if the run is deterministic and long enough to repeat itself (see `regime`).
        Otherwise a robust slope (`steady.robust_period`) of the times at which iterations were
        complete on all workers, without warm-up and drain. A run too short for either, with at
        most one steady iteration, gives makespan / iterations, which still contains the warm-up.
        """
        if self.regime is not None:
            return self.regime.period
        slope = robust_period(self._completed())
        return slope if slope is not None else self.makespan / max(1, self.iterations)

    @cached_property
    def regime(self) -> Regime | None:
        """The exact steady state, if the run is deterministic and reached it."""
        if not self.deterministic:
            return None
        graph = event_graph(self.schedule, costs(self.schedule.num_stages))
        rounds = retiming(graph)
        return find_regime(
            self._starts(self.iterations - max(rounds) + min(rounds)), state_ticks(graph)
        )

    @cached_property
    def utilisation(self) -> tuple[float, ...]:
        """Per worker, the fraction of the period in which it computes, in steady state.

        Host overhead inside an operation counts as computing; transfers do not. The busy seconds
        of an iteration are the median over the steady iterations.
        """
        ticks = self._steady_ticks()
        busy = np.zeros((len(self.schedule.workers), max(1, len(ticks))))
        home = {
            (template.kind, template.stage): worker
            for worker, body in enumerate(self.schedule.workers)
            for template in body
        }
        for span, op in self.operations:
            if op.iteration in ticks:
                busy[home[op.kind, op.stage], op.iteration - ticks.start] += span.duration
        if self.period <= 0:
            return (0.0,) * len(busy)
        return tuple(float(seconds) / self.period for seconds in np.median(busy, axis=1))

    @property
    def bubble(self) -> float:
        """Fraction of the workers' time in which they do not compute, in steady state."""
        return 1.0 - sum(self.utilisation) / len(self.utilisation)

    @cached_property
    def memory(self) -> tuple[StageMemory, ...]:
        """Peak live activations and weight versions per stage, counted in order of start."""
        per_stage: list[list[Op]] = [[] for _ in range(self.schedule.num_stages)]
        for _, op in self.operations:
            per_stage[op.stage].append(op)
        return tuple(stage_memory(ops, self.schedule.rule) for ops in per_stage)

    def _steady_ticks(self) -> range:
        """Iterations in which no operation is skipped; all there are if there are none such."""
        steady = range(self.schedule.num_ticks(0), self.iterations)
        return steady or range(self.iterations)

    def _completed(self) -> NDArray[np.float64]:
        """Seconds at which each steady iteration was complete on all workers."""
        ticks = self._steady_ticks()
        completed = np.full(len(ticks), -np.inf)
        for span, op in self.operations:
            if op.iteration in ticks:
                place = op.iteration - ticks.start
                completed[place] = max(completed[place], span.end)
        found: NDArray[np.float64] = completed[np.isfinite(completed)]
        return found

    def _starts(self, stop: int) -> NDArray[np.float64]:
        """Start times, a row per steady iteration below ``stop`` and a column per event."""
        first, m = self.schedule.num_ticks(0), self.schedule.samples_per_iteration
        table: dict[tuple[object, int, int], dict[int, float]] = defaultdict(dict)
        produced: dict[tuple[Relation, int, int], int] = {}
        for span, op in self.operations:
            table[op.kind, op.stage, op.sample % m][op.iteration] = span.start
            if op.kind is OpKind.FORWARD:
                produced[Relation.ACTIVATION, op.stage, op.sample] = op.iteration
            elif op.kind in BACKWARDS:
                produced[Relation.GRADIENT, op.stage, op.sample] = op.iteration
        for span in self.spans:
            if span.message is not None:  # a link's backlog is part of the state
                key = (span.message.relation, span.message.source, span.message.sample)
                table[key[0], key[1], key[2] % m][produced[key]] = span.start
        rows = np.array(
            [[column.get(tick, np.nan) for column in table.values()] for tick in range(first, stop)]
        ).reshape(max(0, stop - first), len(table))
        gaps = np.flatnonzero(np.isnan(rows).any(axis=1))  # the last messages may stay unsent
        return rows[: gaps[0]] if gaps.size else rows
