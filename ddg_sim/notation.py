"""Schedules as text: `render` and `parse` are inverse, and `grid` draws what is run when.

Golden files and error messages are written in it, so that people can review them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from ddg_sim.rule import Activations, Gradient, Jacobian, Rule, Transform, TransformKind
from ddg_sim.schedule import Op, OpKind, OpTemplate, Schedule, ScheduleError, Sync

_HEADER = re.compile(r"(?P<method>\S+) stages=(?P<stages>\d+) (?P<rest>sync=.*)")
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
    m, rule = schedule.samples_per_iteration, schedule.rule
    words = [
        f"{schedule.method} stages={schedule.num_stages} sync={schedule.sync.value}",
        f"activations={rule.activations.value} jacobian={rule.jacobian.value} samples={m}",
    ]
    if rule.gradient is not Gradient.NEXT:
        words.append(f"gradient={rule.gradient.value}")
    if schedule.queue:
        words.append(f"queue={schedule.queue}")
    if schedule.replicas != 1:
        words.append(f"replicas={schedule.replicas}")
    lines = [" ".join([*words, *map(str, rule.transforms)])]
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
    try:
        empty = _parse_header(header)
    except (ValueError, KeyError) as error:
        missing = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ScheduleError(f"line 1: {missing}") from None
    workers: list[tuple[OpTemplate, ...]] = []
    for number, line in enumerate(lines[1:], start=2):
        match = _WORKER.fullmatch(line)
        if match is None or int(match["worker"]) != len(workers):
            expected = f"worker {len(workers)}: …"
            raise ScheduleError(f"line {number}: expected {expected!r}, got {line!r}")
        words, m = match["body"].split(), empty.samples_per_iteration
        workers.append(tuple(_parse_template(word, m, number) for word in words))
    return replace(empty, workers=tuple(workers))


def _parse_header(header: re.Match[str]) -> Schedule:
    """A schedule without workers, from the words 'name=value' of line 1."""
    parts = (word.partition("=") for word in header["rest"].split())
    words = {name: value for name, _, value in parts}

    def take(name: str, default: str | None = None) -> str:
        return words.pop(name) if default is None else words.pop(name, default)

    sync, samples = Sync(take("sync")), int(take("samples"))
    activations, jacobian = Activations(take("activations")), Jacobian(take("jacobian"))
    gradient = Gradient(take("gradient", Gradient.NEXT.value))
    queue, replicas = int(take("queue", "0")), int(take("replicas", "1"))
    transforms = tuple(
        Transform(TransformKind(name), tuple(map(float, values.split(","))))
        for name, values in words.items()
    )
    rule = Rule(activations, jacobian, gradient, transforms)
    stages = int(header["stages"])
    return Schedule(header["method"], stages, (), sync, rule, samples, replicas, queue)


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
