"""The project's cluster file: devices and what joins them, as versioned JSON.

Quantities are text with a unit. A bare number is refused: nobody can tell later what it meant.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from ddg_sim.files import read_text
from ddg_sim.network import Sharing
from ddg_sim.profile import first_problem


class ClusterError(ValueError):
    """A cluster file that is missing, broken or invalid, or a cluster that lacks something."""


# Not pydantic's ByteSize: it takes "Gb" for bytes, and bare numbers.
_PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_PREFIXES |= {f"{letter}i": 2.0 ** (10 * power) for power, letter in enumerate("KMGTP", start=1)}
BYTES = {f"{prefix}B": factor for prefix, factor in _PREFIXES.items()}
BITS = {f"{prefix}bit": factor / 8 for prefix, factor in _PREFIXES.items()}
RATES = {f"{unit}/s": factor for unit, factor in (BYTES | BITS).items()}
DURATIONS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ns": 1e-9}
_QUANTITY = re.compile(r"\s*(?P<number>\d+\.?\d*(?:[eE][+-]?\d+)?)\s*(?P<unit>\S*)\s*")


def quantity(value: object, units: dict[str, float], examples: str) -> float:
    """Read a number with its unit.

    Args:
        value: text such as "12 GB/s".
        units: what one of each unit is.
        examples: what to write instead.

    Raises:
        ValueError: saying what to write, if the unit is missing or unknown, or the number is not
            finite.

    >>> quantity("16 GiB", BYTES, "'16 GB'"), quantity("100 Gbit/s", RATES, "'12 GB/s'")
    (17179869184.0, 12500000000.0)
    >>> quantity(16, BYTES, "'16 GB'")
    Traceback (most recent call last):
    ...
    ValueError: has no unit: write for example '16 GB'
    """
    text = str(value) if isinstance(value, int | float) else value
    found = _QUANTITY.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise ValueError(f"is no quantity: write for example {examples}")
    if not found["unit"]:
        raise ValueError(f"has no unit: write for example {examples}")
    if found["unit"] not in units:
        raise ValueError(f"unit {found['unit']!r} is unknown: write for example {examples}")
    number = float(found["number"]) * units[found["unit"]]
    if not number < math.inf:
        raise ValueError(f"is too large: write for example {examples}")
    return number


def _quantity(units: dict[str, float], examples: str) -> BeforeValidator:
    return BeforeValidator(lambda value: quantity(value, units, examples))


Name = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
Size = Annotated[float, Field(gt=0), _quantity(BYTES, "'16 GB' or '16 GiB'")]
Rate = Annotated[float, Field(gt=0), _quantity(RATES, "'12 GB/s' or '100 Gbit/s'")]
Duration = Annotated[float, _quantity(DURATIONS, "'5 us' or '1.5 ms'")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Devices(_Part):
    """``count`` equal devices: one is called ``name``, several ``name-0``, ``name-1`` and so on.

    ``speed`` divides the seconds of a profile; ``memory`` is unlimited where it is left out.
    """

    name: Name
    count: Annotated[int, Field(ge=1, le=100_000, strict=True)] = 1
    speed: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False, strict=True)] = 1.0
    memory: Size = math.inf


def _shown(group: Devices) -> str:
    name, last = group.name, group.count - 1
    return f"{name} ({name}-0 to {name}-{last})" if last else name


class Link(_Part):
    """A link: both directions at once, each with this bandwidth, unless it is on a ``bus``."""

    bandwidth: Rate
    latency: Duration = 0.0
    bus: Name | None = None


class NamedLink(Link):
    """The link ``between`` two devices; the name of a group stands for each of its devices."""

    between: tuple[Name, Name]


class SharedBus(_Part):
    """A medium for whose use the links that name it compete."""

    name: Name
    sharing: Sharing


class Host(_Part):
    """Seconds of the host's, on top: for every operation, for every message sent or received."""

    operation: Duration = 0.0
    message: Duration = 0.0


class Cluster(_Part):
    """Devices in the order in which they are used, and what joins them.

    Args:
        version: of the format.
        devices: at least one group.
        default_link: joins any two devices that no other link joins.
        links: of two that join the same devices, the later one counts.
        buses: shared media that links may name.
        transfers: whether a device computes while its messages travel.
        host: what the host spends.
        queue_depth: most activations that a device may be ahead of the next one; None: no limit.

    >>> pair = {"version": 1, "devices": [{"name": "gpu", "count": 2, "memory": "16 GB"}],
    ...         "default_link": {"bandwidth": "12 GB/s", "latency": "5 us"}}
    >>> Cluster.model_validate(pair).link(0, 1).bandwidth
    12000000000.0
    """

    version: Literal[1]
    devices: Annotated[tuple[Devices, ...], Field(min_length=1)]
    default_link: Link | None = None
    links: tuple[NamedLink, ...] = ()
    buses: tuple[SharedBus, ...] = ()
    transfers: Literal["overlapped", "blocking"] = "overlapped"
    host: Host = Host()
    queue_depth: Annotated[int, Field(ge=1, strict=True)] | None = None

    @model_validator(mode="after")
    def _names(self) -> Cluster:
        for kind, names in (
            ("device", [*self.names, *(g.name for g in self.devices if g.count > 1)]),
            ("bus", [bus.name for bus in self.buses]),
        ):
            name, count = Counter(names).most_common(1)[0] if names else ("", 0)
            if count > 1:
                raise ValueError(f"{kind} name {name!r} is used twice: give another one")
        buses = [bus.name for bus in self.buses]
        places: list[tuple[str, Link]] = [(f"links[{i}]", x) for i, x in enumerate(self.links)]
        if self.default_link is not None:
            places.append(("default_link", self.default_link))
        for place, link in places:
            if link.bus is not None and link.bus not in buses:
                known = ", ".join(buses) or "none, give some in buses"
                raise ValueError(f"{place}.bus: unknown bus {link.bus!r}; buses: {known}")
        for index, link in enumerate(self.links):
            for name in link.between:
                if name not in self._members:
                    known = ", ".join(map(_shown, self.devices))
                    raise ValueError(
                        f"links[{index}].between: unknown device {name!r}; devices: {known}"
                    )
            joined = {d for name in link.between for d in self._members[name]}
            if len(joined) == 1:
                raise ValueError(f"links[{index}].between: joins {link.between[0]!r} to itself")
        return self

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of all devices.

        >>> groups = [{"name": "fast", "count": 2}, {"name": "slow"}]
        >>> Cluster.model_validate({"version": 1, "devices": groups}).names
        ('fast-0', 'fast-1', 'slow')
        """
        return tuple(
            f"{group.name}-{index}" if group.count > 1 else group.name
            for group in self.devices
            for index in range(group.count)
        )

    @cached_property
    def _groups(self) -> tuple[Devices, ...]:
        """Per device its group."""
        return tuple(group for group in self.devices for _ in range(group.count))

    @cached_property
    def _members(self) -> dict[str, range]:
        """Which devices a name stands for."""
        found = {name: range(index, index + 1) for index, name in enumerate(self.names)}
        start = 0
        for group in self.devices:
            found[group.name] = range(start, start + group.count)
            start += group.count
        return found

    def link(self, one: int, other: int) -> Link:
        """What joins two devices, by their numbers.

        Raises:
            ClusterError: if nothing does.
        """
        for link in reversed(self.links):
            first, second = (self._members[name] for name in link.between)
            if (one in first and other in second) or (other in first and one in second):
                return link
        if self.default_link is None:
            ends = f"{self.names[one]!r} and {self.names[other]!r}"
            raise ClusterError(f"no link joins {ends}: add one to links, or a default_link")
        return self.default_link

    def speed_and_memory(self, device: int) -> tuple[float, float]:
        """Speed factor and bytes of a device."""
        return self._groups[device].speed, self._groups[device].memory


def read(path: str | Path) -> Cluster:
    """Read a cluster file.

    Raises:
        ClusterError: in one line, with the path and the first offending field.

    >>> read("no/such/cluster.json")
    Traceback (most recent call last):
    ...
    ddg_sim.cluster.ClusterError: no/such/cluster.json: cannot be read: No such file or directory
    """
    text = read_text(path, ClusterError)
    try:
        return Cluster.model_validate_json(text)
    except ValidationError as error:
        raise ClusterError(f"{path}: {first_problem(error)}") from None
