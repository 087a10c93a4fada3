"""Where the workers of a schedule live on a cluster, and what that makes things cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from ddg_sim.cluster import Cluster, ClusterError, Link
from ddg_sim.network import FREE, Bus, Network
from ddg_sim.schedule import OpKind, Schedule


class TooFewDevicesError(ClusterError):
    """A cluster has fewer devices than a schedule has workers."""


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
    ddg_sim.placement.TooFewDevicesError: 8 devices are needed (8 workers, 1 replica), but the
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
