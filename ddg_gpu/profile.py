"""What every stage and link of a network costs on the machine at hand.

The costs are measured apart: each stage by itself, in one process, and each link between two idle
processes. No pipelined or decoupled run enters, so what is predicted from a profile is a
prediction.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter, sleep
from typing import Any

import torch
import torch.distributed as dist

from ddg_gpu.data import Batches, Dataset
from ddg_gpu.execute import run_serial
from ddg_gpu.job import Job, Network, make_stage, network
from ddg_gpu.partition import balanced_cuts
from ddg_gpu.processes import Progress, Report, run_together
from ddg_gpu.train import one_thread
from ddg_sim.methods import Semantics
from ddg_sim.profile import LinkProfile, Profile, StageProfile
from ddg_sim.schedule import OpKind

#: Mini-batches that are run before anything is timed (allocators and caches settle).
WARM_UP = 3
#: Ping-pongs per link.
ROUNDS = 30
#: Seconds in which a message has certainly arrived.
PAUSE = 0.01


def measure(
    job: Job,
    dataset: Dataset,
    iterations: int = 20,
    progress: Progress = lambda done, total: None,
) -> Profile:
    """Measure a profile: medians over ``iterations`` mini-batches, one thread per stage.

    Without ``job.cuts`` the network is cut where the largest measured stage time (forward +
    backward + update) is least; with them, where they say.

    Args:
        job: gives model, number of stages, batch size, optimizer and seed.
        dataset: the data.
        iterations: mini-batches to time, after a warm-up.
        progress: called with (steps finished, steps in all).

    Raises:
        ValueError: naming an argument that is wrong.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    steps, done = 3 if job.cuts is None and job.stages > 1 else 2, 0
    if steps == 3:
        job = replace(job, cuts=tuple(_measured_cuts(job, dataset, iterations)))
        progress(done := done + 1, steps)
    parts = network(job, dataset)
    stage_times = _times(job, dataset, iterations)
    progress(done := done + 1, steps)
    sizes = [4 * job.batch_size * shape.numel() for shape in parts.boundaries]
    links = _measure_links(sizes)
    progress(done + 1, steps)
    return Profile(
        version=1,
        model=job.model,
        data=dataset.name,
        batch_size=job.batch_size,
        device="cpu",
        threads=1,
        torch=str(torch.__version__),
        cuts=list(parts.cuts),
        stages=[
            _stage_profile(parts, k, times, links, sizes) for k, times in enumerate(stage_times)
        ],
        links=[
            LinkProfile(activation=link.transfer, gradient=link.transfer, bytes=size)
            for size, link in zip(sizes, links, strict=True)
        ],
    )


def _measured_cuts(job: Job, dataset: Dataset, iterations: int) -> list[int]:
    """Cuts that balance the measured times of single layers."""
    layers = len(network(replace(job, stages=1), dataset).model)
    if job.stages > layers:
        balanced_cuts([1.0] * layers, job.stages)  # says what is wrong
    single = replace(job, stages=layers, cuts=tuple(range(1, layers)))
    times = _times(single, dataset, iterations)
    return balanced_cuts(
        [sum(t[kind] for kind in (OpKind.FORWARD, OpKind.BACKWARD, OpKind.UPDATE)) for t in times],
        job.stages,
    )


def _times(job: Job, dataset: Dataset, iterations: int) -> list[dict[OpKind, float]]:
    """Median seconds per operation and stage, each stage by itself in this process.

    Backpropagation gives the times of forward, backward and update; the second forward pass of
    a replaying method is timed in a run of its own, as it changes what the first one keeps.
    """
    plain = replace(job, method="bp", sync=None, semantics=Semantics.STASH)
    replay = replace(job, method="ddg", sync=None, semantics=Semantics.REPLAY)
    found = _medians(plain, dataset, iterations)
    for times, again in zip(found, _medians(replay, dataset, max(1, iterations // 4)), strict=True):
        times[OpKind.RECOMPUTE] = again[OpKind.RECOMPUTE]
    return found


def _medians(job: Job, dataset: Dataset, iterations: int) -> list[dict[OpKind, float]]:
    schedule = job.schedule()
    parts = network(job, dataset)
    stages = [make_stage(job, schedule, module, k) for k, module in enumerate(parts.modules)]
    batches = Batches(dataset, job.batch_size, job.seed)
    with one_thread():
        spans = run_serial(schedule, stages, batches, WARM_UP + iterations).spans
    found: list[dict[OpKind, list[float]]] = [defaultdict(list) for _ in stages]
    for span in spans:
        if span.op is not None and span.op.iteration >= WARM_UP:
            found[span.op.stage][span.op.kind].append(span.duration)
    return [{kind: median(times) for kind, times in stage.items()} for stage in found]


def _stage_profile(
    parts: Network, index: int, times: dict[OpKind, float], links: list[LinkTimes], sizes: list[int]
) -> StageProfile:
    # Per iteration a stage sends and receives one message at each of its links. That work of the
    # host is spread over the stage's three operations (forward, backward, update).
    own = links[max(0, index - 1) : index + 1]
    module = parts.modules[index]
    return StageProfile(
        layers=[type(layer).__name__ for layer in module],
        forward=times[OpKind.FORWARD],
        backward=times[OpKind.BACKWARD],
        update=times[OpKind.UPDATE],
        recompute=times[OpKind.RECOMPUTE],
        overhead=sum(link.host for link in own) / 3,
        output_bytes=sizes[index] if index < len(sizes) else 0,
        parameter_bytes=sum(p.numel() * p.element_size() for p in module.parameters()),
    )


@dataclass(frozen=True, slots=True)
class LinkTimes:
    """Seconds of one message.

    Args:
        transfer: from one worker's hands to the other's, beyond what the hosts do for it.
        host: what a worker's own thread spends on sending one message and receiving one.
    """

    transfer: float
    host: float


def _measure_links(sizes: list[int]) -> list[LinkTimes]:
    """Times of messages of these sizes (bytes), between two otherwise idle processes."""
    if not sizes:
        return []
    first, _ = run_together(_ping_pong, 2, {"sizes": sizes})
    return [LinkTimes(*times) for times in first["times"]]


def _ping_pong(rank: int, given: dict[str, Any], _report: Report) -> dict[str, Any]:
    """Exchange messages as the executor does: the receive is posted ahead of the send."""
    return {"times": [_exchange(rank, size) for size in given["sizes"]]}


def _exchange(rank: int, size: int) -> tuple[float, float]:
    outgoing, incoming, peer = torch.zeros(size // 4), torch.empty(size // 4), 1 - rank
    trips, sends, receives = [], [], []
    for pause in (0.0, PAUSE):
        for _ in range(ROUNDS):
            receive: Any = dist.irecv(incoming, peer)
            dist.barrier()  # both receives are posted before anything is sent
            if rank == 0:
                start = perf_counter()
                send: Any = dist.isend(outgoing, peer)
                sent = perf_counter()
                sleep(pause)
                waiting = perf_counter()
                receive.wait()
                end = perf_counter()
                if pause:
                    receives.append(end - waiting)  # it has come already: only the host's part
                else:
                    sends.append(sent - start)
                    trips.append(end - start)  # there and back
            else:
                receive.wait()
                send = dist.isend(outgoing, peer)
            send.wait()
    if rank == 1:
        return 0.0, 0.0
    host = median(sends) + median(receives)
    return max(0.0, median(trips) / 2 - host), host
