"""What happened when: the record of a simulated or measured run.

Engines and executors make timelines; period, utilisation, memory, traces and pictures come from
them, by the same code for predicted and measured runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddg_sim.eventgraph import event_graph, retiming, state_ticks
from ddg_sim.lowering import Message, StageMemory, channels, message_of, stage_memory
from ddg_sim.schedule import Op, OpKind, Schedule
from ddg_sim.steady import Regime, find_regime, robust_period


@dataclass(frozen=True, slots=True)
class Span:
    """One thing that took place: an operation, or the transfer of a message.

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

        >>> Span("link 1→2", "activation 0", 1.0, 1.5).duration
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

    >>> from ddg_sim.dependencies import Relation
    >>> message_span(Message(Relation.GRADIENT, 1, 0, 3), 1.0, 1.5).lane
    'link 2→1'
    """
    lane = f"link {message.source + 1}→{message.target + 1}"
    return Span(lane, f"{message.relation.value} {message.sample}", start, end, message=message)


#: Columns of a timeline: a loop body's place (worker, position), or a channel's number and 0; the
#: iteration in which it ran, or was sent; seconds.
COLUMNS = np.dtype(
    [("lane", "i4"), ("position", "i4"), ("iteration", "i4"), ("start", "f8"), ("end", "f8")]
)
Columns = NDArray[Any]


def columns(rows: Iterable[tuple[int, int, Iterable[int], ArrayLike, ArrayLike]]) -> Columns:
    """Columns from (lane, position, iterations, starts, ends) groups.

    >>> columns([(0, 1, range(2), [0.0, 1.0], [0.5, 1.5])])["end"].tolist()
    [0.5, 1.5]
    """
    parts = []
    for lane, position, iterations, starts, ends in rows:
        part = np.empty(np.size(starts), COLUMNS)
        part["lane"], part["position"] = lane, position
        part["iteration"], part["start"], part["end"] = list(iterations), starts, ends
        parts.append(part)
    return np.concatenate(parts) if parts else np.empty(0, COLUMNS)


@dataclass(frozen=True, eq=False)
class Timeline:
    """What happened in a run of ``schedule`` that was fed ``iterations`` iterations.

    It is kept in columns, so that millions of operations fit; `spans` reads them one by one.

    Args:
        schedule: what was run.
        iterations: iterations of samples that were fed (the drain comes on top).
        op_columns: the operations; lane and position say which place of which worker.
        message_columns: the transfers; lane is the channel's number, as in `lowering.channels`.
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
    op_columns: Columns
    message_columns: Columns
    deterministic: bool = False

    @staticmethod
    def of(schedule: Schedule, iterations: int, spans: Iterable[Span]) -> Timeline:
        """The timeline of a measured run, from its spans.

        Raises:
            ValueError: for an operation that the schedule does not run, there or with that version.

        >>> from ddg_sim.costs import costs
        >>> from ddg_sim.cycletime import evaluate
        >>> from ddg_sim.methods import ddg
        >>> run = evaluate(ddg(2), costs(2, comm=0.5), iterations=3)
        >>> sorted(Timeline.of(ddg(2), 3, run.spans).spans, key=str) == sorted(run.spans, key=str)
        True
        """
        m = schedule.samples_per_iteration
        place = {
            (template.kind, template.stage, template.sample % m): (worker, position)
            for worker, body in enumerate(schedule.workers)
            for position, template in enumerate(body)
        }
        channel = {}
        for found in channels(schedule):
            offset = message_of(schedule, found, 0).sample
            channel[found.relation, found.source, offset % m] = (found.number, offset)
        programs = [
            list(schedule.ticks(worker, iterations)) for worker in range(len(schedule.workers))
        ]
        operations, transfers = [], []
        for number_of_span, span in enumerate(spans):
            if span.op is not None:
                op = span.op
                lane, position = place.get((op.kind, op.stage, op.sample % m), (0, -1))
                within = position >= 0 and 0 <= op.iteration < len(programs[lane])
                planned = programs[lane][op.iteration][position] if within else None
                if op != planned:
                    raise ValueError(
                        f"span {number_of_span}: {op}, but the schedule runs"
                        f" {planned or 'no such operation'}"
                    )
                operations.append((lane, position, op.iteration, span.start, span.end))
            elif span.message is not None:
                sent = span.message
                number, offset = channel[sent.relation, sent.source, sent.sample % m]
                iteration = (sent.sample - offset) // m
                transfers.append((number, 0, iteration, span.start, span.end))
        return Timeline(
            schedule, iterations, np.array(operations, COLUMNS), np.array(transfers, COLUMNS)
        )

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """Everything that took place, one by one; transfers that took no time are left out."""
        streams = channels(self.schedule)
        transfers = (
            message_span(message_of(self.schedule, streams[number], iteration), start, end)
            for number, _, iteration, start, end in self.message_columns.tolist()
            if end > start
        )
        return (*(span for span, _ in self.operations), *transfers)

    @cached_property
    def start(self) -> float:
        """Seconds at which the first span starts; 0 without spans."""
        starts = [table["start"].min() for table in self._tables() if table.size]
        return float(min(starts, default=0.0))

    @cached_property
    def makespan(self) -> float:
        """Seconds from the start of the first span to the end of the last; 0 without spans."""
        ends = [table["end"].max() for table in self._tables() if table.size]
        return float(max(ends, default=0.0)) - self.start

    def _tables(self) -> tuple[Columns, Columns]:
        return self.op_columns, self.message_columns

    @cached_property
    def operations(self) -> tuple[tuple[Span, Op], ...]:
        """Spans that are operations, with their operation, by start.

        The end decides between an operation that takes no time and what follows it.
        """
        table = self.op_columns
        programs = [
            list(self.schedule.ticks(worker, self.iterations))
            for worker in range(len(self.schedule.workers))
        ]
        lanes = [worker_lane(self.schedule, worker) for worker in range(len(programs))]
        order = np.lexsort((table["position"], table["iteration"], table["end"], table["start"]))
        found = []
        for worker, position, iteration, start, end in table[order].tolist():
            op = programs[worker][iteration][position]
            assert op is not None
            found.append((op_span(lanes[worker], op, start, end), op))
        return tuple(found)

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
        graph = event_graph(self.schedule)
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
        table = self._within(ticks)
        at = (table["lane"], table["iteration"] - ticks.start)
        np.add.at(busy, at, table["end"] - table["start"])
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
        table = self._within(ticks)
        np.maximum.at(completed, table["iteration"] - ticks.start, table["end"])
        found: NDArray[np.float64] = completed[np.isfinite(completed)]
        return found

    def _within(self, ticks: range) -> Columns:
        """The operations of these iterations."""
        table = self.op_columns
        return table[(table["iteration"] >= ticks.start) & (table["iteration"] < ticks.stop)]

    def _starts(self, stop: int) -> NDArray[np.float64]:
        """Start times, a row per steady iteration below ``stop`` and a column per event."""
        first = self.schedule.num_ticks(0)
        bodies = [len(body) for body in self.schedule.workers]
        offset = np.cumsum([0, *bodies])
        rows = np.full((max(0, stop - first), offset[-1] + len(channels(self.schedule))), np.nan)
        operations, transfers = self._tables()  # a link's backlog is part of the state
        for table, column in (
            (operations, offset[operations["lane"]] + operations["position"]),
            (transfers, offset[-1] + transfers["lane"]),
        ):
            inside = (table["iteration"] >= first) & (table["iteration"] < stop)
            rows[table["iteration"][inside] - first, column[inside]] = table["start"][inside]
        gaps = np.flatnonzero(np.isnan(rows).any(axis=1))  # the last messages may stay unsent
        return rows[: gaps[0]] if gaps.size else rows
