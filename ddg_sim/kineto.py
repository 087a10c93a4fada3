"""Traces of torch.profiler (Kineto): layers timed by the ranges that a user puts around them.

A range is ``record_function("forward:NAME")`` or ``record_function("backward:NAME")``; after a
space it may say ``output_bytes=N`` and ``parameter_bytes=N``. Layers run one after the other, in
the order in which their forward ranges start. For layers given as a dict from name to a callable
(the loss is the last of them), this makes a trace, on the CPU or on a GPU::

    def trace_layers(layers, batch, path, steps=10):
        with torch.profiler.profile() as profiler:
            for _ in range(steps):
                passed, value = [], batch
                for name, layer in layers.items():
                    value = value.detach().requires_grad_(bool(passed))
                    with torch.profiler.record_function(f"forward:{name}"):
                        output = layer(value)
                    passed.append((name, layer, value, output))
                    value = output
                gradient = None  # the loss is a number: its backward pass needs none
                for name, layer, value, output in reversed(passed):
                    weights = layer.parameters() if isinstance(layer, torch.nn.Module) else ()
                    label = (f"backward:{name} output_bytes={output.nbytes}"
                             f" parameter_bytes={sum(weight.nbytes for weight in weights)}")
                    with torch.profiler.record_function(label):
                        if output.requires_grad:
                            output.backward(gradient)
                    gradient = value.grad
        profiler.export_chrome_trace(path)  # "trace.json", or "trace.json.gz"

Seconds are medians over the steps, so the first, slow ones do no harm. On a GPU a range on the host
only lasts as long as launching takes, so a range counts from the start of the first to the end of
the last kernel that was launched during it. Kineto's own ``gpu_user_annotation`` is used where a
trace has no kernels, but not otherwise: it misses what autograd's thread launched, hence most of a
backward pass (pytorch/kineto issue 1022).
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field, ValidationError
from pydantic_core import from_json

from ddg_sim.files import read_text
from ddg_sim.layers import Layer, LayerError, LayerGraph, quoted
from ddg_sim.profile import first_problem

DIRECTIONS = ("forward:", "backward:")
CONVENTION = 'record_function("forward:NAME") and record_function("backward:NAME")'
LAUNCHES = ("cuda_runtime", "cuda_driver")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
CATEGORIES = ("user_annotation", "gpu_user_annotation", *LAUNCHES, *ON_DEVICE)
ROUNDING = 0.01  # of the trace's microseconds: a range may seem to end after the next one starts

Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Text = Annotated[str, Field(strict=True)]


class _Arguments(BaseModel):
    correlation: int | None = None  # joins a launch on the host and what ran on the device


class _Event(BaseModel):
    """A complete event ("ph": "X"): microseconds since some start."""

    cat: Text
    name: Text
    ts: Number
    dur: Annotated[Number, Field(ge=0)]
    pid: int | str = 0
    tid: int | str = 0
    args: _Arguments = _Arguments()

    @property
    def end(self) -> float:
        return self.ts + self.dur

    @property
    def thread(self) -> tuple[str, str]:
        return str(self.pid), str(self.tid)


class _Range(NamedTuple):
    direction: str
    layer: str
    sizes: dict[str, int]
    event: _Event


def read_trace(path: str | Path) -> LayerGraph:
    """Read the layers of a trace, a chain; see the module for how to make one.

    A trace does not say which layer reads which: every layer is taken to read the one before it.
    A size that no range of a layer states is 0 bytes, for all layers or for none.

    Raises:
        LayerError: in one line with the path and what is wrong.

    >>> read_trace("no/such/trace.json")
    Traceback (most recent call last):
    ...
    ddg_sim.layers.LayerError: no/such/trace.json: cannot be read: No such file or directory
    """
    text = read_text(path, LayerError)
    try:
        data = from_json(text)
    except ValueError as error:
        raise LayerError(f"{path}: not valid JSON: {error}") from None
    return parse_trace(data, path)


def parse_trace(data: Any, path: str | Path = "trace.json") -> LayerGraph:
    """Layers of a trace's parsed JSON; see `read_trace`.

    Args:
        data: what a JSON parser returns.
        path: where it comes from, for messages.

    Raises:
        LayerError: as `read_trace`.

    >>> events = [dict(ph="X", cat="user_annotation", name=name, ts=start, dur=2000.0)
    ...           for start, name in ((0, "forward:fc output_bytes=8"), (2000, "backward:fc"))]
    >>> parse_trace({"traceEvents": events}).layers
    (Layer(name='fc', forward=0.002, backward=0.002, output_bytes=8, parameter_bytes=0),)
    >>> parse_trace({"traceEvents": events[:1]})
    Traceback (most recent call last):
    ...
    ddg_sim.layers.LayerError: trace.json: 'forward:fc' has no 'backward:fc': put both ranges around
    every layer, the latter around nothing where a layer has no backward pass
    """
    try:
        return _layers(_events(data))
    except LayerError as error:
        raise LayerError(f"{path}: {error}") from None


def _events(data: Any) -> list[_Event]:
    found = data.get("traceEvents") if isinstance(data, dict) else None
    if not isinstance(found, list):
        raise LayerError("is no trace: a JSON object with a list of traceEvents is")
    events = []
    for index, event in enumerate(found):
        if not isinstance(event, dict):
            raise LayerError(f"traceEvents[{index}] is no object")
        if event.get("ph") == "X" and event.get("cat") in CATEGORIES:
            try:
                events.append(_Event.model_validate(event))
            except ValidationError as error:
                raise LayerError(f"traceEvents[{index}].{first_problem(error)}") from None
    return events


def _layers(events: list[_Event]) -> LayerGraph:
    kernels = [event for event in events if event.cat in ON_DEVICE]
    projected = [event for event in events if event.cat == "gpu_user_annotation"]
    source = "user_annotation" if kernels or not projected else "gpu_user_annotation"
    ranges = _ranges([event for event in events if event.cat == source])
    if kernels:
        launches = [event for event in events if event.cat in LAUNCHES]
        durations = _device_durations([each.event for each in ranges], launches, kernels)
    else:
        durations = [each.event.dur for each in ranges]
    samples: dict[tuple[str, str], list[float]] = defaultdict(list)
    sizes: dict[tuple[str, str], set[int]] = defaultdict(set)
    for each, duration in zip(ranges, durations, strict=True):
        samples[each.direction, each.layer].append(duration / 1e6)
        for field, size in each.sizes.items():
            sizes[each.layer, field].add(size)
    _check_complete({key: len(found) for key, found in samples.items()})
    layers = [layer for direction, layer in samples if direction == "forward"]
    _check_sizes(layers, sizes)
    return LayerGraph(
        tuple(
            Layer(
                layer,
                forward=median(samples["forward", layer]),
                backward=median(samples["backward", layer]),
                output_bytes=max(sizes[layer, "output_bytes"], default=0),
                parameter_bytes=max(sizes[layer, "parameter_bytes"], default=0),
            )
            for layer in layers
        ),
        tuple(pairwise(range(len(layers)))),
    )


def _ranges(annotations: list[_Event]) -> list[_Range]:
    """The ranges around layers, in the order of time."""
    ranges = [_range(event) for event in annotations if event.name.startswith(DIRECTIONS)]
    if not ranges:
        names = sorted({quoted(event.name) for event in annotations})
        found = f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "none"
        raise LayerError(
            f"has no ranges around layers: record {CONVENTION} (ranges found: {found})"
        )
    by_thread = sorted((each.event for each in ranges), key=lambda e: (*e.thread, e.ts, -e.dur))
    for outer, inner in pairwise(by_thread):
        if outer.thread == inner.thread and inner.ts + ROUNDING < outer.end:
            raise LayerError(
                f"range {quoted(inner.name)} starts within {quoted(outer.name)}:"
                " time either the outer or the inner one, not both"
            )
    return sorted(ranges, key=lambda each: each.event.ts)


def _range(event: _Event) -> _Range:
    label, *fields = event.name.split(" ")
    direction, _, layer = label.partition(":")
    sizes = {}
    for field in fields:
        size = re.fullmatch("(output_bytes|parameter_bytes)=([0-9]{1,18})", field)
        if size is None:
            raise LayerError(
                f"range {quoted(event.name)}: after the layer's name, which has no spaces,"
                " may only come output_bytes=N and parameter_bytes=N"
            )
        sizes[size[1]] = int(size[2])
    if not layer:
        raise LayerError(f"range {quoted(event.name)} names no layer: record {CONVENTION}")
    return _Range(direction, layer, sizes, event)


def _device_durations(
    ranges: list[_Event], launches: list[_Event], kernels: list[_Event]
) -> list[float]:
    """Microseconds from the first kernel's start to the last one's end, of what a range launched.

    By whichever thread: the one that calls backward() waits until autograd's has launched all.
    """
    launched: dict[int | None, list[_Event]] = defaultdict(list)
    for kernel in kernels:
        launched[kernel.args.correlation].append(kernel)
    launches = sorted(
        (launch for launch in launches if launch.args.correlation is not None),
        key=lambda launch: launch.ts,
    )
    times = [launch.ts for launch in launches]
    durations = []
    for each in ranges:
        during = launches[bisect_left(times, each.ts) : bisect_right(times, each.end)]
        run = [kernel for launch in during for kernel in launched[launch.args.correlation]]
        durations.append(max(k.end for k in run) - min(k.ts for k in run) if run else 0.0)
    if not any(durations):
        raise LayerError(
            "has kernels, but none that a range around a layer launched:"
            " record with the activities CPU and CUDA both"
        )
    return durations


def _check_complete(counts: dict[tuple[str, str], int]) -> None:
    for direction, layer in counts:
        other = "backward" if direction == "forward" else "forward"
        if (other, layer) not in counts:
            raise LayerError(
                f"{_label(direction, layer)} has no {_label(other, layer)}: put both ranges around"
                " every layer, the latter around nothing where a layer has no backward pass"
            )
    least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if counts[least] != counts[most]:
        raise LayerError(
            f"{_label(*most)} is there {counts[most]} times, {_label(*least)} {counts[least]}:"
            " give every layer a name of its own, and record whole steps"
        )


def _check_sizes(layers: list[str], sizes: dict[tuple[str, str], set[int]]) -> None:
    for (layer, field), found in sizes.items():
        if len(found) > 1:
            raise LayerError(
                f"layer {quoted(layer)} has {field}={min(found)} and {field}={max(found)}:"
                " record mini-batches of one size"
            )
    without = [layer for layer in layers if (layer, "output_bytes") not in sizes]
    if 0 < len(without) < len(layers):
        raise LayerError(f"layer {quoted(without[0])} has no output_bytes=N, but others have")


def _label(direction: str, layer: str) -> str:
    return quoted(f"{direction}:{layer}")
