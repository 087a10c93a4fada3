"""What a process does of a job: train its stages, write snapshots, and go on from one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ddg_gpu import snapshots as store
from ddg_gpu.checkpoint import CheckpointError
from ddg_gpu.data import Batches, Dataset
from ddg_gpu.execute import Transport, Watch
from ddg_gpu.job import Job, Network, make_stage, network, num_iterations
from ddg_gpu.log import StageLog
from ddg_gpu.messages import message_buffer
from ddg_gpu.session import Session
from ddg_gpu.snapshots import Snapshot, Snapshots
from ddg_gpu.stage import Stage
from ddg_gpu.state import Tree, flatten, nest
from ddg_gpu.value import Value
from ddg_sim.lowering import Message
from ddg_sim.rule import TransformKind
from ddg_sim.schedule import Op, Schedule

#: Makes a transport: from the schedule, and what makes empty values for messages.
Connect = Callable[[Schedule, Callable[[Message], Value]], Transport]


@dataclass(frozen=True, slots=True)
class WorkerOutcome:
    """What a process hands back.

    Args:
        weights: parameters and buffers of its stages, by their names in the whole model.
        losses: (sample, loss) of the last stage; empty elsewhere.
        spans: per worker its (operation as text, start, end), in seconds on this machine's
            monotonic clock, since the last flush or the beginning of the process.
        iterations: that were fed since the last flush.
    """

    weights: dict[str, Tensor]
    losses: list[tuple[int, float]]
    spans: dict[int, list[tuple[str, float, float]]]
    iterations: int


def run_workers(
    job: Job,
    dataset: Dataset,
    connect: Connect,
    workers: Sequence[int] | None = None,
    watch: Watch = lambda op, seconds: None,
    snapshots: Snapshots | None = None,
    start: Path | None = None,
    log: Path | None = None,
) -> WorkerOutcome:
    """Run workers of a job in this process.

    Args:
        job: what to train; the same in every process.
        dataset: the data; the same in every process.
        connect: makes the transport to the other workers.
        workers: which workers are run here; all of them if None.
        watch: called after every operation.
        snapshots: where and when to write snapshots, if at all.
        start: a snapshot to go on from.
        log: folder for a line per update, see `StageLog`.

    Raises:
        PeerLostError: if another worker is gone, or does not answer in time.
        CheckpointError: if a snapshot cannot be written, or not be read, or is of another run.
    """
    schedule = job.schedule()
    parts = network(job, dataset)
    batches = Batches(dataset, job.batch_size, job.seed)
    workers = range(len(schedule.workers)) if workers is None else workers
    stages = {
        index: make_stage(job, schedule, parts, index, restorable=snapshots is not None)
        for index in range(schedule.num_stages)
        if schedule.worker_of(index) in workers
    }
    watches = [watch]

    def connected(first: int) -> Transport:
        def size(sample: int) -> int:
            return batches.size(first + sample)

        return connect(schedule, message_buffer(schedule, parts.boundaries, size))

    def watching(op: Op, seconds: float) -> None:
        for each in watches:
            each(op, seconds)

    session = Session(schedule, workers, stages, batches, connected, watching)
    total = num_iterations(job, batches)
    about = describe(job, dataset, parts)
    if start is not None:
        _restore(session, stages, store.read(start), about, total)
    lines = None if log is None else StageLog(log, stages)
    if lines is not None:
        watches.append(lines)
    while session.iteration < total:
        stop = total
        if snapshots is not None:
            stop = min(total, (session.iteration // snapshots.every + 1) * snapshots.every)
        session.advance(stop)
        if snapshots is not None:
            if snapshots.flush:
                session.flush()
            tensors, values = _collect(session)
            store.write(snapshots, stop, tensors, values, about)
    session.flush()
    if lines is not None:
        lines.close()
    weights = {
        name: tensor
        for stage in stages.values()
        for name, tensor in stage.module.state_dict().items()
    }
    losses = [
        item for k in stages if stages[k].is_last for item in sorted(stages[k].losses.items())
    ]
    spans = {
        worker: [(str(op), start, end) for op, start, end in record.spans]
        for worker, record in session.records.items()
    }
    return WorkerOutcome(weights, losses, spans, session.length)


def describe(job: Job, dataset: Dataset, parts: Network) -> dict[str, Any]:
    """What a snapshot and the run that goes on from it must have in common, as plain values.

    >>> from ddg_gpu.data import load
    >>> job, digits = Job("ddg", 2, "mlp", iterations=1), load("digits")
    >>> describe(job, digits, network(job, digits))["cuts"]
    [4]
    """
    schedule = job.schedule()
    return {
        "model": job.model,
        "data": dataset.name,
        "batch_size": job.batch_size,
        "seed": job.seed,
        "optimizer": job.optimizer,
        "learning_rate": job.step_size,
        "momentum": job.momentum,
        "weight_decay": job.weight_decay,
        "clip_norm": job.clip_norm,
        "milestones": list(job.milestones),
        "rate_factor": job.rate_factor,
        "precision": job.precision,
        "tied": bool(schedule.rule.values(TransformKind.TIED)),
        "schedule": str(schedule),
        "cuts": list(parts.cuts),
    }


_OF_THE_CUT = ("schedule", "cuts")


def _collect(session: Session) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The session's state as flat tensors and plain values."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for key, tree in session.state().items():
        found, values[key] = flatten(tree, key)
        tensors |= found
    return tensors, values


def _restore(
    session: Session,
    stages: Mapping[int, Stage],
    snapshot: Snapshot,
    about: Mapping[str, Any],
    total: int,
) -> None:
    """Go on from a snapshot.

    Raises:
        CheckpointError: if it is of another run, or of other stages with samples in flight.
    """
    for name, own in about.items():
        found = snapshot.description.get(name)
        if name not in _OF_THE_CUT and found != own:
            raise CheckpointError(
                f"{snapshot.path}: was made with {name} {found!r}, this run has {own!r}"
            )
    if snapshot.iteration > total:
        raise CheckpointError(
            f"{snapshot.path}: is after iteration {snapshot.iteration}, this run ends with {total}"
        )
    position = snapshot.values["position"]
    if all(snapshot.description.get(name) == about[name] for name in _OF_THE_CUT):
        state = _trees(snapshot, [f"stage {index}" for index in stages])
        session.restore({"position": position, **state})
        return
    if not position["flushed"]:
        raise CheckpointError(
            f"{snapshot.path}: has samples in flight on other stages or by another method: go on"
            " with the same, or write snapshots with --flush"
        )
    trees = _trees(snapshot, [key for key in snapshot.values if key != "position"])
    parts: dict[str, dict[str, Any]] = {"parameters": {}, "buffers": {}}
    for tree in trees.values():
        for part, records in tree["trained"].items():
            parts[part] |= records
    trained = {index: _taken_over(stage.state().trained, parts) for index, stage in stages.items()}
    session.take_over(trained, position)
    last = max(trees, key=lambda name: int(name.removeprefix("stage ")))
    for stage in stages.values():
        if stage.is_last:
            stage.losses.update(trees[last]["flight"]["samples"]["losses"])


def _taken_over(own: Tree, parts: Mapping[str, Mapping[str, Any]]) -> Tree:
    """The records of a stage, of what other stages have trained.

    What is new, an auxiliary head, starts as it is, but with the options that the optimizer has by
    now: those of the stage's other parameters.
    """
    found = {
        part: {
            name: record if name.startswith("head:") else parts[part].get(name, record)
            for name, record in records.items()
        }
        for part, records in own.items()
    }
    records = found["parameters"].values()
    known: Tree = next((record for record in records if "options" in record), {})
    now = {key: known[key] for key in ("options", "scheduler") if key in known}
    for name, record in found["parameters"].items():
        if name.startswith("head:") and "options" in record:
            found["parameters"][name] = record | now
    return found


def _trees(snapshot: Snapshot, keys: Sequence[str]) -> dict[str, Tree]:
    """The state of some stages."""
    tensors = snapshot.tensors(lambda name: name.split("/", 1)[0] in keys)
    return {key: nest(tensors, snapshot.values[key]) for key in keys}
