"""How messages travel, beyond how long each takes: overlap, queues, shared buses."""

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
        queue_depth: most messages of a stream that may be on their way or waiting, the one in use
            included; the next one's transfer begins only when a place is free. None: no limit.
        buses: media that links share.

    Raises:
        ValueError: naming the argument and its value.

    >>> Network(queue_depth=0)
    Traceback (most recent call last):
    ...
    ValueError: queue_depth is 0: give at least 1, or None for no limit
    """

    blocking: bool = False
    queue_depth: int | None = None
    buses: tuple[Bus, ...] = ()

    def __post_init__(self) -> None:
        if self.queue_depth is not None and self.queue_depth < 1:
            raise ValueError(
                f"queue_depth is {self.queue_depth}: give at least 1, or None for no limit"
            )
        seen: set[tuple[int, int]] = set()
        for bus in self.buses:
            if twice := seen & bus.links:
                raise ValueError(f"buses: link {min(twice)} is on two of them: put it on one")
            seen |= bus.links


#: Links that overlap with computing, never fill up and are shared by nobody.
FREE = Network()
