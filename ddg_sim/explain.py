"""Saying in words what bounds a schedule's period."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ddg_sim.dependencies import BACKWARDS
from ddg_sim.eventgraph import Event
from ddg_sim.schedule import OpKind, Schedule


def duration_text(seconds: float) -> str:
    """Seconds as a person would write them, to four digits.

    >>> duration_text(12.0), duration_text(0.01234), duration_text(5e-6), duration_text(0.0)
    ('12 s', '12.34 ms', '5 µs', '0 s')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds / 1e-6:.4g} µs" if seconds else "0 s"


def explain_cycle(
    schedule: Schedule,
    cycle: Sequence[Event],
    durations: Sequence[float],
    tokens: int,
    host: float = 0.0,
) -> str:
    """Say what a critical cycle is, with stages counted from 1.

    Args:
        schedule: the schedule it belongs to.
        cycle: its events, in the order in which they wait for one another.
        durations: seconds of each of them.
        tokens: iterations that the cycle spans.
        host: seconds of it that hosts spend on messages and per operation.

    >>> from ddg_sim.eventgraph import event_graph
    >>> from ddg_sim.methods import ddg
    >>> own = event_graph(ddg(2)).events[3:6]
    >>> explain_cycle(ddg(2), own, (1.0, 2.0, 0.5), 1)
    "stage 2's own forward + backward + update bounds you: 3.5 s per iteration"
    """
    seconds = math.fsum(durations)
    timed = list(zip(cycle, durations, strict=True))
    transfers = math.fsum(duration for event, duration in timed if event.message is not None)
    total = _total(seconds, tokens, transfers, host)
    templates = [event.template for event in cycle if event.template is not None]
    if not templates:
        names = ", ".join(_one_based(event) for event in cycle)
        return f"the link that carries {names} bounds you: {_total(seconds, tokens, 0.0, 0.0)}"
    if any(_is_barrier(event) for event in cycle):
        parts = [_between_barriers(schedule, part) for part in _split(timed)]
        return f"{', then '.join(parts)} between barriers bounds you: {total}"
    room_for = next((event for event in cycle if event.name.startswith("credit")), None)
    if room_for is not None:
        late, early = (stage + 1 for stage in room_for.ends)
        room = f"the queue of {schedule.queue} between stage {early} and stage {late}"
        return f"{room} bounds you: {total}"
    stages = sorted({template.stage for template in templates})
    workers = {event.node.worker for event in cycle if event.node is not None}
    if len(stages) == 1:
        return f"stage {stages[0] + 1}'s own {_kinds(timed)} bounds you: {total}"
    if len(workers) == 1:
        held = ", ".join(str(stage + 1) for stage in stages)
        return f"worker {workers.pop() + 1}'s own work on stages {held} bounds you: {total}"
    way = f"from stage {stages[0] + 1} to stage {stages[-1] + 1}"
    return f"the round trip {way} and back bounds you: {total}"


def _total(seconds: float, tokens: int, transfers: float, host: float) -> str:
    share = f", {duration_text(transfers)} of it in transfers" if transfers > 0 else ""
    if host > 1e-9 * seconds:
        share += f", {duration_text(host)} of it on the hosts' part (messages, overhead)"
    if tokens == 1:
        return f"{duration_text(seconds)} per iteration{share}"
    each = duration_text(seconds / tokens)
    return f"{duration_text(seconds)} for {tokens} iterations, {each} each{share}"


def _one_based(event: Event) -> str:
    relation, _, ends = event.name.partition(" ")
    source, _, target = ends.partition("→")
    return f"the {relation}s from stage {int(source) + 1} to stage {int(target) + 1}"


Timed = tuple[Event, float]  # an event and its seconds


def _is_barrier(event: Event) -> bool:
    return event.node is None and event.message is None


def _kinds(timed: Sequence[Timed]) -> str:
    words = [event.template.kind.noun for event, seconds in timed if event.template and seconds > 0]
    return " + ".join(dict.fromkeys(words)) or "program"


def _split(timed: Sequence[Timed]) -> list[list[Timed]]:
    """The stretches of a cycle between its barriers, from the first barrier on."""
    first = next(place for place, (event, _) in enumerate(timed) if _is_barrier(event))
    parts: list[list[Timed]] = []
    for event, seconds in (*timed[first:], *timed[:first]):
        if _is_barrier(event):
            parts.append([])
            continue
        # A worker that comes last to a barrier goes on at once: it may be missing in the cycle.
        ended = parts[-1] and parts[-1][-1][0].name.startswith("F")
        if ended and event.template is not None and event.template.kind is not OpKind.FORWARD:
            parts.append([])
        parts[-1].append((event, seconds))

    def order(part: list[Timed]) -> int:
        return 0 if part[0][0].name.startswith("F") else 1

    return sorted((part for part in parts if part), key=order)  # forwards come first in prose


def _between_barriers(schedule: Schedule, part: Sequence[Timed]) -> str:
    templates = [event.template for event, _ in part if event.template is not None]
    stages = [template.stage for template in templates]
    kinds = _kinds(part)
    ends = f"stages {stages[0] + 1} to {stages[-1] + 1}"
    if all(template.kind is OpKind.FORWARD for template in templates):
        if len(set(stages)) == schedule.num_stages:
            return "all forwards" if len(stages) > 1 else "the forward"
        return (
            f"the slowest forward (stage {stages[0] + 1})"
            if len(stages) == 1
            else (f"the forwards of {ends}")
        )
    if len(set(stages)) == 1:
        slowest = any(template.kind in BACKWARDS for template in templates)
        return f"the {'slowest ' if slowest else ''}{kinds} (stage {stages[0] + 1})"
    return f"the {kinds} of {ends}"
