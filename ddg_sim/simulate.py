"""The discrete-event simulator: every worker walks its lowered program, on SimPy.

It is the reference: it walks the same loop bodies as the executors (`lowering.bodies`), and what
waits for what comes out of the run. `cycletime` computes the same times independently, where the
order of everything is known beforehand; on shared buses only the simulation knows it.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterator

import simpy

from ddg_sim.costs import Costs
from ddg_sim.draws import durations
from ddg_sim.eventgraph import (
    check_stages,
    event_graph,
    existence,
    shares_cores,
    takes_place,
)
from ddg_sim.lowering import Channel, Place, bodies, channels, message_of
from ddg_sim.network import Bus, Network, Sharing
from ddg_sim.schedule import OpKind, Schedule, ScheduleError
from ddg_sim.timeline import Timeline, columns

#: Iterations of a run whose slope is taken for the period.
LONG = 100

Process = Generator[simpy.Event, object, None]


class SteadyStateError(RuntimeError):
    """A simulation that did not reach its steady state within the allowed iterations."""


def simulate(
    schedule: Schedule,
    costs: Costs,
    iterations: int,
    drain: bool = True,
    seed: int = 0,
    run: int = 0,
) -> Timeline:
    """Simulate a run of ``iterations`` iterations.

    An operation takes its duration, a receive waits for its message, a send hands the message to
    the directed link between the two workers and returns at once, a barrier waits for everyone.
    A link carries one message at a time, first come first served, while the workers compute;
    `network.Network` says otherwise. Where there are fewer cores than workers, C cores give each of
    n operations that run C/n of a core: a scheduler with short time slices, which costs nothing
    itself; who waits uses no core, and messages need none. Replicas run the same program and meet
    at each all-reduce; the timeline is that of the first.

    Args:
        schedule: a valid schedule.
        costs: seconds, for the same number of stages.
        iterations: iterations of samples that are fed.
        drain: whether to go on until all samples are used everywhere.
        seed: of the draws, where times vary.
        run: which of the seed's runs.

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
    env = simpy.Environment(initial_time=0.0)
    graph = event_graph(schedule)
    times = durations(graph, costs, iterations, seed, range(run, run + 1))
    meeting = _Meeting(env, schedule.replicas)
    cores = _Fair(env, costs.cores) if costs.cores and shares_cores(schedule, costs) else None
    replicas = [
        _Replica(
            env,
            schedule,
            [time if isinstance(time, float) else time[:, 0, r].tolist() for time in times],
            costs.network,
            iterations,
            drain,
            meeting,
            cores,
        )
        for r in range(schedule.replicas)
    ]
    processes = [
        env.process(replica.work(worker))
        for replica in replicas
        for worker in range(len(schedule.workers))
    ]
    env.run()
    if any(process.is_alive for process in processes):
        waiting = "; ".join(waits for replica in replicas for waits in replica.waiting())
        raise ScheduleError(f"deadlock after {env.now:g} s: {waiting}")
    first = replicas[0]
    operations = [
        (worker, position, place.ticks, place.starts, place.ends)
        for worker, body in enumerate(first.bodies)
        for position, place in enumerate(body)
    ]
    transfers = [
        (stream.channel.number, 0, stream.ticks, stream.starts, stream.ends)
        for stream in first.streams
    ]
    # With shared cores the drain reaches back: who is done leaves them to the others.
    repeats = not costs.random and cores is None
    return Timeline(schedule, iterations, columns(operations), columns(transfers), repeats)


Seconds = float | list[float]  # always the same, or per iteration


class _Stream:
    """The messages of one channel: which have arrived, and who waits for the next one."""

    __slots__ = (
        "arrived", "channel", "ends", "link", "needed", "seconds", "starts", "ticks", "travels",
        "waiters",
    )  # fmt: skip

    def __init__(self, channel: Channel, needed: range, ticks: range, seconds: Seconds) -> None:
        self.channel = channel
        self.needed = needed  # the iterations whose message somebody waits for
        self.ticks = ticks  # the iterations in which a message is sent
        self.seconds = seconds
        self.arrived = ticks.start  # all messages sent in earlier iterations are there
        self.waiters: list[tuple[int, simpy.Event]] = []
        self.travels = channel.dependency.travels
        self.link: _Link
        self.starts, self.ends = array("d"), array("d")

    def arrive(self, _: object = None) -> None:
        self.arrived += 1
        if self.waiters:
            for tick, event in self.waiters:
                if tick < self.arrived:
                    event.succeed()
            self.waiters = [waiter for waiter in self.waiters if waiter[0] >= self.arrived]

    def until(self, event: simpy.Event, tick: int) -> simpy.Event:
        """Let ``event`` happen when the message sent in ``tick`` has arrived."""
        self.waiters.append((tick, event))
        return event


class _Place:
    """A place in a loop body while it is simulated; see `lowering.Place`."""

    __slots__ = (
        "barrier", "ends", "incoming", "meets", "outgoing", "seconds", "starts", "ticks"
    )  # fmt: skip

    def __init__(
        self, place: Place, ticks: range, seconds: Seconds, streams: list[_Stream]
    ) -> None:
        self.ticks = ticks
        self.seconds = seconds
        self.incoming = [(streams[c.number], c.dependency.tokens) for c in place.incoming]
        self.outgoing = [streams[c.number] for c in place.outgoing]
        self.barrier = place.barrier
        self.meets = place.template.kind is OpKind.ALL_REDUCE
        self.starts, self.ends = array("d"), array("d")


class _Replica:
    """One copy of all workers, with its links and barriers."""

    def __init__(
        self,
        env: simpy.Environment,
        schedule: Schedule,
        times: list[Seconds],
        network: Network,
        iterations: int,
        drain: bool,
        meeting: _Meeting,
        cores: _Fair | None,
    ) -> None:
        self.env = env
        self.schedule = schedule
        self.ticks = schedule.num_ticks(iterations, drain)
        self.meeting = meeting
        self.cores = cores
        self.blocking = network.blocking
        graph = event_graph(schedule)
        needed = existence(graph, iterations)
        happens = takes_place(graph, iterations, drain)
        first = sum(map(len, schedule.workers))  # operations come first, then transfers, barriers
        self.streams = [
            _Stream(channel, needed[at], happens[at], times[at])
            for at, channel in enumerate(channels(schedule), start=first)
        ]
        self.barrier_times = times[first + len(self.streams) :]
        operations = zip(happens, times, strict=True)
        self.bodies = [
            [_Place(place, *next(operations), self.streams) for place in body]
            for body in bodies(schedule)
        ]
        self._waits: dict[int, tuple[_Stream, int] | str] = {}
        self._barriers: dict[tuple[int, int], tuple[simpy.Event, list[int]]] = {}
        self._links = _Links(env, network, self.streams)

    def waiting(self) -> Iterator[str]:
        """Per worker that waits, what for."""
        for worker, what in sorted(self._waits.items()):
            if not isinstance(what, str):
                stream, tick = what
                what = str(message_of(self.schedule, stream.channel, tick))
            yield f"worker {worker} waits for {what}"

    def work(self, worker: int) -> Process:
        """Walk the program of one worker.

        Its clock ``now`` may be ahead of the simulation's: operations that nobody else can see
        need no event. Before others can (a meeting, a shared medium) the simulation catches up.
        """
        env, timeout, send, waits = self.env, self.env.timeout, self._links.send, self._waits
        now = 0.0
        for tick in range(self.ticks):
            for position, place in enumerate(self.bodies[worker]):
                for stream, tokens in place.incoming:
                    sent = tick - tokens
                    if sent >= stream.arrived and sent in stream.needed:
                        waits[worker] = (stream, sent)
                        yield stream.until(env.event(), sent)
                        del waits[worker]
                        now = max(now, env.now)
                if tick in place.ticks:
                    if place.meets:
                        yield timeout(now - env.now)
                        waits[worker] = "its replicas"
                        yield self.meeting.come((worker, position, tick))
                        del waits[worker]
                        now = env.now
                    seconds = place.seconds
                    if isinstance(seconds, list):
                        seconds = seconds[tick]
                    if self.cores is not None:
                        yield timeout(now - env.now)
                        place.starts.append(now)
                        yield self._compute(self.cores, seconds)
                        now = env.now
                    else:
                        place.starts.append(now)
                        now += seconds
                    place.ends.append(now)
                    for stream in place.outgoing:
                        if tick in stream.ticks:
                            if stream.link.medium is not None:
                                yield timeout(now - env.now)
                            send(stream, tick, now)
                    if self.blocking:
                        for stream in place.outgoing:
                            if stream.arrived <= tick and tick in stream.ticks:
                                yield stream.until(env.event(), tick)
                        now = max(now, env.now)
                if place.barrier is not None:
                    yield timeout(now - env.now)
                    waits[worker] = f"barrier {place.barrier} of iteration {tick}"
                    yield self._meet(worker, place.barrier, tick)
                    del waits[worker]
                    now = env.now
        yield timeout(now - env.now)

    def _compute(self, cores: _Fair, seconds: float) -> simpy.Event:
        """Happens when an operation that alone takes so long has had its share of the cores."""
        ended = self.env.event()
        cores.carry(seconds, lambda: None, lambda: _succeed(ended))
        return ended

    def _meet(self, worker: int, barrier: int, tick: int) -> simpy.Event:
        everyone, present = self._barriers.setdefault((barrier, tick), (self.env.event(), []))
        present.append(worker)
        if len(present) == len(self.bodies):
            del self._barriers[barrier, tick]
            seconds = self.barrier_times[barrier]
            release = self.env.timeout(seconds[tick] if isinstance(seconds, list) else seconds)
            release.callbacks.append(lambda _: _succeed(everyone))
        return everyone


def _succeed(event: simpy.Event) -> None:
    event.succeed()


class _Meeting:
    """Where the replicas of an operation wait for one another."""

    def __init__(self, env: simpy.Environment, replicas: int) -> None:
        self._env, self._replicas = env, replicas
        self._open: dict[tuple[int, int, int], tuple[simpy.Event, list[None]]] = {}

    def come(self, where: tuple[int, int, int]) -> simpy.Event:
        everyone, present = self._open.setdefault(where, (self._env.event(), []))
        present.append(None)
        if len(present) == self._replicas:
            del self._open[where]
            everyone.succeed()
        return everyone


# --- Links --------------------------------------------------------------------------------------


class _Link:
    """A directed link between two workers: one message at a time, in order."""

    __slots__ = ("busy", "free", "medium", "pending")

    def __init__(self) -> None:
        self.free = 0.0  # when it is, on a link that shares nothing
        self.busy = False
        self.pending: deque[tuple[_Stream, float]] = deque()
        self.medium: _Medium | None = None  # what it shares with others


class _Links:
    """Hands messages to links, and links to the media that carry them."""

    def __init__(self, env: simpy.Environment, network: Network, streams: list[_Stream]) -> None:
        self._env = env
        links: dict[tuple[int, int, Bus | None], _Link] = {}
        media: dict[Bus, _Medium] = {}
        for stream in streams:
            edge, ends = stream.channel.dependency, (stream.channel.source, stream.channel.target)
            bus = next((bus for bus in network.buses if ends in bus.links), None)
            if bus is not None and bus not in media:
                media[bus] = MEDIA[bus.sharing](env)
            workers = edge.source.worker, edge.target.worker, bus
            stream.link = links.setdefault(workers, _Link()) if stream.travels else _Link()
            if bus is not None and stream.travels:
                stream.link.medium = media[bus]

    def send(self, stream: _Stream, tick: int, now: float) -> None:
        """Hand over, at time ``now``, the message sent in ``tick``."""
        link, seconds = stream.link, stream.seconds
        if isinstance(seconds, list):
            seconds = seconds[tick]
        if link.medium is not None:
            link.pending.append((stream, seconds))
            self._next(link, link.medium)
            return
        start = end = now
        if stream.travels:  # else it stays within a stage, or is a mere signal
            start = link.free if link.free > now else now
            link.free = end = start + seconds
        stream.starts.append(start)
        stream.ends.append(end)
        if end > self._env.now:
            self._env.timeout(end - self._env.now).callbacks.append(stream.arrive)
        else:
            stream.arrive()

    def _next(self, link: _Link, medium: _Medium) -> None:
        """Hand the next transfer of a link to a shared medium.

        Where all share equally, a link still carries one message at a time; a queue keeps order.
        """
        if not link.pending or (link.busy and isinstance(medium, _Fair)):
            return
        link.busy = True
        stream, seconds = link.pending.popleft()

        def done() -> None:
            stream.ends.append(self._env.now)
            link.busy = False
            stream.arrive()
            self._next(link, medium)

        medium.carry(seconds, lambda: stream.starts.append(self._env.now), done)


Callback = Callable[[], None]


class _Fifo:
    """A medium that carries one transfer after the other."""

    def __init__(self, env: simpy.Environment) -> None:
        self._env = env
        self._waiting: deque[tuple[float, Callback, Callback]] = deque()
        self._busy = False

    def carry(self, seconds: float, begin: Callback, done: Callback) -> None:
        self._waiting.append((seconds, begin, done))
        if not self._busy:
            self._next()

    def _next(self) -> None:
        if self._waiting:
            self._busy = True
            seconds, begin, done = self._waiting.popleft()
            begin()
            self._env.timeout(seconds).callbacks.append(lambda _: self._end(done))

    def _end(self, done: Callback) -> None:
        self._busy = False
        done()
        if not self._busy:
            self._next()


class _Fair:
    """What all that use it share equally (processor sharing): a medium, or ``width`` cores."""

    def __init__(self, env: simpy.Environment, width: int = 1) -> None:
        self._env = env
        self._width = width
        self._left: dict[Callback, float] = {}  # seconds that it would still take alone
        self._since = 0.0
        self._turn = 0

    def carry(self, seconds: float, begin: Callback, done: Callback) -> None:
        self._progress()
        begin()
        self._left[done] = seconds
        self._plan()

    def _progress(self) -> None:
        elapsed, self._since = self._env.now - self._since, self._env.now
        for done in self._left:
            self._left[done] -= elapsed * self._rate()

    def _rate(self) -> float:
        return min(1.0, self._width / len(self._left))

    def _plan(self) -> None:
        """Wake up when the first transfer ends, if nothing changes before."""
        self._turn += 1
        if self._left:
            first = min(self._left, key=lambda done: self._left[done])
            timer = self._env.timeout(max(0.0, self._left[first]) / self._rate())
            turn = self._turn
            timer.callbacks.append(lambda _: self._end(first, turn))

    def _end(self, done: Callback, turn: int) -> None:
        if turn == self._turn:
            self._progress()
            del self._left[done]
            self._plan()
            done()


_Medium = _Fifo | _Fair
MEDIA: dict[Sharing, Callable[[simpy.Environment], _Medium]] = {
    Sharing.FIFO: _Fifo,
    Sharing.FAIR: _Fair,
}


def steady_period(schedule: Schedule, costs: Costs, max_iterations: int = 4096) -> float:
    """Exact steady-state seconds per iteration, by simulating until the run repeats itself.

    Where workers share cores, the robust slope of a run of `LONG` iterations.

    Raises:
        SteadyStateError: if it does not within ``max_iterations``; `cycletime.cycle_time` gives
            the period without simulating.

    >>> from ddg_sim.costs import costs
    >>> from ddg_sim.methods import bp, ddg
    >>> steady_period(bp(4), costs(4)), steady_period(ddg(4), costs(4))
    (12.0, 3.0)
    """
    iterations = 2 * schedule.num_ticks(0) + 16
    if shares_cores(schedule, costs):
        return simulate(schedule, costs, LONG + iterations).period
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
