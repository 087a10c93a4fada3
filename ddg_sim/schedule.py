"""A training method as data: a periodic schedule of forward, backward and update operations.

A schedule is what compilers call a modulo schedule. Per worker it holds an ordered list of
operation templates; template ``B0(t-2)`` says "in every iteration t, run the backward pass of
stage 0 on sample t-2". Everything else (the unrolled programs, the weight versions that are read,
the staleness) follows from the templates and from one `Rule` (`ddg_sim.rule`).

The simulator times this object, `theory` iterates it and `ddg_gpu` executes it. No times live here.
Stages, workers, samples, iterations and versions all count from 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from ddg_sim.rule import Jacobian, Rule


class ScheduleError(ValueError):
    """A schedule that cannot be run; the message names the offending operation."""


class OpKind(Enum):
    """What an operation does; the value is its letter in rendered schedules."""

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
    RECOMPUTE = "R"
    UPDATE = "U"
    ALL_REDUCE = "A"

    @property
    def noun(self) -> str:
        """Its name in reports and pictures.

        >>> OpKind.BACKWARD_INPUT.noun
        'input gradient'
        """
        special = {"BACKWARD_INPUT": "input gradient", "BACKWARD_WEIGHT": "weight gradient"}
        return special.get(self.name, self.name.lower().replace("_", "-"))


class Sync(Enum):
    """What a worker waits for beyond the data its next operation needs.

    Synchronisation changes when an operation runs, never which sample and version it uses.
    """

    #: Nothing: an operation starts as soon as its inputs are there.
    NONE = "none"
    #: All workers meet after the forward operations, and again at the end, of every iteration.
    BARRIER = "barrier"
    #: Everything an iteration needs is received before its first operation (one-slot mailboxes
    #: with a blocking receive at the end of the loop, as in the released DDG code).
    MAILBOX = "mailbox"


@dataclass(frozen=True, slots=True)
class Op:
    """One operation of an unrolled program.

    ``version`` is the version of the stage's weights that is read (produced, for U); a version is
    the number of updates the stage has had.

    >>> print(Op(OpKind.FORWARD, stage=1, iteration=5, sample=4, version=3))
    F1(4)v3@5
    """

    kind: OpKind
    stage: int
    iteration: int
    sample: int
    version: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.stage}({self.sample})v{self.version}@{self.iteration}"


@dataclass(frozen=True, slots=True)
class OpTemplate:
    """An operation of the loop body: in iteration t it acts on sample ``m*t + sample``.

    m is the schedule's ``samples_per_iteration``. ``version_lag`` > 0 makes a forward pass read
    weights that are that many updates older than the newest.

    >>> print(OpTemplate(OpKind.BACKWARD, stage=0, sample=-2))
    B0(t-2)
    """

    kind: OpKind
    stage: int
    sample: int = 0
    version_lag: int = 0

    def __str__(self) -> str:
        return self.text()

    def text(self, samples_per_iteration: int = 1) -> str:
        """Render for a schedule that takes ``samples_per_iteration`` samples per iteration."""
        t = "t" if samples_per_iteration == 1 else f"{samples_per_iteration}t"
        offset = f"{self.sample:+d}" if self.sample else ""
        lag = f"v-{self.version_lag}" if self.version_lag else ""
        return f"{self.kind.value}{self.stage}({t}{offset}){lag}"


def forward(stage: int, sample: int = 0, version_lag: int = 0) -> OpTemplate:
    """Template of a forward pass of ``stage`` on sample ``m*t + sample``.

    >>> print(forward(1, sample=-1))
    F1(t-1)
    """
    return OpTemplate(OpKind.FORWARD, stage, sample, version_lag)


def recompute(stage: int, sample: int = 0) -> OpTemplate:
    """Template of a second forward pass, on the stored input of the sample.

    >>> print(recompute(0, sample=-1))
    R0(t-1)
    """
    return OpTemplate(OpKind.RECOMPUTE, stage, sample)


def backward(stage: int, sample: int = 0) -> OpTemplate:
    """Template of a backward pass (gradients of weights and of the input).

    >>> print(backward(0, sample=-1))
    B0(t-1)
    """
    return OpTemplate(OpKind.BACKWARD, stage, sample)


def backward_input(stage: int, sample: int = 0) -> OpTemplate:
    """Template of the first half of a backward pass: the gradient of the input.

    >>> print(backward_input(0, sample=-1))
    I0(t-1)
    """
    return OpTemplate(OpKind.BACKWARD_INPUT, stage, sample)


def backward_weight(stage: int, sample: int = 0) -> OpTemplate:
    """Template of the second half of a backward pass: the gradient of the weights.

    >>> print(backward_weight(0, sample=-1))
    W0(t-1)
    """
    return OpTemplate(OpKind.BACKWARD_WEIGHT, stage, sample)


def update(stage: int, sample: int = 0) -> OpTemplate:
    """Template of a weight update with the gradients of all samples up to ``m*t + sample``.

    >>> print(update(0, sample=-1))
    U0(t-1)
    """
    return OpTemplate(OpKind.UPDATE, stage, sample)


def all_reduce(stage: int, sample: int = 0) -> OpTemplate:
    """Template of the mean, over all replicas, of the gradients that the update needs.

    >>> print(all_reduce(0, sample=-1))
    A0(t-1)
    """
    return OpTemplate(OpKind.ALL_REDUCE, stage, sample)


@dataclass(frozen=True, slots=True)
class Schedule:
    """A periodic schedule: what every worker runs in every iteration, in this order.

    An operation whose sample does not exist is skipped. That is the whole warm-up rule (samples
    below 0) and the whole drain rule (samples that were never fed).

    A stage may have its forward passes on one worker and everything else on another. Then a
    forward pass of iteration t reads what iterations before t have produced.

    Args:
        method: name of the training method, without spaces.
        num_stages: number of stages K >= 1.
        workers: per worker its loop body; usually worker k holds stage k.
        sync: what workers wait for beyond data.
        rule: what the method does to the numbers.
        samples_per_iteration: samples (micro-batches) m >= 1 that enter per iteration.
        replicas: copies of all workers that train on different samples; those of a stage meet at
            its all-reduce operation.
        queue: most activations that a stage may be ahead of the next one; 0 sets no limit beyond
            the errors that it waits for.
    """

    method: str
    num_stages: int
    workers: tuple[tuple[OpTemplate, ...], ...]
    sync: Sync = Sync.NONE
    rule: Rule = Rule()
    samples_per_iteration: int = 1
    replicas: int = 1
    queue: int = 0

    def __str__(self) -> str:
        from ddg_sim.notation import render  # which reads and writes what is defined here

        return render(self)

    def worker_of(self, stage: int, kind: OpKind = OpKind.UPDATE) -> int:
        """Index of the worker that runs the operations of that kind of ``stage``.

        >>> from ddg_sim.methods import ddg, pd_asgd
        >>> ddg(3).worker_of(2)
        2
        >>> pd_asgd(3).worker_of(2), pd_asgd(3).worker_of(2, OpKind.FORWARD)
        (1, 0)
        """
        for worker, body in enumerate(self.workers):
            if any(template.stage == stage and template.kind is kind for template in body):
                return worker
        raise ScheduleError(f"stage {stage} has no {kind.noun} operation on any worker")

    def sample_of(self, template: OpTemplate, iteration: int) -> int:
        """Sample on which ``template`` acts in ``iteration`` (it may not exist).

        >>> from ddg_sim.methods import ddg
        >>> ddg(3).sample_of(backward(0, -2), iteration=5)
        3
        """
        return self.samples_per_iteration * iteration + template.sample

    def num_ticks(self, iterations: int, drain: bool = True) -> int:
        """Ticks of a run that is fed ``iterations`` iterations of samples.

        Without ``drain`` the run stops with samples in flight; with it, it goes on until every
        sample has been used by every stage.

        >>> from ddg_sim.methods import ddg
        >>> ddg(3).num_ticks(10), ddg(3).num_ticks(10, drain=False)
        (12, 10)
        """
        if not drain:
            return iterations
        lag = max(-(template.sample // self.samples_per_iteration) for template in self.templates())
        return iterations + max(0, lag)

    def templates(self) -> Iterator[OpTemplate]:
        """All templates, worker by worker.

        >>> from ddg_sim.methods import bp
        >>> [str(template) for template in bp(1).templates()]
        ['F0(t)', 'B0(t)', 'U0(t)']
        """
        for body in self.workers:
            yield from body

    def ticks(
        self, worker: int, iterations: int, drain: bool = True, start: int = 0
    ) -> Iterator[tuple[Op | None, ...]]:
        """Unroll a worker's program tick by tick: per template its Op, or None where skipped.

        The first tick is ``start``.

        >>> from ddg_sim.methods import ddg
        >>> for tick in ddg(2).ticks(0, iterations=2):
        ...     print(*tick)
        F0(0)v0@0 None None
        F0(1)v0@1 B0(0)v0@1 U0(0)v1@1
        None B0(1)v0@2 U0(1)v2@2
        """
        body, m = self.workers[worker], self.samples_per_iteration
        readings = _readings(self, worker)
        total = iterations * m
        for iteration in range(start, self.num_ticks(iterations, drain)):
            ops: list[Op | None] = []
            for template, reading in zip(body, readings, strict=True):
                sample = m * iteration + template.sample
                if 0 <= sample < total:
                    version = reading.version(iteration, iterations)
                    ops.append(Op(template.kind, template.stage, iteration, sample, version))
                else:
                    ops.append(None)
            yield tuple(ops)

    def program(self, worker: int, iterations: int, drain: bool = True) -> Iterator[Op]:
        """Unroll a worker's program, lazily, without the skipped operations.

        >>> from ddg_sim.methods import ddg
        >>> print(*ddg(2).program(1, iterations=2))
        F1(0)v0@0 B1(0)v0@0 U1(0)v1@0 F1(1)v1@1 B1(1)v1@1 U1(1)v2@1
        """
        for tick in self.ticks(worker, iterations, drain):
            yield from (op for op in tick if op is not None)


@dataclass(frozen=True, slots=True)
class _Reading:
    """Which version an operation reads: in iteration t there have been t - ``since`` updates.

    ``lag`` is how many updates older than the newest it reads. ``since`` None: never an update.
    """

    since: int | None
    lag: int = 0

    def version(self, iteration: int, iterations: int) -> int:
        """Version in ``iteration`` of a run that is fed ``iterations`` iterations."""
        if self.since is None:
            return 0
        return max(0, min(max(0, iteration - self.since), iterations) - self.lag)


_Place = tuple[int, int, OpTemplate]  # worker, position in its loop body, template


def _places(schedule: Schedule, worker: int | None = None) -> dict[tuple[OpKind, int, int], _Place]:
    """Forward (per sample of a group) and update operations of all stages, or of a worker's."""
    m, table = schedule.samples_per_iteration, {}
    for index, body in enumerate(schedule.workers):
        if worker in (None, index):
            for position, template in enumerate(body):
                key = (template.kind, template.stage, template.sample % m)
                if template.kind in (OpKind.FORWARD, OpKind.UPDATE):
                    table[key] = (index, position, template)
    return table


def _reading(schedule: Schedule, place: _Place, update: _Place | None) -> _Reading:
    """What an operation reads that takes the newest weights there are at its place."""
    if update is None:
        return _Reading(None)
    m, (worker, position, template) = schedule.samples_per_iteration, place
    first = -(update[2].sample // m)  # iteration of the first update
    earlier = update[0] == worker and update[1] < position  # in the same iteration
    lag = template.version_lag if template.kind is OpKind.FORWARD else 0
    return _Reading(first - earlier, lag)


def _readings(schedule: Schedule, worker: int) -> list[_Reading]:
    """Per operation of a worker's loop body what it reads (an update: what it produces)."""
    m, body = schedule.samples_per_iteration, schedule.workers[worker]
    places = _places(schedule, worker)
    stages = {template.stage for template in body}
    here = {(kind, stage) for kind, stage, _ in places}
    if any((kind, stage) not in here for stage in stages for kind in _SPLIT):
        places = _places(schedule)
    found = []
    for position, template in enumerate(body):
        stage = template.stage
        update = places.get((OpKind.UPDATE, stage, m - 1))
        forward = places.get((OpKind.FORWARD, stage, template.sample % m))
        newest = _reading(schedule, (worker, position, template), update)
        stashes = schedule.rule.jacobian is Jacobian.STASHED and template.kind in _DIFFERENTIATES
        if template.kind is OpKind.UPDATE and newest.since is not None:
            newest = _Reading(newest.since - 1)
        elif stashes and forward is not None:
            read = _reading(schedule, forward, update)
            later = (forward[2].sample - template.sample) // m  # iterations since the forward pass
            newest = _Reading(None if read.since is None else read.since + later, read.lag)
        found.append(newest)
    return found


_SPLIT = (OpKind.FORWARD, OpKind.UPDATE)
_DIFFERENTIATES = (
    OpKind.RECOMPUTE,
    OpKind.BACKWARD,
    OpKind.BACKWARD_INPUT,
    OpKind.BACKWARD_WEIGHT,
)


def staleness_levels(schedule: Schedule) -> tuple[tuple[int, ...], ...]:
    """Updates between reading the weights and applying the gradient, in steady state.

    Per stage, for every sample of the group that one update uses. An update produces version
    g + 1 from group g, whose sample j was run forward in iteration g + (j - offset)/m.

    >>> from ddg_sim.methods import adl
    >>> staleness_levels(adl(3, accumulate=4))
    ((1, 1, 1, 1), (1, 1, 0, 0), (0, 0, 0, 0))
    """
    m, places = schedule.samples_per_iteration, _places(schedule)
    levels: list[list[int]] = [[] for _ in range(schedule.num_stages)]
    for (kind, stage, sample), place in sorted(places.items(), key=lambda item: item[0][2]):
        if kind is OpKind.FORWARD:
            read = _reading(schedule, place, places.get((OpKind.UPDATE, stage, m - 1)))
            if read.since is not None:
                levels[stage].append(read.since + read.lag - (sample - place[2].sample) // m)
    return tuple(map(tuple, levels))


def staleness(schedule: Schedule) -> tuple[int, ...]:
    """Updates, per stage, between reading the weights and applying the gradient; steady state.

    With several samples per update the oldest read counts, see `staleness_levels`.

    >>> from ddg_sim.methods import bp, ddg
    >>> staleness(bp(3)), staleness(ddg(3))
    ((0, 0, 0), (2, 1, 0))
    """
    return tuple(max(levels, default=0) for levels in staleness_levels(schedule))


def steady_iterations(schedule: Schedule) -> int:
    """Iterations after which versions, staleness and live counts have certainly settled.

    A version read at iteration t was produced at most one delay earlier, and is used at most one
    delay later: two delays, and two iterations to look at.

    >>> from ddg_sim.methods import ddg
    >>> steady_iterations(ddg(4))
    8
    """
    lag = max((template.version_lag for template in schedule.templates()), default=0)
    return 2 * (schedule.num_ticks(0)) + lag + 2
