"""The training loop: one, for every method and every executor."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from time import perf_counter
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ddg_gpu.stage import Stage
from ddg_gpu.value import Value
from ddg_sim.dependencies import TRAVELS, Relation
from ddg_sim.lowering import (
    Barrier,
    Instruction,
    Message,
    Receive,
    Send,
    in_flight,
    instruction_ticks,
)
from ddg_sim.schedule import Op, OpKind, Schedule, ScheduleError
from ddg_sim.timeline import Timeline, op_span, worker_lane


class Samples(Protocol):
    """Where the mini-batches come from; sample s must be the same in every process."""

    def inputs(self, sample: int) -> Value:
        """Inputs of a sample, shape (B, ...)."""

    def targets(self, sample: int) -> Tensor:
        """Labels of a sample, shape (B,)."""


class Transport(Protocol):
    """Carries messages between workers."""

    def expect(self, messages: Iterator[Message]) -> None:
        """Say which messages will be received from now on, in order."""

    def send(self, message: Message, value: Value) -> None:
        """Hand a value over; it must not be changed afterwards."""

    def ready(self, instruction: Receive | Barrier) -> bool:
        """Whether the instruction would not wait for a worker of this process."""

    def receive(self, message: Message) -> Value:
        """Wait for a message's value."""

    def peek(self, message: Message) -> Value:
        """Wait for a message's value, which stays to be received."""

    def preload(self, messages: Mapping[Message, Value]) -> None:
        """Put messages there that were sent in an earlier process."""

    def meet(self, barrier: Barrier) -> None:
        """Say that this worker has come to the barrier, and wait where others can come too."""

    def close(self) -> None:
        """Wait until everything that was sent has been received."""


#: Iterations of an execution whose end is not known yet.
ENDLESS = 2**40
#: Operations that a record keeps; longer runs keep the last ones.
KEPT = 200_000


@dataclass(slots=True)
class Record:
    """What a worker did and when: per operation (op, start, end), in seconds of `perf_counter`."""

    spans: deque[tuple[Op, float, float]] = field(default_factory=lambda: deque(maxlen=KEPT))
    instructions: int = 0


@dataclass(frozen=True, slots=True)
class Before:
    """What was trained before an execution began: its samples and updates are counted on."""

    samples: int = 0
    updates: int = 0


NOTHING = Before()

#: Shape of a message of which only the coming counts: that there is room for another activation, or
#: that the other worker of a stage has left something in it.
CREDIT_SHAPE = torch.Size((1,))

# Values between operations: (what, stage that uses it, sample).
Key = tuple[Relation, int, int]
#: Called after each operation with (operation, its seconds); samples and versions count from the
#: very first, and of the samples of all replicas it is the last.
Watch = Callable[[Op, float], None]

_Transfer = TypeVar("_Transfer", Send, Receive)


class Execution:
    """Workers of a schedule at work in this process, tick by tick.

    Samples, versions and ticks count from the beginning of this execution; stages and data are
    told numbers that go on from what was there ``before``.

    Data-parallel replicas are all in this process, and never differ in their weights. So one stage
    serves all: it runs every operation once per replica, and its update takes the mean of all
    gradients. Sample s of replica r of R is mini-batch s R + r: by that number stages, data,
    messages and values know it.

    Args:
        schedule: what to run.
        workers: which of its workers are run here, in turns.
        stages: their stages, by index; the weights are trained in place.
        samples: the data.
        transport: carries messages to and from other workers.
        iterations: iterations of samples that are fed; `ENDLESS` until `drain` is called.
        before: what was trained before.
        start: tick from which on to run; what is in flight there comes through `restore`.
        watch: called after every operation.
        pace: called before every operation, with numbers that count from the beginning.

    Raises:
        ScheduleError: if stages are tied and share no parameter.
    """

    def __init__(
        self,
        schedule: Schedule,
        workers: Sequence[int],
        stages: Mapping[int, Stage],
        samples: Samples,
        transport: Transport,
        iterations: int = ENDLESS,
        before: Before = NOTHING,
        start: int = 0,
        watch: Watch = lambda op, seconds: None,
        pace: Callable[[Op], None] = lambda op: None,
    ) -> None:
        self.schedule = schedule
        self._pace = pace
        self.before = before
        self.tick = start
        self.iterations = iterations
        self.records = {worker: Record() for worker in workers}
        self.values: dict[Key, Value] = {}
        self._stages = stages
        self._samples = samples
        self._transport = transport
        self._watch = watch
        self._done = dict.fromkeys(workers, start)  # ticks
        self._stopped: str | None = None  # by an error
        for stage in stages.values():
            stage.tie(stages)
        self._begin()

    def advance(self, tick: int) -> None:
        """Run all workers of this process up to a tick, which is not run itself.

        Raises:
            ScheduleError: if no worker can go on.
            PeerLostError: if a worker elsewhere is gone, or does not answer in time.
            RuntimeError: if an error has stopped a worker before.
        """
        if self._stopped is not None:
            raise RuntimeError(f"cannot go on after an error: {self._stopped}")
        more, self.tick = tick - self.tick, tick
        for ahead in self._ahead.values():
            self._transport.expect(chain.from_iterable(islice(ahead, more)))
        while behind := [worker for worker, done in self._done.items() if done < tick]:
            before = self._progress()
            for worker in behind:
                try:
                    next(self._running[worker], None)
                except BaseException as error:
                    self._stopped = f"{type(error).__name__}: {error}"
                    raise
            if before == self._progress():
                raise ScheduleError(f"deadlock: workers {behind} wait for one another")

    def _progress(self) -> int:
        executed = sum(record.instructions for record in self.records.values())
        return executed + sum(self._done.values())

    def drain(self) -> None:
        """Feed no more, and go on until all samples are used everywhere.

        Raises:
            ScheduleError: if no worker can go on.
            PeerLostError: if a worker elsewhere is gone, or does not answer in time.
        """
        unused: list[Message] = []
        if self.iterations == ENDLESS:
            sent = {worker: self._in_flight(worker) for worker in self._running}
            self.iterations = self.tick
            self._begin()
            for worker, messages in sent.items():
                used = set(self._in_flight(worker))
                unused += [message for message in messages if message not in used]
        self.advance(self.schedule.num_ticks(self.iterations))
        self._transport.expect(iter(unused))
        for message in unused:  # such as the credit for a sample that never came
            self._transport.receive(message)
        self._transport.close()

    @property
    def fed(self) -> int:
        """Iterations that were fed."""
        return min(self.tick, self.iterations)

    def messages(self) -> dict[Message, Value]:
        """What was sent to the workers here and not yet received; it stays there to be received."""
        return {
            message: self._transport.peek(message)
            for worker in self._running
            for message in self._in_flight(worker)
        }

    def restore(self, messages: Mapping[Message, Value], values: Mapping[Key, Value]) -> None:
        """Put back what `messages` and ``values`` were."""
        self._transport.preload(messages)
        self.values.update(values)

    def _begin(self) -> None:
        """Take up the programs at the present tick."""
        self._running = {worker: self._work(worker) for worker in self._done}
        self._ahead = {worker: self._receives(worker) for worker in self._done}

    def _ticks(self, worker: int) -> Iterator[tuple[Instruction, ...]]:
        return instruction_ticks(self.schedule, worker, self.iterations, start=self._done[worker])

    def _receives(self, worker: int) -> Iterator[list[Message]]:
        """What a worker receives, tick by tick."""
        for tick in self._ticks(worker):
            found = chain.from_iterable(
                self._transfers(item) for item in tick if isinstance(item, Receive)
            )
            yield [own.message for own in found]

    def _in_flight(self, worker: int) -> list[Message]:
        """What was sent to a worker and not yet received."""
        found = in_flight(self.schedule, worker, self.tick, self.iterations)
        return [replace(m, sample=own) for m in found for own in self._mini_batches(m.sample)]

    def _transfers(self, instruction: _Transfer) -> list[_Transfer]:
        """A send or receive, once for every replica."""
        if self.schedule.replicas == 1:  # as nearly always, for every message
            return [instruction]
        message = instruction.message
        each = (replace(message, sample=own) for own in self._mini_batches(message.sample))
        return [replace(instruction, message=own) for own in each]

    def _mini_batches(self, sample: int) -> range:
        """The numbers of a sample, one for every replica."""
        replicas = self.schedule.replicas
        return range(sample * replicas, (sample + 1) * replicas)

    def _work(self, worker: int) -> Iterator[None]:
        """Execute a worker's instructions; yields whenever it would wait for another one here.

        It walks lowered instructions and knows no method. There is one such loop, for every method
        and every executor; what differs is the transport.
        """
        transport, record, values = self._transport, self.records[worker], self.values
        for number, tick in enumerate(self._ticks(worker), self._done[worker]):
            while number >= self.tick:
                yield
            for instruction in tick:
                match instruction:
                    case Op():
                        self._pace(instruction)
                        begin = perf_counter()
                        op = self._run(instruction)
                        end = perf_counter()
                        record.spans.append((instruction, begin, end))
                        self._watch(op, end - begin)
                    case Receive():
                        for receive in self._transfers(instruction):
                            while not transport.ready(receive):
                                yield
                            value = transport.receive(receive.message)
                            if receive.message.relation in TRAVELS:
                                values[_key(receive.message)] = value
                    case Send():
                        for send in self._transfers(instruction):
                            travels = send.message.relation in TRAVELS
                            value = (
                                values.pop(_key(send.message))
                                if travels
                                else torch.empty(CREDIT_SHAPE)
                            )
                            transport.send(send.message, value)
                    case Barrier():
                        transport.meet(instruction)
                        while not transport.ready(instruction):
                            yield
                record.instructions += 1
            self._done[worker] = number + 1

    def _run(self, instruction: Op) -> Op:
        """Run an operation on every replica.

        Returns the operation with numbers that count from the very first, on the last replica.
        """
        op, before = instruction, self.before
        version = op.version + before.updates
        once = op.kind in (OpKind.UPDATE, OpKind.ALL_REDUCE)
        for own in self._mini_batches(instruction.sample)[-1 if once else 0 :]:
            op = replace(op, sample=own + before.samples, version=version)
            self._run_one(op, own)
        return op

    def _run_one(self, op: Op, own: int) -> None:
        """Run one operation on its inputs; its outputs go where their consumers will look.

        Args:
            op: with the numbers that the stage knows.
            own: number of its sample in this execution.
        """
        stage, values, samples = self._stages[op.stage], self.values, self._samples
        activation, gradient = Relation.ACTIVATION, Relation.GRADIENT
        if op.kind is OpKind.FORWARD:
            key = (activation, op.stage, own)
            inputs = values.pop(key) if op.stage > 0 else samples.inputs(op.sample)
            targets = samples.targets(op.sample) if stage.has_loss else None
            output = stage.forward(op, inputs, targets)
            if not stage.is_last:
                values[activation, op.stage + 1, own] = output
        elif op.kind is OpKind.RECOMPUTE:
            stage.recompute(op)
        elif op.kind in (OpKind.BACKWARD, OpKind.BACKWARD_INPUT):
            error = None if stage.has_loss else values.pop((gradient, op.stage, own))
            result = stage.backward(op, error)
            if result is not None:
                values[gradient, op.stage - 1, own] = result
        elif op.kind is OpKind.BACKWARD_WEIGHT:
            stage.backward(op)
        elif op.kind is OpKind.UPDATE:
            stage.update(op)
        else:  # the update takes the mean over all replicas, which are all in this process
            assert op.kind is OpKind.ALL_REDUCE


def _key(message: Message) -> Key:
    return message.relation, message.target, message.sample


class LocalTransport:
    """Messages between workers that take turns in one process."""

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._messages: dict[Message, Value] = {}
        self._met: dict[Barrier, int] = {}

    def expect(self, messages: Iterator[Message]) -> None:
        """Nothing to prepare."""

    def send(self, message: Message, value: Value) -> None:
        """Keep the value until it is received."""
        self._messages[message] = value

    def ready(self, instruction: Receive | Barrier) -> bool:
        """Whether the message was sent, or everybody has come to the barrier."""
        if isinstance(instruction, Receive):
            return instruction.message in self._messages
        return self._met[instruction] == self._num_workers

    def receive(self, message: Message) -> Value:
        """Take the value of a message that is ready."""
        return self._messages.pop(message)

    def peek(self, message: Message) -> Value:
        """The value of a message that was sent, which stays to be received."""
        return self._messages[message]

    def preload(self, messages: Mapping[Message, Value]) -> None:
        """Put messages there that were sent in an earlier process."""
        self._messages.update(messages)

    def meet(self, barrier: Barrier) -> None:
        """Count one more worker at the barrier."""
        self._met[barrier] = self._met.get(barrier, 0) + 1
        # Nobody comes to a barrier before all have left the last but one.
        self._met.pop(Barrier(barrier.number - 2), None)

    def close(self) -> None:
        """Nothing is kept."""


def run_serial(
    schedule: Schedule,
    stages: Sequence[Stage],
    samples: Samples,
    iterations: int,
    drain: bool = True,
    watch: Watch = lambda op, seconds: None,
) -> Timeline:
    """Execute a schedule in this process; the reference that every other executor must equal.

    Args:
        schedule: what to run.
        stages: one per stage of the schedule; their weights are trained in place.
        samples: the data.
        iterations: iterations of samples that are fed.
        drain: whether to go on until all samples are used everywhere.
        watch: called after every operation.

    Raises:
        ScheduleError: if no worker can go on.
    """
    workers = range(len(schedule.workers))
    transport = LocalTransport(len(workers))
    execution = Execution(
        schedule, workers, dict(enumerate(stages)), samples, transport, iterations, watch=watch
    )
    if drain:
        execution.drain()
    else:
        execution.advance(iterations)
    return timeline(schedule, iterations, [execution.records[worker].spans for worker in workers])


def timeline(
    schedule: Schedule, iterations: int, workers: Sequence[Iterable[tuple[Op, float, float]]]
) -> Timeline:
    """Measured timeline of a run, in the simulator's format; time 0 is the first operation.

    Args:
        schedule: what was run.
        iterations: iterations of samples that were fed.
        workers: per worker its (operation, start, end), on one clock, in seconds.
    """
    origin = min((start for spans in workers for _, start, _ in islice(spans, 1)), default=0.0)
    return Timeline.of(
        schedule,
        iterations,
        (
            op_span(worker_lane(schedule, worker), op, start - origin, end - origin)
            for worker, spans in enumerate(workers)
            for op, start, end in spans
        ),
    )
