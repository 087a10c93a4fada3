"""What every stage and link of a network costs on the machine at hand.

The costs are measured apart: each stage by itself, in one process, and each link between two idle
processes. No pipelined or decoupled run enters, so what is predicted from a profile is a
prediction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ddg_gpu.data import Batches, Dataset
from ddg_gpu.distributed import dataset_values
from ddg_gpu.execute import run_serial
from ddg_gpu.job import Job, Network, make_stage, network
from ddg_gpu.partition import balanced_cuts
from ddg_gpu.processes import Progress, Report, run_together
from ddg_gpu.train import one_thread
from ddg_sim.contention import Slowdown
from ddg_sim.methods import Semantics, bp
from ddg_sim.profile import LinkProfile, Profile, StageProfile
from ddg_sim.schedule import Op, OpKind

#: Mini-batches that are run before anything is timed (allocators and caches settle).
WARM_UP = 3
#: Samples of each kind of operation that a profile keeps.
KEPT = 64
#: Messages per link that are timed, and barriers.
ROUNDS = 20
#: Seconds that each kind of pass is timed alone, and beside the others', in each of so many turns.
TURN, TURNS = 0.05, 4
#: Most passes in one of these; all are kept until their backward pass.
MOST = 50
PASSES = (OpKind.FORWARD, OpKind.BACKWARD)
PAIRS = tuple(product(PASSES, PASSES))
#: Seconds of computing around a message; a waiting core has gone to sleep by then.
PAUSE = 0.005


@dataclass(frozen=True, slots=True)
class LinkTimes:
    """Seconds of one message.

    Args:
        transfer: from one worker's hands to the other's, beyond what the hosts do for it.
        host: what a worker's own thread spends on sending one message and receiving one.
    """

    transfer: float
    host: float


@dataclass(frozen=True, slots=True)
class SharedTimes:
    """What is measured between processes, rather than of one stage by itself.

    Args:
        links: per link.
        contention: per stage, how many times longer an operation of its own takes while all
            others run one: own kind, their kind.
        barrier: seconds from the last worker's coming to a barrier until all go on.
    """

    links: tuple[LinkTimes, ...]
    contention: tuple[Slowdown, ...]
    barrier: float


def measure(
    job: Job,
    dataset: Dataset,
    iterations: int = 20,
    progress: Progress = lambda done, total: None,
) -> Profile:
    """Measure a profile: medians over ``iterations`` mini-batches, one thread per stage.

    Without ``job.cuts`` the network is cut as `measured_cuts` says; with them, where they say.

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
    if job.cuts is None:
        job = replace(job, cuts=measured_cuts(job, dataset, iterations))
    progress(1, 3)
    samples = time_stages(job, dataset, iterations)
    progress(2, 3)
    shared = time_shared(job, dataset, min(TURNS, iterations))
    progress(3, 3)
    return summarise(job, dataset, [samples], [shared])


def measured_cuts(job: Job, dataset: Dataset, iterations: int) -> tuple[int, ...]:
    """Cuts for which the largest stage time (forward + backward + update) is least.

    Every layer is timed as a stage of its own.

    Args:
        job: gives model, number of stages, batch size, optimizer and seed.
        dataset: the data.
        iterations: mini-batches to time, after a warm-up.

    Raises:
        ValueError: if there are more stages than layers.
    """
    layers = len(network(replace(job, stages=1, cuts=None), dataset).model)
    balanced_cuts([1.0] * layers, job.stages)  # says what is wrong before anything is timed
    single = replace(job, stages=layers, cuts=tuple(range(1, layers)))
    seconds = [
        sum(median(times) for times in stage.values())
        for stage in _durations(single, dataset, iterations)
    ]
    return tuple(balanced_cuts(seconds, job.stages))


#: Per stage, the seconds of every operation of a kind that was timed.
Durations = list[dict[OpKind, list[float]]]


def time_stages(job: Job, dataset: Dataset, iterations: int) -> Durations:
    """Time the operations of every stage, each stage by itself in this process; seconds.

    Backpropagation gives the times of forward, backward and update; the second forward pass of
    a replaying method is timed in a run of its own, as it changes what the first one keeps.

    Args:
        job: what to time; its method does not matter.
        dataset: the data.
        iterations: mini-batches to time, after a warm-up (a quarter as many for the replay).
    """
    found = _durations(job, dataset, iterations)
    replay = replace(job, method="ddg", semantics=Semantics.REPLAY)
    for stage, again in zip(found, _durations(replay, dataset, -(-iterations // 4)), strict=True):
        stage[OpKind.RECOMPUTE] = again[OpKind.RECOMPUTE]
    return found


def _durations(job: Job, dataset: Dataset, iterations: int) -> Durations:
    if job.semantics is not Semantics.REPLAY:
        job = replace(job, method="bp", semantics=None)
    job = replace(job, sync=None)
    schedule = job.schedule()
    parts = network(job, dataset)
    stages = [make_stage(job, schedule, module, k) for k, module in enumerate(parts.modules)]
    batches = Batches(dataset, job.batch_size, job.seed)
    with one_thread():
        spans = run_serial(schedule, stages, batches, WARM_UP + iterations).spans
    found: Durations = [defaultdict(list) for _ in stages]
    for span in spans:
        if span.op is not None and span.op.iteration >= WARM_UP:
            found[span.op.stage][span.op.kind].append(span.duration)
    return found


def summarise(
    job: Job, dataset: Dataset, samples: Sequence[Durations], shared: Sequence[SharedTimes]
) -> Profile:
    """The profile of a job from what was timed: medians over all samples.

    Args:
        job: what was timed.
        dataset: the data.
        samples: what `time_stages` gave, once or more often.
        shared: what `time_shared` gave, once or more often.
    """
    parts = network(job, dataset)
    sizes = message_bytes(job, parts)
    links = [
        LinkTimes(median(link.transfer for link in same), median(link.host for link in same))
        for same in zip(*(found.links for found in shared), strict=True)
    ]
    factors = [
        {pair: median(factors[pair] for factors in same) for pair in same[0]}
        for same in zip(*(found.contention for found in shared), strict=True)
    ]
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
            _stage_profile(
                parts,
                k,
                {kind: _steadied([chunk[k][kind] for chunk in samples]) for kind in samples[0][k]},
                links,
                factors[k],
                sizes,
            )
            for k in range(job.stages)
        ],
        links=[
            LinkProfile(activation=link.transfer, gradient=link.transfer, bytes=size)
            for size, link in zip(sizes, links, strict=True)
        ],
        barrier=median(found.barrier for found in shared),
    )


def message_bytes(job: Job, parts: Network) -> list[int]:
    """Bytes of the message over each link, for a full mini-batch of float32."""
    return [4 * job.batch_size * shape.numel() for shape in parts.boundaries]


def _stage_profile(
    parts: Network,
    index: int,
    times: dict[OpKind, list[float]],
    links: Sequence[LinkTimes],
    contention: Slowdown,
    sizes: Sequence[int],
) -> StageProfile:
    own = links[max(0, index - 1) : index + 1]
    slowdown: dict[Any, dict[Any, float]] = defaultdict(dict)
    for (kind, other), factor in contention.items():
        slowdown[kind.name.lower()][other.name.lower()] = factor
    samples: dict[Any, list[float]] = {
        kind.name.lower(): _quantiles(found) for kind, found in times.items()
    }
    module = parts.modules[index]
    return StageProfile(
        layers=[type(layer).__name__ for layer in module],
        samples=samples,
        forward=median(times[OpKind.FORWARD]),
        backward=median(times[OpKind.BACKWARD]),
        update=median(times[OpKind.UPDATE]),
        recompute=median(times[OpKind.RECOMPUTE]),
        overhead=0.0,
        message=sum(link.host for link in own) / (2 * max(1, len(own))),  # one sent, one received
        contention=slowdown,
        output_bytes=sizes[index] if index < len(sizes) else 0,
        parameter_bytes=sum(p.numel() * p.element_size() for p in module.parameters()),
    )


def _steadied(chunks: Sequence[Sequence[float]]) -> list[float]:
    """All samples, each chunk's drift removed: its median is moved to that of all.

    What slows a machine for longer than a chunk slows all stages alike. As independent draws it
    would seem that stages wait for one another, which they do not.
    """
    overall = median(time for chunk in chunks for time in chunk)
    return [time * overall / median(chunk) for chunk in chunks for time in chunk]


def _quantiles(times: Sequence[float]) -> list[float]:
    """At most `KEPT` values with the same distribution, so that profiles stay small."""
    if len(times) <= KEPT:
        return sorted(times)
    return [float(value) for value in np.quantile(times, (np.arange(KEPT) + 0.5) / KEPT)]


def time_shared(job: Job, dataset: Dataset, turns: int = TURNS) -> SharedTimes:
    """Time messages between two idle processes, and stages beside each other.

    Args:
        job: what to time; its method does not matter.
        dataset: the data.
        turns: how often everything is measured beside the others; medians over them count.
    """
    sizes = message_bytes(job, network(job, dataset))
    if not sizes:
        return SharedTimes((), ({},), 0.0)
    first, second = run_together(_exchange, 2, {"sizes": sizes})
    links = tuple(
        LinkTimes(
            # A short message is there before the sender's call returns.
            transfer=max(0.0, median(b - a for a, b in zip(sent, received, strict=True))),
            host=median(sending) + median(receiving),
        )
        for sent, received, sending, receiving in zip(
            first["sent"], second["received"], first["sending"], second["receiving"], strict=True
        )
    )
    both = zip(first["came"], first["left"], second["left"], strict=True)
    beside = run_together(partial(_beside, job, turns), job.stages, dataset_values(dataset))
    return SharedTimes(
        links,
        tuple(dict(zip(PAIRS, result["contention"], strict=True)) for result in beside),
        barrier=median(max(left) - came for came, *left in both),
    )


def _beside(
    job: Job, turns: int, rank: int, given: dict[str, Any], _report: Report
) -> dict[str, Any]:
    """Forward and backward passes alone while the other stages wait, then beside theirs.

    All are measured in turns, so that a drift of the machine's speed cancels. Stages with even and
    odd numbers run all pairs of kinds; with more than two stages, some of the others run one's own
    kind meanwhile. Returns the ratios in the order of `PAIRS`:
    own kind, their kind.
    """
    stage = make_stage(job, bp(job.stages), network(job, Dataset(**given)).modules[rank], rank)
    inputs, targets, error = _stand_ins(job, Dataset(**given), rank)
    samples = updates = 0
    waiting: list[int] = []  # samples that had no backward pass yet

    def run(kind: OpKind, count: int) -> float:
        nonlocal samples
        start = perf_counter()
        for _ in range(count):
            if kind is OpKind.FORWARD:
                stage.forward(Op(kind, rank, samples, samples, updates), inputs, targets)
                waiting.append(samples)
                samples += 1
            else:
                sample = waiting.pop()
                stage.backward(Op(kind, rank, sample, sample, updates), error)
        return perf_counter() - start

    def timed(kind: OpKind, count: int, beside: bool) -> float:
        nonlocal updates
        # Beside others, it goes on after what counts: they must not find themselves alone.
        whole = 2 * count + 1 if beside else count
        if kind is OpKind.BACKWARD:
            run(OpKind.FORWARD, whole)
        if beside:
            dist.barrier()
        seconds = run(kind, count) / count
        run(kind, whole - count)
        run(OpKind.BACKWARD, len(waiting))
        updates += 1
        stage.update(Op(OpKind.UPDATE, rank, samples, samples, updates))
        return seconds

    counts = {
        kind: min(MOST, max(1, round(TURN / max(timed(kind, 1, False) for _ in range(WARM_UP)))))
        for kind in PASSES
    }
    ratios: dict[tuple[OpKind, OpKind], list[float]] = defaultdict(list)
    for _ in range(turns):
        alone: dict[OpKind, float] = {}
        for turn in range(job.stages):
            dist.barrier()
            if turn == rank:
                alone = {kind: timed(kind, counts[kind], False) for kind in PASSES}
        for even, odd in PAIRS:
            own, other = (even, odd) if rank % 2 == 0 else (odd, even)
            ratios[own, other].append(timed(own, counts[own], True) / alone[own])
    factors = [max(1.0, median(ratios[pair])) for pair in PAIRS]
    return {"contention": factors}


def _stand_ins(job: Job, dataset: Dataset, rank: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random tensors of the right shapes: a stage's inputs, labels, and error from above."""
    batches = Batches(dataset, job.batch_size, job.seed)
    boundaries = network(job, dataset).boundaries
    inputs = batches.inputs(0)
    if rank > 0:
        inputs = torch.randn(job.batch_size, *boundaries[rank - 1])
    is_last = rank == job.stages - 1
    error = None if is_last else 1e-3 * torch.randn(job.batch_size, *boundaries[rank])
    return inputs, batches.targets(0), error


def _exchange(rank: int, given: dict[str, Any], _report: Report) -> dict[str, Any]:
    """Send messages from rank 0 to rank 1 as the executor does: the receive is posted ahead.

    The sender computes until it sends. The receiver waits idly, as a worker without work does; in
    a second round it computes while the message comes, so that only the host's part is left.
    Times are on the clock that all processes of a machine share.
    """
    found: dict[str, Any] = {
        key: [] for key in ("sent", "sending", "received", "receiving", "came", "left")
    }
    for size in given["sizes"]:
        peer = 1 - rank
        for key in ("sent", "sending", "received", "receiving"):
            found[key].append([])
        for receiver_computes in (False, True):
            for _ in range(ROUNDS):
                tensor = torch.ones(size // 4)  # as in training, of memory just allocated
                if rank == 0:
                    dist.barrier()
                    _spin(PAUSE)
                    start = perf_counter()
                    send: Any = dist.isend(tensor, peer)
                    end = perf_counter()
                    send.wait()
                    if not receiver_computes:
                        found["sent"][-1].append(end)
                        found["sending"][-1].append(end - start)
                else:
                    receive: Any = dist.irecv(tensor, peer)
                    dist.barrier()  # the receive is posted before anything is sent
                    if receiver_computes:
                        _spin(3 * PAUSE)
                    start = perf_counter()
                    receive.wait()
                    end = perf_counter()
                    if receiver_computes:
                        found["receiving"][-1].append(end - start)
                    else:
                        found["received"][-1].append(end)
    for _ in range(ROUNDS):
        dist.barrier()
        if rank == 0:
            _spin(PAUSE)  # so it comes last
        found["came"].append(perf_counter())
        dist.barrier()
        found["left"].append(perf_counter())
    return found


def _spin(seconds: float) -> None:
    end = perf_counter() + seconds
    while perf_counter() < end:
        pass
