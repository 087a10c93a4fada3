"""How long operations, messages and barriers take, timed in one process per stage.

A pass takes longer after an idle wait than right after another one (7 to 19 % were seen), and
longer beside other stages' passes than alone. So the stages' processes take turns, pass by pass,
as backpropagation lets them, and then compute side by side. Nothing is sent between them
meanwhile; messages are timed apart. No schedule is run, so what is predicted is a prediction.
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

import torch
import torch.distributed as dist
from torch import Tensor

from ddg_gpu.data import Batches, Dataset
from ddg_gpu.distributed import dataset_values
from ddg_gpu.job import Job, Network, make_stage, network
from ddg_gpu.processes import Report, run_together
from ddg_sim.contention import Slowdown
from ddg_sim.methods import Semantics
from ddg_sim.schedule import Op, OpKind

#: Mini-batches that are run before anything is timed (allocators and caches settle).
WARM_UP = 3
#: Rounds in which passes alone and passes beside others alternate: the machine's speed drifts.
TURNS = 4
#: Seconds that each pair of kinds is timed side by side, in each round.
BESIDE = 0.05
#: Most passes in one of these; all are kept until their backward pass.
MOST = 50
#: Messages per link that are timed, and barriers.
MESSAGES = 10
#: Seconds of computing before a message; the waiting core has gone to sleep by then.
PAUSE = 0.03
PASSES = (OpKind.FORWARD, OpKind.BACKWARD)
PAIRS = tuple(product(PASSES, PASSES))

#: Per stage, the seconds of every operation of a kind that was timed.
Durations = list[dict[OpKind, list[float]]]


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
class Timing:
    """What was timed of a job's stages; seconds.

    Args:
        durations: per stage and kind, operations alone, after an idle wait.
        contention: per stage, how many times longer an operation of its own takes while all
            others run one: own kind, their kind.
        links: per link.
        barrier: from the last worker's coming to a barrier until all go on.
    """

    durations: Durations
    contention: tuple[Slowdown, ...]
    links: tuple[LinkTimes, ...]
    barrier: float


def time_job(job: Job, dataset: Dataset, iterations: int) -> Timing:
    """Time a job's stages, messages and barriers.

    Args:
        job: what to time; its method does not matter.
        dataset: the data.
        iterations: mini-batches to time alone (a quarter as many for the replay).

    Raises:
        ValueError: if the job cannot be run on the data.
        WorkerError: if a process fails.
    """
    parts = network(job, dataset)
    given = {**dataset_values(dataset), "iterations": iterations}
    timed = run_together(partial(_stage_times, job), job.stages, given)
    links, barrier = _message_times(message_bytes(job, parts))
    return Timing(
        [{kind: stage[kind.name] for kind in _TIMED} for stage in timed],
        tuple(dict(zip(PAIRS, stage["contention"], strict=True)) for stage in timed)
        if job.stages > 1
        else ({},),
        links,
        barrier,
    )


def message_bytes(job: Job, parts: Network) -> list[int]:
    """Bytes of the message over each link, for a full mini-batch of float32."""
    return [4 * job.batch_size * shape.numel() for shape in parts.boundaries]


_TIMED = (*PASSES, OpKind.UPDATE, OpKind.RECOMPUTE)


class _Passes:
    """One stage that runs operations on stand-ins of the right shapes, and times them."""

    def __init__(self, job: Job, dataset: Dataset, rank: int) -> None:
        parts = network(job, dataset)
        batches = Batches(dataset, job.batch_size, job.seed)
        self._rank = rank
        self._stage = make_stage(job, job.schedule(), parts, rank)
        self._inputs = batches.inputs(0)
        if rank > 0:
            self._inputs = torch.randn(job.batch_size, *parts.boundaries[rank - 1])
        self._targets = batches.targets(0)
        self._error: Tensor | None = None
        if rank < job.stages - 1:
            self._error = 1e-3 * torch.randn(job.batch_size, *parts.boundaries[rank])
        self._samples = self._updates = 0
        self._waiting: list[int] = []  # samples that had no backward pass yet
        self._differentiated = 0  # the last one that had

    def run(self, kind: OpKind, count: int = 1) -> float:
        """Run so many operations; returns their seconds."""
        start = perf_counter()
        for _ in range(count):
            if kind is OpKind.FORWARD:
                self._stage.forward(self._op(kind, self._samples), self._inputs, self._targets)
                self._waiting.append(self._samples)
                self._samples += 1
            elif kind is OpKind.RECOMPUTE:
                self._stage.recompute(self._op(kind, self._waiting[-1]))
            elif kind is OpKind.BACKWARD:
                self._differentiated = self._waiting.pop()
                self._stage.backward(self._op(kind, self._differentiated), self._error)
            else:
                self._updates += 1
                self._stage.update(self._op(kind, self._differentiated))
        return perf_counter() - start

    def finish(self) -> None:
        """Run the backward passes that are due, and an update."""
        self.run(OpKind.BACKWARD, len(self._waiting))
        self.run(OpKind.UPDATE)

    def _op(self, kind: OpKind, sample: int) -> Op:
        return Op(kind, self._rank, sample, sample, self._updates)


def _stage_times(job: Job, rank: int, given: dict[str, Any], _report: Report) -> dict[str, Any]:
    """Time one stage, in turns with the others and beside them.

    Returns by kind's name the seconds of operations alone, and under "contention", in the order of
    `PAIRS`, how many times longer its own kind takes beside theirs. Stages with even and odd
    numbers run all pairs of kinds; with more than two stages, some of the others run one's own
    kind meanwhile.
    """
    iterations = given.pop("iterations")
    dataset = Dataset(**given)
    bp = replace(job, method="bp", sync=None, semantics=None, options={})
    passes = _Passes(bp, dataset, rank)
    replay = _Passes(replace(bp, method="ddg", semantics=Semantics.REPLAY), dataset, rank)
    found: dict[OpKind, list[float]] = defaultdict(list)
    beside: dict[tuple[OpKind, OpKind], list[float]] = defaultdict(list)

    def in_turns(passes: _Passes, *order: tuple[OpKind, ...]) -> None:
        """Each stage runs its operations of the first entry, then of the second, backwards."""
        there = range(job.stages)
        for kinds, ranks in zip(order, (there, reversed(there)), strict=True):
            for turn in ranks:
                dist.barrier()
                for kind in kinds if turn == rank else ():
                    found[kind].append(passes.run(kind))

    for one in (passes, replay):
        for _ in range(WARM_UP):
            one.run(OpKind.FORWARD)
            if one is replay:
                one.run(OpKind.RECOMPUTE)
            one.finish()
    count = {
        kind: min(MOST, max(1, round(BESIDE / max(passes.run(kind), 1e-6)))) for kind in PASSES
    }
    passes.run(OpKind.UPDATE)
    turns = min(TURNS, iterations)
    for _ in range(turns):
        for _ in range(-(-iterations // turns)):
            in_turns(passes, (OpKind.FORWARD,), (OpKind.BACKWARD, OpKind.UPDATE))
        for _ in range(-(-iterations // (4 * turns))):
            replay.run(OpKind.FORWARD)
            in_turns(replay, (), (OpKind.RECOMPUTE,))
            replay.finish()
        for even, odd in PAIRS if job.stages > 1 else ():
            own, other = (even, odd) if rank % 2 == 0 else (odd, even)
            beside[own, other].append(_beside(passes, own, count[own]))
    alone = {kind: median(found[kind]) for kind in PASSES}
    return {
        **{kind.name: found[kind] for kind in _TIMED},
        "contention": [
            max(1.0, median(beside[own, other]) / alone[own]) if beside else 1.0
            for own, other in PAIRS
        ],
    }


def _beside(passes: _Passes, kind: OpKind, count: int) -> float:
    """Seconds of one pass while the other processes are here too.

    It goes on after what counts: they must not find themselves alone.
    """
    whole = 2 * count + 1
    if kind is OpKind.BACKWARD:
        passes.run(OpKind.FORWARD, whole)
    dist.barrier()
    seconds = passes.run(kind, count) / count
    passes.run(kind, whole - count)
    passes.finish()
    return seconds


def _message_times(sizes: Sequence[int]) -> tuple[tuple[LinkTimes, ...], float]:
    """Times of a message over each link, and of a barrier, between two idle processes."""
    if not sizes:
        return (), 0.0
    first, second = run_together(_exchange, 2, {"sizes": list(sizes)})
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
    return links, median(max(left) - came for came, *left in both)


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
            for _ in range(MESSAGES):
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
    for _ in range(MESSAGES):
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
