"""A training method as data: a periodic schedule of forward, backward and update operations.

A schedule is what compilers call a modulo schedule. Per worker it holds an ordered list of
operation templates; template ``B0(t-2)`` says "in every iteration t, run the backward pass of
stage 0 on sample t-2". Everything else (the unrolled programs, the weight versions that are read,
the staleness) follows from the templates and from one `Rule`.

The simulator times this object, `theory` iterates it and `ddg_gpu` executes it. No times live here.
Stages, workers, samples, iterations and versions all count from 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum


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


class Activations(Enum):
    """What a stage keeps of a sample between its forward and its backward pass."""

    GRAPH = "graph"
    INPUT = "input"


class Jacobian(Enum):
    """At which weights a stage differentiates: those the sample saw, or those it has now."""

    STASHED = "stashed"
    CURRENT = "current"


@dataclass(frozen=True, slots=True)
class Rule:
    """What a method does to the numbers, beyond order and delay."""

    activations: Activations = Activations.GRAPH
    jacobian: Jacobian = Jacobian.STASHED


@dataclass(frozen=True, slots=True)
class Op:
    """One operation of an unrolled program.

    ``version`` is the version of the stage's weights that is read (F, B, R) or produced (U); a
    version is the number of updates the stage has had.

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


def update(stage: int, sample: int = 0) -> OpTemplate:
    """Template of a weight update with the gradients of all samples up to ``m*t + sample``.

    >>> print(update(0, sample=-1))
    U0(t-1)
    """
    return OpTemplate(OpKind.UPDATE, stage, sample)


@dataclass(frozen=True, slots=True)
class Schedule:
    """A periodic schedule: what every worker runs in every iteration, in this order.

    An operation whose sample does not exist is skipped. That is the whole warm-up rule (samples
    below 0) and the whole drain rule (samples that were never fed).

    Args:
        method: name of the training method, without spaces.
        num_stages: number of stages K >= 1.
        workers: per worker its loop body; usually worker k holds stage k.
        sync: what workers wait for beyond data.
        rule: what the method does to the numbers.
        samples_per_iteration: samples (micro-batches) m >= 1 that enter per iteration.
    """

    method: str
    num_stages: int
    workers: tuple[tuple[OpTemplate, ...], ...]
    sync: Sync = Sync.NONE
    rule: Rule = Rule()
    samples_per_iteration: int = 1

    def __str__(self) -> str:
        return render(self)

    def worker_of(self, stage: int) -> int:
        """Index of the worker that holds ``stage``.

        >>> from ddg_sim.methods import ddg
        >>> ddg(3).worker_of(2)
        2
        """
        for worker, body in enumerate(self.workers):
            if any(template.stage == stage for template in body):
                return worker
        raise ScheduleError(f"stage {stage} has no operation on any worker")

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
        self, worker: int, iterations: int, drain: bool = True
    ) -> Iterator[tuple[Op | None, ...]]:
        """Unroll a worker's program tick by tick: per template its Op, or None where skipped.

        >>> from ddg_sim.methods import ddg
        >>> for tick in ddg(2).ticks(0, iterations=2):
        ...     print(*tick)
        F0(0)v0@0 None None
        F0(1)v0@1 B0(0)v0@1 U0(0)v1@1
        None B0(1)v0@2 U0(1)v2@2
        """
        body = self.workers[worker]
        newest = {template.stage: 0 for template in body}
        read: dict[tuple[int, int], int] = {}  # (stage, sample) -> version its forward pass read
        total = iterations * self.samples_per_iteration
        for iteration in range(self.num_ticks(iterations, drain)):
            ops: list[Op | None] = []
            for template in body:
                stage, sample = template.stage, self.sample_of(template, iteration)
                if not 0 <= sample < total:
                    ops.append(None)
                    continue
                version = newest[stage]
                if template.kind is OpKind.FORWARD:
                    version = read[stage, sample] = max(0, version - template.version_lag)
                elif template.kind is OpKind.UPDATE:
                    version = newest[stage] = version + 1
                    self._forget(read, stage, sample)
                elif self.rule.jacobian is Jacobian.STASHED:
                    version = read[stage, sample]
                ops.append(Op(template.kind, stage, iteration, sample, version))
            yield tuple(ops)

    def _forget(self, read: dict[tuple[int, int], int], stage: int, sample: int) -> None:
        """Drop what was noted for the samples of an update, so that unrolling stays lazy."""
        for used in range(sample - self.samples_per_iteration + 1, sample + 1):
            read.pop((stage, used), None)

    def program(self, worker: int, iterations: int, drain: bool = True) -> Iterator[Op]:
        """Unroll a worker's program, lazily, without the skipped operations.

        >>> from ddg_sim.methods import ddg
        >>> print(*ddg(2).program(1, iterations=2))
        F1(0)v0@0 B1(0)v0@0 U1(0)v1@0 F1(1)v1@1 B1(1)v1@1 U1(1)v2@1
        """
        for tick in self.ticks(worker, iterations, drain):
            yield from (op for op in tick if op is not None)


def staleness(schedule: Schedule) -> tuple[int, ...]:
    """Updates, per stage, between reading the weights and applying the gradient; steady state.

    With several samples per update the oldest read counts.

    >>> from ddg_sim.methods import bp, ddg
    >>> staleness(bp(3)), staleness(ddg(3))
    ((0, 0, 0), (2, 1, 0))
    """
    found = [0] * schedule.num_stages
    for worker in range(len(schedule.workers)):
        read: dict[tuple[int, int], int] = {}
        for op in schedule.program(worker, steady_iterations(schedule), drain=False):
            if op.kind is OpKind.FORWARD:
                read[op.stage, op.sample] = op.version
            elif op.kind is OpKind.UPDATE:
                first = op.sample - schedule.samples_per_iteration + 1
                for sample in range(max(0, first), op.sample + 1):
                    age = op.version - 1 - read.pop((op.stage, sample))
                    found[op.stage] = max(found[op.stage], age)
    return tuple(found)


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


# --- Text ---------------------------------------------------------------------------------------

_HEADER = re.compile(
    r"(?P<method>\S+) stages=(?P<stages>\d+) sync=(?P<sync>\w+)"
    r" activations=(?P<activations>\w+) jacobian=(?P<jacobian>\w+) samples=(?P<samples>\d+)"
)
_WORKER = re.compile(r"worker (?P<worker>\d+): (?P<body>.*)")
_TEMPLATE = re.compile(
    r"(?P<kind>[A-Z])(?P<stage>\d+)\((?P<m>\d*)t(?P<sample>[+-]\d+)?\)(v-(?P<lag>\d+))?"
)
_OP = re.compile(
    r"(?P<kind>[A-Z])(?P<stage>\d+)\((?P<sample>\d+)\)v(?P<version>\d+)@(?P<iteration>\d+)"
)


def render(schedule: Schedule) -> str:
    """Render a schedule as text that `parse` reads back.

    >>> from ddg_sim.methods import ddg
    >>> print(render(ddg(3)))
    ddg stages=3 sync=none activations=graph jacobian=stashed samples=1
    worker 0: F0(t) B0(t-2) U0(t-2)
    worker 1: F1(t) B1(t-1) U1(t-1)
    worker 2: F2(t) B2(t) U2(t)
    """
    m = schedule.samples_per_iteration
    lines = [
        f"{schedule.method} stages={schedule.num_stages} sync={schedule.sync.value}"
        f" activations={schedule.rule.activations.value}"
        f" jacobian={schedule.rule.jacobian.value} samples={m}"
    ]
    for worker, body in enumerate(schedule.workers):
        lines.append(f"worker {worker}: " + " ".join(template.text(m) for template in body))
    return "\n".join(lines)


def parse(text: str) -> Schedule:
    """Read a schedule back from its rendered text: ``parse(render(s)) == s``.

    Raises:
        ScheduleError: naming the line, and the word of it, that does not parse.

    >>> from ddg_sim.methods import ddg
    >>> parse(render(ddg(3))) == ddg(3)
    True
    """
    lines = [line.strip() for line in text.strip().splitlines()]
    header = _HEADER.fullmatch(lines[0]) if lines else None
    if header is None:
        raise ScheduleError(f"line 1: expected 'METHOD stages=K sync=…', got {lines[:1]}")
    m = int(header["samples"])
    workers: list[tuple[OpTemplate, ...]] = []
    for number, line in enumerate(lines[1:], start=2):
        match = _WORKER.fullmatch(line)
        if match is None or int(match["worker"]) != len(workers):
            expected = f"worker {len(workers)}: …"
            raise ScheduleError(f"line {number}: expected {expected!r}, got {line!r}")
        workers.append(tuple(_parse_template(word, m, number) for word in match["body"].split()))
    try:
        return Schedule(
            header["method"],
            int(header["stages"]),
            tuple(workers),
            Sync(header["sync"]),
            Rule(Activations(header["activations"]), Jacobian(header["jacobian"])),
            m,
        )
    except ValueError as error:
        raise ScheduleError(f"line 1: {error}") from None


def _parse_template(word: str, samples_per_iteration: int, line: int) -> OpTemplate:
    match = _TEMPLATE.fullmatch(word)
    if match is None or int(match["m"] or 1) != samples_per_iteration:
        raise ScheduleError(f"line {line}: {word!r} is no operation such as 'F0(t)' or 'B1(t-2)'")
    try:
        kind = OpKind(match["kind"])
    except ValueError:
        raise ScheduleError(f"line {line}: {word!r}: unknown kind {match['kind']!r}") from None
    return OpTemplate(kind, int(match["stage"]), int(match["sample"] or 0), int(match["lag"] or 0))


def parse_op(text: str) -> Op:
    """Read an operation back from its text: ``parse_op(str(op)) == op``.

    Raises:
        ScheduleError: if the text is not of the form ``F1(4)v3@5``.

    >>> parse_op("F1(4)v3@5")
    Op(kind=<OpKind.FORWARD: 'F'>, stage=1, iteration=5, sample=4, version=3)
    """
    match = _OP.fullmatch(text)
    if match is None or match["kind"] not in {kind.value for kind in OpKind}:
        raise ScheduleError(f"{text!r} is no operation such as 'F1(4)v3@5'")
    return Op(
        OpKind(match["kind"]),
        stage=int(match["stage"]),
        iteration=int(match["iteration"]),
        sample=int(match["sample"]),
        version=int(match["version"]),
    )


def grid(schedule: Schedule, iterations: int, drain: bool = True) -> str:
    """Draw the unrolled schedule: a row per worker, a column per iteration.

    >>> from ddg_sim.methods import ddg
    >>> print(grid(ddg(3), iterations=3))
               t=0        t=1        t=2        t=3        t=4
    worker 0   F0         F1         F2 B0 U0   B1 U1      B2 U2
    worker 1   F0         F1 B0 U0   F2 B1 U1   B2 U2
    worker 2   F0 B0 U0   F1 B1 U1   F2 B2 U2
    """
    several = any(len({template.stage for template in body}) > 1 for body in schedule.workers)

    def cell(op: Op) -> str:
        return f"{op.kind.value}{op.sample}" + (f"/{op.stage}" if several else "")

    rows = [
        [" ".join(cell(op) for op in tick if op is not None) for tick in schedule.ticks(*run)]
        for run in ((worker, iterations, drain) for worker in range(len(schedule.workers)))
    ]
    header = [f"t={t}" for t in range(schedule.num_ticks(iterations, drain))]
    return _table(["", *(f"worker {worker}" for worker in range(len(rows)))], [header, *rows])


def _table(names: Iterable[str], rows: list[list[str]]) -> str:
    width = max((len(text) for row in rows for text in row), default=0) + 3
    label = max(map(len, names)) + 3
    return "\n".join(
        (name.ljust(label) + "".join(text.ljust(width) for text in row)).rstrip()
        for name, row in zip(names, rows, strict=True)
    )
