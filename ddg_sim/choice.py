"""A method with its options in one word: ``ddg/none``, ``gpipe:micro_batches=4:replay``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from inspect import signature
from typing import TypeVar

from ddg_sim.methods import METHODS, Semantics, method
from ddg_sim.schedule import Schedule, Sync

E = TypeVar("E", bound=Enum)

#: Larger numbers are refused: a mistake, that would take for ever.
LARGEST = 1024


@dataclass(frozen=True, slots=True)
class Choice:
    """A method and the options that were chosen; None and what is missing take the defaults."""

    name: str
    sync: Sync | None = None
    semantics: Semantics | None = None
    options: dict[str, object] = field(default_factory=dict)

    def schedule(self, num_stages: int) -> Schedule:
        """Its schedule; see `methods.method`."""
        return method(self.name, num_stages, self.sync, self.semantics, **self.options)  # type: ignore[arg-type]


def parse_choice(text: str) -> Choice:
    """Read ``METHOD[/SYNC][:OPTION=VALUE]...``; a list is 2-1-0, and a flag needs no value.

    Raises:
        ValueError: naming what is unknown, or the value that is none.

    >>> parse_choice("ddg/barrier:semantics=replay:delays=2-1-0").options
    {'delays': (2, 1, 0)}
    >>> parse_choice("gpipe:micro_batches=4:replay").options
    {'micro_batches': 4, 'replay': True}
    >>> parse_choice("gpipe:micro_batches=many")
    Traceback (most recent call last):
    ...
    ValueError: method 'gpipe:micro_batches=many': micro_batches must be a number, got 'many'
    """
    head, *words = text.split(":")
    name, slash, mode = head.partition("/")
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known methods: {', '.join(METHODS)}")
    types = {
        option: str(parameter.annotation)
        for option, parameter in signature(METHODS[name]).parameters.items()
        if option not in ("num_stages", "sync")
    }
    given: dict[str, object] = {}
    try:
        sync = _one_of(Sync, "sync", mode) if slash else None
        for word in words:
            option, equals, value = word.partition("=")
            if option not in types:
                raise ValueError(f"{option!r} is no option; options: {', '.join(types) or 'none'}")
            if option in given:
                raise ValueError(f"{option} is given twice")
            given[option] = _read(option, types[option], value if equals else None)
    except ValueError as error:
        raise ValueError(f"method {text!r}: {error}") from None
    semantics = given.pop("semantics", None)
    assert semantics is None or isinstance(semantics, Semantics)
    return Choice(name, sync, semantics, given)


def _read(option: str, kind: str, value: str | None) -> object:
    """The value of an option whose parameter has that annotation."""
    if kind == "bool":
        if value not in (None, "true", "false"):
            raise ValueError(f"{option} must be true or false, got {value!r}")
        return value != "false"
    if not value:
        raise ValueError(f"{option} needs a value: {option}=...")
    if kind.startswith("Semantics"):
        return _one_of(Semantics, option, value)
    if kind.startswith("Sequence"):
        return tuple(
            _number(option, part, int, "numbers such as 2-1-0") for part in value.split("-")
        )
    if kind.startswith("float"):
        return _number(option, value, float, "a number")
    return _number(option, value, int, "a number")


def _number(option: str, text: str, kind: type[float], what: str) -> float:
    try:
        number = kind(text)
    except ValueError:
        raise ValueError(f"{option} must be {what}, got {text!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"{option} must be finite, got {text}")
    if isinstance(number, int) and number > LARGEST:
        raise ValueError(f"{option} must be at most {LARGEST}, got {text}")
    return number


def _one_of(kind: type[E], option: str, text: str) -> E:
    try:
        return kind(text)
    except ValueError:
        known = ", ".join(str(mode.value) for mode in kind)
        raise ValueError(f"unknown {option} {text!r}; known: {known}") from None
