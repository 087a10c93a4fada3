"""Clusters: devices, what joins them, and where the workers of a schedule live, as versioned JSON.

Quantities are text with a unit. A bare number is refused: nobody can tell later what it meant.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
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
from ddg_sim.network import FREE, Bus, Network, Sharing
from ddg_sim.profile import first_problem
from ddg_sim.schedule import OpKind, Schedule


class ClusterError(ValueError):
    """A cluster file that is missing, broken or invalid, or too small a cluster; one line."""


class TooFewDevicesError(ClusterError):
    """A cluster has fewer devices than a schedule has workers."""


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


@dataclass(frozen=True, slots=True)
class Placement:
    """What the devices and links under a schedule's workers cost.

    All replicas have the same stages and wait for one another, so of what differs between replicas
    the slowest, and the smallest, counts for all.

    Args:
        devices: how many are used, over all replicas.
        speeds: per worker.
        capacities: bytes, per worker.
        latency: seconds per message; link k joins stages k and k+1.
        bandwidth: bytes per second, per link.
        all_reduce_latency: seconds of a stage's all-reduce whatever its size, per stage.
        all_reduce_rate: its seconds per byte of parameters, per stage.
        overhead: host seconds per operation.
        message: host seconds per message sent or received.
        network: how messages travel.
        queue: see `Schedule`; 0 sets no limit.
    """

    devices: int
    speeds: tuple[float, ...]
    capacities: tuple[float, ...]
    latency: tuple[float, ...]
    bandwidth: tuple[float, ...]
    all_reduce_latency: tuple[float, ...]
    all_reduce_rate: tuple[float, ...]
    overhead: float = 0.0
    message: float = 0.0
    network: Network = FREE
    queue: int = 0


def place(schedule: Schedule, cluster: Cluster | None = None) -> Placement:
    """Put worker w of replica r on device r*W + w, of W workers, in the order of the file.

    A ring all-reduce of n bytes over R replicas takes 2(R-1)/R n/bandwidth + 2(R-1) latency
    seconds, with the slowest link of the ring (Patarasu and Yuan 2009). Links of the ring that
    share a bus share its bandwidth.

    Args:
        schedule: what to run.
        cluster: where; None is any number of equal devices with free links and unlimited memory.

    Raises:
        TooFewDevicesError: if there are fewer devices than workers.
        ClusterError: if nothing joins two devices that must talk, or links of several replicas
            share a bus.

    >>> from ddg_sim.methods import bp, data_parallel
    >>> cluster = Cluster.model_validate(
    ...     {"version": 1, "devices": [{"name": "gpu", "count": 4}],
    ...      "default_link": {"bandwidth": "1 GB/s", "latency": "1 ms"}})
    >>> place(data_parallel(bp(1), 4), cluster).all_reduce_latency  # 2 (4 - 1) times 1 ms
    (0.006,)
    >>> place(bp(8), cluster)
    Traceback (most recent call last):
    ...
    ddg_sim.cluster.TooFewDevicesError: 8 devices are needed (8 workers, 1 replica), but the
    cluster has 4
    """
    workers, replicas, stages = len(schedule.workers), schedule.replicas, schedule.num_stages
    needed = workers * replicas
    if cluster is None:
        free, none = (math.inf,) * (stages - 1), (0.0,) * stages
        return Placement(
            needed,
            (1.0,) * workers,
            (math.inf,) * workers,
            none[1:],
            free,
            none,
            none,
            queue=schedule.queue,
        )
    if needed > len(cluster.names):
        raise TooFewDevicesError(
            f"{needed} devices are needed ({workers} worker{'s' * (workers > 1)}, {replicas}"
            f" replica{'s' * (replicas > 1)}), but the cluster has {len(cluster.names)}"
        )
    firsts = range(0, needed, workers)  # per replica the device of its first worker
    found = [
        [cluster.speed_and_memory(first + worker) for first in firsts] for worker in range(workers)
    ]
    steps = [_joined(schedule, cluster, stage, firsts) for stage in range(stages - 1)]
    rings = [_ring(schedule, cluster, stage, firsts) for stage in range(stages)]
    limits = [queue for queue in (schedule.queue, cluster.queue_depth or 0) if queue]
    return Placement(
        devices=needed,
        speeds=tuple(min(speed for speed, _ in equal) for equal in found),
        capacities=tuple(min(memory for _, memory in equal) for equal in found),
        latency=tuple(max((link.latency for link in step), default=0.0) for step in steps),
        bandwidth=tuple(min((link.bandwidth for link in step), default=math.inf) for step in steps),
        all_reduce_latency=tuple(latency for latency, _ in rings),
        all_reduce_rate=tuple(rate for _, rate in rings),
        overhead=cluster.host.operation,
        message=cluster.host.message,
        network=Network(
            blocking=cluster.transfers == "blocking", buses=_buses(cluster, steps, replicas)
        ),
        queue=min(limits, default=0),
    )


def _joined(schedule: Schedule, cluster: Cluster, stage: int, firsts: Iterable[int]) -> list[Link]:
    """The links from a stage to the next one, over all replicas; none on the same device."""
    ends = {
        (schedule.worker_of(stage, kind), schedule.worker_of(stage + 1, kind))
        for kind in (OpKind.FORWARD, OpKind.UPDATE)
    }
    return [
        cluster.link(first + source, first + target)
        for first in firsts
        for source, target in sorted(ends)
        if source != target
    ]


def _ring(
    schedule: Schedule, cluster: Cluster, stage: int, firsts: Iterable[int]
) -> tuple[float, float]:
    """Seconds of a stage's ring all-reduce: those whatever its size, and those per byte."""
    ring = [first + schedule.worker_of(stage) for first in firsts]
    count = len(ring)
    if count == 1:
        return 0.0, 0.0
    links = [cluster.link(one, other) for one, other in pairwise([*ring, ring[0]])]
    sharing = Counter(link.bus for link in links if link.bus is not None)
    # On a bus every link of the ring sends at the same time.
    slowest = max((sharing[link.bus] if link.bus else 1) / link.bandwidth for link in links)
    steps = 2 * (count - 1)
    return steps * max(link.latency for link in links), steps / count * slowest


def _buses(cluster: Cluster, steps: list[list[Link]], replicas: int) -> tuple[Bus, ...]:
    carried: dict[str, set[tuple[int, int]]] = {}
    for stage, step in enumerate(steps):
        for link in step:
            if link.bus is not None:
                if replicas > 1:
                    raise ClusterError(
                        f"bus {link.bus!r} would be shared by {replicas} replicas, which is not"
                        " modelled: use 1 replica, or a link without a bus"
                    )
                carried.setdefault(link.bus, set()).update({(stage, stage + 1), (stage + 1, stage)})
    sharing = {bus.name: bus.sharing for bus in cluster.buses}
    return tuple(Bus(frozenset(links), sharing[name]) for name, links in carried.items())
