"""The training loop. There is one, for every method and every executor.

It walks the lowered instructions of a worker. What differs between one process and many is only
the transport that carries the messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from ddg_gpu.stage import Stage
from ddg_sim.dependencies import Relation
from ddg_sim.lowering import Barrier, Instruction, Message, Receive, Send, instructions
from ddg_sim.schedule import Op, OpKind, Schedule, ScheduleError
from ddg_sim.timeline import Timeline, op_span, worker_lane


class Samples(Protocol):
    """Where the mini-batches come from; sample s must be the same in every process."""

    def inputs(self, sample: int) -> Tensor:
        """Inputs of a sample, shape (B, ...)."""

    def targets(self, sample: int) -> Tensor:
        """Labels of a sample, shape (B,)."""


class Transport(Protocol):
    """Carries messages between workers."""

    def send(self, message: Message, tensor: Tensor) -> None:
        """Hand a tensor over; it must not be changed afterwards."""

    def ready(self, instruction: Receive | Barrier) -> bool:
        """Whether the instruction would not wait for a worker of this process."""

    def receive(self, message: Message) -> Tensor:
        """Wait for a message's tensor."""

    def meet(self, barrier: Barrier) -> None:
        """Say that this worker has come to the barrier, and wait where others can come too."""


@dataclass(slots=True)
class Record:
    """What a worker did and when: per operation (op, start, end), in seconds of `perf_counter`."""

    spans: list[tuple[Op, float, float]] = field(default_factory=list)
    instructions: int = 0


#: Shape of the message that says that there is room for another activation: only its coming counts.
CREDIT_SHAPE = torch.Size((1,))

# Values between operations: (what, stage that uses it, sample).
Key = tuple[Relation, int, int]


def work(
    program: Iterator[Instruction],
    stages: Mapping[int, Stage],
    transport: Transport,
    samples: Samples,
    record: Record,
    on_sample: Callable[[int], None] = lambda sample: None,
) -> Iterator[None]:
    """Execute a worker's instructions; yields whenever it would wait for another worker here.

    Args:
        program: the lowered instructions of the worker.
        stages: the stages it holds, by index.
        transport: carries its messages.
        samples: the data.
        record: takes a span per operation.
        on_sample: called with each sample that the last stage has finished.
    """
    values: dict[Key, Any] = {}
    for instruction in program:
        match instruction:
            case Receive(message=message):
                while not transport.ready(instruction):
                    yield
                tensor = transport.receive(message)
                if message.relation is not Relation.CREDIT:
                    values[message.relation, message.target, message.sample] = tensor
            case Send(message=message) if message.relation is Relation.CREDIT:
                transport.send(message, torch.empty(CREDIT_SHAPE))
            case Send(message=message):
                key = (message.relation, message.target, message.sample)
                transport.send(message, values.pop(key))
            case Barrier():
                transport.meet(instruction)
                while not transport.ready(instruction):
                    yield
            case Op():
                start = perf_counter()
                _run(instruction, stages[instruction.stage], values, samples)
                record.spans.append((instruction, start, perf_counter()))
                if instruction.kind is OpKind.UPDATE and stages[instruction.stage].is_last:
                    on_sample(instruction.sample)
        record.instructions += 1


def _run(op: Op, stage: Stage, values: dict[Key, Any], samples: Samples) -> None:
    """Run one operation on its inputs; its outputs go where their consumers will look."""
    activation, gradient = Relation.ACTIVATION, Relation.GRADIENT
    if op.kind is OpKind.FORWARD:
        own = (activation, op.stage, op.sample)
        inputs = values.pop(own) if op.stage > 0 else samples.inputs(op.sample)
        targets = samples.targets(op.sample) if stage.has_loss else None
        output = stage.forward(op, inputs, targets)
        if not stage.is_last:
            values[activation, op.stage + 1, op.sample] = output
    elif op.kind is OpKind.RECOMPUTE:
        stage.recompute(op)
    elif op.kind in (OpKind.BACKWARD, OpKind.BACKWARD_INPUT):
        error = None if stage.has_loss else values.pop((gradient, op.stage, op.sample))
        result = stage.backward(op, error)
        if result is not None:
            values[gradient, op.stage - 1, op.sample] = result
    elif op.kind is OpKind.BACKWARD_WEIGHT:
        stage.backward(op)
    elif op.kind is OpKind.UPDATE:
        stage.update(op)
    else:
        raise ScheduleError(f"{op}: the torch backend does not run {op.kind.noun} operations")


class LocalTransport:
    """Messages between workers that take turns in one process."""

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._messages: dict[Message, Tensor] = {}
        self._met: dict[Barrier, int] = {}

    def send(self, message: Message, tensor: Tensor) -> None:
        """Keep the tensor until it is received."""
        self._messages[message] = tensor

    def ready(self, instruction: Receive | Barrier) -> bool:
        """Whether the message was sent, or everybody has come to the barrier."""
        if isinstance(instruction, Receive):
            return instruction.message in self._messages
        return self._met[instruction] == self._num_workers

    def receive(self, message: Message) -> Tensor:
        """Take the tensor of a message that is ready."""
        return self._messages.pop(message)

    def meet(self, barrier: Barrier) -> None:
        """Count one more worker at the barrier."""
        self._met[barrier] = self._met.get(barrier, 0) + 1
        # Nobody comes to a barrier before all have left the last but one.
        self._met.pop(Barrier(barrier.number - 2), None)


def run_serial(
    schedule: Schedule,
    stages: Sequence[Stage],
    samples: Samples,
    iterations: int,
    drain: bool = True,
    on_sample: Callable[[int], None] = lambda sample: None,
) -> Timeline:
    """Execute a schedule in this process; the reference that every other executor must equal.

    Args:
        schedule: what to run.
        stages: one per stage of the schedule; their weights are trained in place.
        samples: the data.
        iterations: iterations of samples that are fed.
        drain: whether to go on until all samples are used everywhere.
        on_sample: called with each sample that the last stage has finished.

    Raises:
        ScheduleError: if no worker can go on.
    """
    workers = range(len(schedule.workers))
    transport = LocalTransport(len(workers))
    records = [Record() for _ in workers]
    running = {
        worker: work(
            instructions(schedule, worker, iterations, drain),
            dict(enumerate(stages)),
            transport,
            samples,
            records[worker],
            on_sample,
        )
        for worker in workers
    }
    done = object()
    while running:
        before = sum(record.instructions for record in records)
        finished = [worker for worker, steps in running.items() if next(steps, done) is done]
        for worker in finished:
            del running[worker]
        if not finished and before == sum(record.instructions for record in records):
            raise ScheduleError(f"deadlock: workers {sorted(running)} wait for one another")
    return timeline(schedule, iterations, [record.spans for record in records])


def timeline(
    schedule: Schedule, iterations: int, workers: Sequence[Sequence[tuple[Op, float, float]]]
) -> Timeline:
    """Measured timeline of a run, in the simulator's format; time 0 is the first operation.

    Args:
        schedule: what was run.
        iterations: iterations of samples that were fed.
        workers: per worker its (operation, start, end), on one clock, in seconds.
    """
    origin = min((start for spans in workers for _, start, _ in spans[:1]), default=0.0)
    return Timeline.of(
        schedule,
        iterations,
        (
            op_span(worker_lane(schedule, worker), op, start - origin, end - origin)
            for worker, spans in enumerate(workers)
            for op, start, end in spans
        ),
    )
