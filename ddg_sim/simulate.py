"""The discrete-event simulator: every worker walks its lowered program, on SimPy.

It runs exactly the instructions that the executors run, and so is the reference; `cycletime`
computes the same times independently.
"""

from __future__ import annotations

from collections.abc import Generator

import simpy

from ddg_sim.costs import Costs
from ddg_sim.eventgraph import check_stages
from ddg_sim.lowering import Barrier, Message, Receive, Send, channels, instructions
from ddg_sim.schedule import Op, Schedule, ScheduleError
from ddg_sim.timeline import Span, Timeline, message_span, op_span, worker_lane

Process = Generator[simpy.Event, object, None]


class SteadyStateError(RuntimeError):
    """A simulation that did not reach its steady state within the allowed iterations."""


def simulate(schedule: Schedule, costs: Costs, iterations: int, drain: bool = True) -> Timeline:
    """Simulate a run of ``iterations`` iterations.

    An operation takes its duration, a receive waits for its message, a send hands the message to
    the directed link between the two workers and returns at once, a barrier waits for everyone.
    A link carries one message at a time, first come first served, while the workers compute.
    Transfers that take no time leave no span.

    Args:
        schedule: a valid schedule.
        costs: seconds, for the same number of stages.
        iterations: iterations of samples that are fed.
        drain: whether to go on until all samples are used everywhere.

    Raises:
        ScheduleError: if workers wait for one another for ever; names what waits for what.
        ValueError: if the costs are for another number of stages.

    >>> from ddg_sim.costs import costs
    >>> from ddg_sim.methods import ddg
    >>> run = simulate(ddg(2), costs(2, comm=0.5), iterations=2)
    >>> for span in sorted(run.spans, key=lambda span: span.lane):
    ...     if span.duration > 0:
    ...         print(span.lane, span.label, span.start, span.end)
    link 1→2 activation 0 1.0 1.5
    link 1→2 activation 1 2.0 2.5
    link 2→1 gradient 0 4.5 5.0
    link 2→1 gradient 1 7.5 8.0
    stage 1 F0 0.0 1.0
    stage 1 F1 1.0 2.0
    stage 1 B0 5.0 7.0
    stage 1 B1 8.0 10.0
    stage 2 F0 1.5 2.5
    stage 2 B0 2.5 4.5
    stage 2 F1 4.5 5.5
    stage 2 B1 5.5 7.5
    """
    check_stages(schedule, costs)
    run = _Run(schedule, costs)
    workers = range(len(schedule.workers))
    processes = [run.env.process(run.worker(worker, iterations, drain)) for worker in workers]
    run.env.run()
    if any(process.is_alive for process in processes):
        waiting = "; ".join(
            f"worker {worker} waits for {run.waits[worker]}" for worker in run.waits
        )
        raise ScheduleError(f"deadlock after {run.env.now:g} s: {waiting}")
    return Timeline(schedule, iterations, tuple(run.spans), deterministic=True)


class _Run:
    """State of one simulation: the links, the messages and barriers, what is waited for."""

    def __init__(self, schedule: Schedule, costs: Costs) -> None:
        self.schedule = schedule
        self.costs = costs
        self.env = simpy.Environment(initial_time=0.0)
        self.spans: list[Span] = []
        self.waits: dict[int, str] = {}
        self._ends = {
            (channel.relation, channel.source, channel.target): (
                channel.dependency.source.worker,
                channel.dependency.target.worker,
            )
            for channel in channels(schedule)
        }
        self._arrived: dict[Message, simpy.Event] = {}
        self._links: dict[tuple[int, int], simpy.Store] = {}
        self._barriers: dict[int, tuple[simpy.Event, list[int]]] = {}

    def worker(self, worker: int, iterations: int, drain: bool) -> Process:
        """Walk the program of one worker."""
        lane = worker_lane(self.schedule, worker)
        for step in instructions(self.schedule, worker, iterations, drain):
            match step:
                case Op():
                    start = self.env.now
                    yield self.env.timeout(self.costs.duration(step.kind, step.stage))
                    self.spans.append(op_span(lane, step, start, self.env.now))
                case Receive():
                    self.waits[worker] = f"{step.message}"
                    yield self._arrival(step.message)
                    del self.waits[worker]
                    del self._arrived[step.message]
                case Send():
                    self._send(step.message)
                case Barrier():
                    self.waits[worker] = f"barrier {step.number}"
                    yield self._meet(worker, step.number)
                    del self.waits[worker]

    def _arrival(self, message: Message) -> simpy.Event:
        return self._arrived.setdefault(message, self.env.event())

    def _send(self, message: Message) -> None:
        ends = self._ends[message.relation, message.source, message.target]
        if ends not in self._links:
            self._links[ends] = simpy.Store(self.env)
            self.env.process(self._carry(self._links[ends]))
        self._links[ends].put(message)

    def _carry(self, queue: simpy.Store) -> Process:
        """A directed link: one message at a time, first come first served."""
        while True:
            message = yield queue.get()
            assert isinstance(message, Message)
            start = self.env.now
            seconds = self.costs.transfer(message.relation, message.source, message.target)
            if seconds > 0:
                yield self.env.timeout(seconds)
                self.spans.append(message_span(message, start, self.env.now))
            self._arrival(message).succeed()

    def _meet(self, worker: int, number: int) -> simpy.Event:
        everyone, present = self._barriers.setdefault(number, (self.env.event(), []))
        present.append(worker)
        if len(present) == len(self.schedule.workers):
            del self._barriers[number]
            self.env.process(self._release(everyone))
        return everyone

    def _release(self, everyone: simpy.Event) -> Process:
        yield self.env.timeout(self.costs.barrier)
        everyone.succeed()


def steady_period(schedule: Schedule, costs: Costs, max_iterations: int = 4096) -> float:
    """Exact steady-state seconds per iteration, by simulating until the run repeats itself.

    Raises:
        SteadyStateError: if it does not within ``max_iterations``; `cycletime.cycle_time` gives
            the period without simulating.

    >>> from ddg_sim.costs import costs
    >>> from ddg_sim.methods import bp, ddg
    >>> steady_period(bp(4), costs(4)), steady_period(ddg(4), costs(4))
    (12.0, 3.0)
    """
    iterations = 2 * schedule.num_ticks(0) + 16
    while True:
        iterations = min(iterations, max_iterations)
        regime = simulate(schedule, costs, iterations, drain=True).regime
        if regime is not None:
            return regime.period
        if iterations == max_iterations:
            raise SteadyStateError(
                f"{schedule.method}: no steady state within max_iterations={max_iterations};"
                " cycle_time computes the period without simulating"
            )
        iterations *= 2
