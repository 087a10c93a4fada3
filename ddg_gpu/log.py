"""A line of JSON per update and stage, while a run goes on."""

from __future__ import annotations

import json
import math
import resource
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from ddg_gpu.stage import Stage
from ddg_sim.schedule import Op, OpKind


class StageLog:
    """Writes ``stage-1.jsonl`` and so on: what every update of the stages of a process was.

    Each line has: ``update`` (its number, from 1), ``sample`` (the last one it used), ``loss`` (of
    that sample, where the stage has one; null if it is not finite), ``staleness`` (updates between
    reading the weights and this), ``seconds`` (by kind of operation, since the last update),
    ``activations`` and ``versions`` (held now) and ``peak_rss`` (bytes of the process so far).

    Args:
        folder: where; made if it is not there.
        stages: the stages of this process, by index.
            Lines of updates that they have not had, which a run wrote that was ended and is now
            repeated, are dropped.

    Raises:
        OSError: if the files cannot be written.
    """

    def __init__(self, folder: Path, stages: Mapping[int, Stage]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._stages = stages
        self._files = {
            k: _opened(folder / f"stage-{k + 1}.jsonl", s.updates) for k, s in stages.items()
        }
        self._seconds: dict[int, dict[str, float]] = {k: defaultdict(float) for k in stages}
        self._read: dict[tuple[int, int], int] = {}  # (stage, sample): version

    def __call__(self, op: Op, seconds: float) -> None:
        """Take note of an operation."""
        self._seconds[op.stage][op.kind.noun] += seconds
        if op.kind is OpKind.FORWARD:
            self._read[op.stage, op.sample] = op.version
        elif op.kind is OpKind.UPDATE:
            stage, spent = self._stages[op.stage], self._seconds[op.stage]
            activations, versions = stage.held
            read, loss = self._read.get((op.stage, op.sample)), stage.losses.get(op.sample)
            row: dict[str, Any] = {
                "update": op.version,
                "sample": op.sample,
                "loss": loss if loss is not None and math.isfinite(loss) else None,
                "staleness": None if read is None else op.version - 1 - read,
                "seconds": dict(spent),
                "activations": activations,
                "versions": versions,
                "peak_rss": _peak_rss(),
            }
            self._files[op.stage].write(json.dumps(row) + "\n")
            spent.clear()
            for key in [key for key in self._read if key[0] == op.stage and key[1] <= op.sample]:
                del self._read[key]

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


def _opened(path: Path, after: int) -> TextIO:
    """The file, with the lines of the first updates that it has."""
    lines = path.read_text().splitlines(keepends=True) if after and path.is_file() else []
    kept = []
    for line in lines:
        try:
            if not line.endswith("\n") or json.loads(line)["update"] > after:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(line)
    path.write_text("".join(kept))
    return path.open("a", buffering=1)


def _peak_rss() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
