"""The file that `ddg_gpu.first_contact` writes about a GPU, and later code asks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ddg_gpu.isolated import STATUSES, Result
from ddg_sim.files import read_text, replacing

FORMAT = "ddg GPU facts, version 1"


class FactsError(ValueError):
    """A file of facts is missing or is none; one line with the path."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What was found out about a GPU.

    Args:
        date: when it was begun, ISO 8601 with the time zone.
        command: that found out.
        stages: numbers of partitions that were tried.
        limit: seconds that each check had.
        results: by name of the check.
        complete: whether every check had its turn.
    """

    date: str
    command: str
    stages: tuple[int, ...]
    limit: float
    results: Mapping[str, Result]
    complete: bool

    @property
    def partitions(self) -> str:
        """ "green-contexts" if they were made and proven disjoint, else "none"."""
        return self.use("partitions", "none")

    @property
    def graphs(self) -> bool:
        """Whether a CUDA graph of a stage was captured, and gave on replay what eager code does."""
        return self.use("graphs", "no") == "yes"

    def use(self, name: str, otherwise: str) -> str:
        """What to use as far as one check decides it; ``otherwise`` if it was not asked.

        >>> Facts("", "", (), 1, {"streams": Result("no", "serial")}, True).use("streams", "?")
        'serial'
        """
        return self.results[name].use if name in self.results else otherwise


def write_facts(facts: Facts, path: str | Path) -> None:
    """Write a file of facts, whole or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    content: dict[str, Any] = {"format": FORMAT, **asdict(facts)}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", "utf-8")


def read_facts(path: str | Path) -> Facts:
    """Read what `ddg_gpu.first_contact` found out.

    Raises:
        FactsError: if the file is missing, is no such file, or of another version.
    """
    try:
        content = json.loads(read_text(path, FactsError))
    except FactsError:
        raise
    except ValueError as error:
        raise FactsError(f"{path}: is not JSON: {error}") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise FactsError(
            f'{path}: "format" must be {FORMAT!r}, got {found!r}; '
            "write it with python -m ddg_gpu.first_contact"
        )
    try:
        return Facts(
            date=_is(str, content["date"], "date"),
            command=_is(str, content["command"], "command"),
            stages=tuple(
                _is(int, count, "stages") for count in _is(list, content["stages"], "stages")
            ),
            limit=float(_is((int, float), content["limit"], "limit")),
            results={
                name: _result(name, _is(dict, entry, name))
                for name, entry in _is(dict, content["results"], "results").items()
            },
            complete=_is(bool, content["complete"], "complete"),
        )
    except KeyError as error:
        raise FactsError(f"{path}: {error} is missing") from None
    except TypeError as error:
        raise FactsError(f"{path}: {error}") from None


def _result(name: str, entry: dict[str, Any]) -> Result:
    status: Any = entry["status"]
    if status not in STATUSES:
        raise TypeError(f'"status" of {name} must be one of {", ".join(STATUSES)}, got {status!r}')
    return Result(
        status=status,
        use=_is(str, entry["use"], "use"),
        seconds=float(_is((int, float), entry["seconds"], "seconds")),
        figures=_is(dict, entry["figures"], "figures"),
        error=tuple(_is(str, line, "error") for line in _is(list, entry["error"], "error")),
    )


def _is(kind: type | tuple[type, ...], value: Any, name: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f'"{name}" cannot be {value!r}')
    return value
