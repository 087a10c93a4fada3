"""How messages travel, beyond how long each takes: overlap, shared buses."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Sharing(Enum):
    """What a bus does with several transfers at once."""

    #: One after the other, in the order in which they were asked for.
    FIFO = "fifo"
    #: All at once, each at an equal part of the bus's speed (processor sharing).
    FAIR = "fair"


@dataclass(frozen=True, slots=True)
class Bus:
    """One medium that several directed links share, so that their transfers compete.

    Args:
        links: (source stage, target stage) pairs that it carries.
        sharing: who goes first.
    """

    links: frozenset[tuple[int, int]]
    sharing: Sharing = Sharing.FIFO


@dataclass(frozen=True, slots=True)
class Network:
    """How messages travel between workers.

    Without buses, each ordered pair of workers has a link of its own, which carries one message at
    a time in the order in which they were sent.

    Args:
        blocking: whether a worker that sends waits until its message has arrived; otherwise
            transfers overlap with computing.
        buses: media that links share.

    Raises:
        ValueError: naming the argument and its value.

    >>> Network(buses=(Bus(frozenset({(0, 1)})), Bus(frozenset({(0, 1), (1, 2)}))))
    Traceback (most recent call last):
    ...
    ValueError: buses: link (0, 1) is on two of them: put it on one
    """

    blocking: bool = False
    buses: tuple[Bus, ...] = ()

    def __post_init__(self) -> None:
        seen: set[tuple[int, int]] = set()
        for bus in self.buses:
            if twice := seen & bus.links:
                raise ValueError(f"buses: link {min(twice)} is on two of them: put it on one")
            seen |= bus.links


#: Links that overlap with computing and are shared by nobody.
FREE = Network()
