"""Timelines as Chrome-trace JSON, which https://ui.perfetto.dev and chrome://tracing open.

Format: "Trace Event Format" (Chromium). Times in the file are microseconds.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddg_sim.dependencies import Relation, template_at
from ddg_sim.files import replacing
from ddg_sim.lowering import channels
from ddg_sim.rule import Activations
from ddg_sim.schedule import Op, OpKind
from ddg_sim.timeline import Span, Timeline

Event = dict[str, Any]
Track = tuple[Span, int]  # a span and the number of the track it is drawn on


def chrome_trace(timeline: Timeline, name: str = "run") -> Event:
    """Chrome trace of one timeline; its first span starts at 0.

    Operations are complete events on one track per worker, transfers on one per link; a flow arrow
    leads from the producer to the consumer of all data that crosses between workers, also within a
    stage that lives on two; a counter per stage shows its live activations.

    >>> from ddg_sim.costs import costs
    >>> from ddg_sim.cycletime import evaluate
    >>> from ddg_sim.methods import ddg
    >>> trace = chrome_trace(evaluate(ddg(2), costs(2, comm=0.5), iterations=1))
    >>> [(e["name"], e["tid"], e["ts"], e["dur"]) for e in trace["traceEvents"]
    ...  if e["ph"] == "X" and e["dur"] > 0]
    [('F0', 1, 0.0, 1000000.0), ('activation 0', 3, 1000000.0, 500000.0),
     ('F0', 2, 1500000.0, 1000000.0), ('B0', 2, 2500000.0, 2000000.0),
     ('gradient 0', 4, 4500000.0, 500000.0), ('B0', 1, 5000000.0, 2000000.0)]
    """
    return {"displayTimeUnit": "ms", "traceEvents": _process(timeline, name, 1, 0)}


def write_trace(path: str | Path, timelines: Mapping[str, Timeline]) -> None:
    """Write several timelines into one Chrome trace, each a process, in this order.

    Every timeline starts at 0, so that a predicted and a measured run lie above each other.

    Raises:
        ValueError: if there is no timeline.
        OSError: if the folder does not exist or cannot be written.

    >>> from tempfile import TemporaryDirectory
    >>> from ddg_sim.costs import costs
    >>> from ddg_sim.cycletime import evaluate
    >>> from ddg_sim.methods import bp, ddg
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder) / "trace.json"
    ...     runs = {m.method: evaluate(m, costs(2), iterations=2) for m in (bp(2), ddg(2))}
    ...     write_trace(path, runs)
    ...     {event["pid"] for event in json.loads(path.read_text())["traceEvents"]}
    {1, 2}
    """
    if not timelines:
        raise ValueError("timelines is empty: give at least one to write")
    events: list[Event] = []
    for pid, (name, timeline) in enumerate(timelines.items(), start=1):
        flows = sum(event["ph"] == "s" for event in events)
        events.extend(_process(timeline, name, pid, flows))
    with replacing(path) as temporary:
        text = json.dumps({"displayTimeUnit": "ms", "traceEvents": events})
        temporary.write_text(text, encoding="utf-8")


def _process(timeline: Timeline, name: str, pid: int, first_flow: int) -> list[Event]:
    tracks, names = _tracks(timeline)
    origin = timeline.start
    events: list[Event] = [
        _meta("process_name", pid, 0, name=name),
        _meta("process_sort_index", pid, 0, sort_index=pid),
    ]
    for tid, lane in names.items():
        events.append(_meta("thread_name", pid, tid, name=lane))
        events.append(_meta("thread_sort_index", pid, tid, sort_index=tid))
    for span, tid in sorted(tracks, key=lambda track: (track[0].start, track[0].end)):
        start, end = _micro(span.start - origin), _micro(span.end - origin)
        events.append(
            {
                "ph": "X",
                "name": span.label,
                "cat": _category(span),
                "pid": pid,
                "tid": tid,
                "ts": start,
                "dur": round(end - start, 3),
                "args": _details(span),
            }
        )
    events.extend(_flows(timeline, tracks, pid, first_flow, origin))
    events.extend(_counters(timeline, pid, origin))
    return events


def _micro(seconds: float) -> float:
    """Microseconds, to whole nanoseconds: both ends are rounded alike, so nothing overlaps."""
    return round(seconds * 1e6, 3)


def _meta(kind: str, pid: int, tid: int, **args: object) -> Event:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": args}


def _category(span: Span) -> str:
    if span.op is not None:
        return span.op.kind.noun
    return "transfer"


def _details(span: Span) -> Event:
    if span.op is not None:
        op = span.op
        return {
            "stage": op.stage + 1,
            "iteration": op.iteration,
            "sample": op.sample,
            "version": op.version,
            "op": str(op),
        }
    return {"message": str(span.message)} if span.message is not None else {}


def _tracks(timeline: Timeline) -> tuple[list[Track], dict[int, str]]:
    """Give every span a track: its lane's, or a second one where a measured lane overlaps."""
    lanes: dict[str, list[Span]] = defaultdict(list)
    for span in sorted(timeline.spans, key=lambda span: (span.start, span.end)):
        lanes[span.lane].append(span)

    def order(lane: str) -> tuple[bool, int, str]:
        op = lanes[lane][0].op
        return (op is None, 0 if op is None else op.stage, lane)

    tracks: list[Track] = []
    names: dict[int, str] = {}
    for lane in sorted(lanes, key=order):
        free: list[tuple[int, float]] = []  # per track of this lane: its number, when it is free
        for span in lanes[lane]:
            place = next((i for i, (_, end) in enumerate(free) if end <= span.start), len(free))
            if place == len(free):
                tid = len(names) + 1
                names[tid] = lane if not free else f"{lane} ({len(free) + 1})"
                free.append((tid, span.end))
            tid = free[place][0]
            free[place] = (tid, span.end)
            tracks.append((span, tid))
    return tracks, names


def _flows(
    timeline: Timeline, tracks: list[Track], pid: int, first: int, origin: float
) -> list[Event]:
    schedule = timeline.schedule
    drawn = {
        (span.op.kind, span.op.stage, span.op.sample): (span, tid)
        for span, tid in tracks
        if span.op is not None
    }
    events: list[Event] = []
    number = first
    for channel in channels(schedule):
        if channel.relation is Relation.CREDIT:
            continue  # a permission, not data
        edge = channel.dependency
        producer, consumer = (template_at(schedule, node) for node in (edge.source, edge.consumer))
        for tick in range(schedule.num_ticks(timeline.iterations)):
            made = schedule.sample_of(producer, tick)
            used = schedule.sample_of(consumer, tick + edge.tokens)
            source = drawn.get((producer.kind, producer.stage, made))
            target = drawn.get((consumer.kind, consumer.stage, used))
            if source is None or target is None:
                continue
            number += 1
            common = {"name": channel.relation.value, "cat": "dependency", "id": number, "pid": pid}
            (span, tid), start = source, target[0].start
            # The arrow must leave within its slice; at the very end the next one starts.
            leave = max(_micro(span.start - origin), round(_micro(span.end - origin) - 0.001, 3))
            events.append({"ph": "s", **common, "tid": tid, "ts": leave})
            arrive = {"tid": target[1], "ts": _micro(start - origin)}
            events.append({"ph": "f", "bp": "e", **common, **arrive})
    return events


def _counters(timeline: Timeline, pid: int, origin: float) -> list[Event]:
    """Live activations: from the start of a forward pass to the end of its backward pass.

    Where a stage keeps none of them in between there is nothing to count.
    """
    if timeline.schedule.rule.activations not in (Activations.GRAPH, Activations.INPUT):
        return []
    changes: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for span, op in timeline.operations:  # per stage these are in the order in which they ran
        if op.kind is OpKind.FORWARD:
            changes[op.stage].append((span.start, 1))
        elif _frees(op):
            changes[op.stage].append((span.end, -1))
    events: list[Event] = []
    for stage in sorted(changes):
        live = 0
        for time, change in changes[stage]:
            live += change
            events.append(
                {
                    "ph": "C",
                    "name": f"stage {stage + 1} live activations",
                    "pid": pid,
                    "tid": 0,
                    "ts": _micro(time - origin),
                    "args": {"samples": live},
                }
            )
    return events


def _frees(op: Op) -> bool:
    return op.kind in (OpKind.BACKWARD, OpKind.BACKWARD_WEIGHT)
