"""Reads the layers of a network from any known kind of file, which its content tells."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from ddg_sim.files import read_text
from ddg_sim.kineto import parse_trace
from ddg_sim.layers import Layer, LayerError, LayerGraph, quoted
from ddg_sim.pipedream import parse_graph
from ddg_sim.profile import Profile, first_problem

KNOWN = "a profile of `ddg profile`, a trace of torch.profiler or a graph.txt of PipeDream"


def read_layers(path: str | Path) -> LayerGraph:
    """Layers of a network from any file that the project reads, plain or gzip.

    ========================  =============================================================
    file                      layers
    ========================  =============================================================
    PipeDream's `graph.txt`   one per node, branches and all: `ddg_sim.pipedream`
    torch.profiler's JSON     one per pair of ranges, a chain: `ddg_sim.kineto`
    the project's profile     one per stage, a chain: an operation's host overhead counts as
                              part of it; update, links and contention are left behind
    ========================  =============================================================

    Raises:
        LayerError: in one line with the path and what is wrong.

    >>> read_layers("no/such/file")
    Traceback (most recent call last):
    ...
    ddg_sim.layers.LayerError: no/such/file: cannot be read: No such file or directory
    """
    text = read_text(path, LayerError)
    if not text.strip():
        raise LayerError(f"{path}: is empty: give {KNOWN}")
    if not text.lstrip().startswith(("{", "[")):
        if " -- " not in text:
            raise LayerError(f"{path}: is no known format: give {KNOWN}")
        return parse_graph(text, path)
    try:
        data: Any = from_json(text)
    except ValueError as error:
        raise LayerError(f"{path}: not valid JSON: {error}") from None
    keys = list(data) if isinstance(data, dict) else []
    if "traceEvents" in keys:
        return parse_trace(data, path)
    if "stages" in keys:
        return _profile_layers(text, path)
    found = ", ".join(map(quoted, keys[:5])) or "no keys"
    raise LayerError(f"{path}: is JSON of no known format (it has {found}): give {KNOWN}")


def _profile_layers(text: str, path: str | Path) -> LayerGraph:
    try:
        profile = Profile.model_validate_json(text)
    except ValidationError as error:
        raise LayerError(f"{path}: {first_problem(error)}") from None
    try:
        layers = tuple(
            Layer(
                f"stage {number}",
                forward=stage.forward + stage.overhead,
                backward=stage.backward + stage.overhead,
                output_bytes=stage.output_bytes,
                parameter_bytes=stage.parameter_bytes,
            )
            for number, stage in enumerate(profile.stages)
        )
    except LayerError as error:
        raise LayerError(f"{path}: {error}") from None
    return LayerGraph(layers, tuple(pairwise(range(len(layers)))))
