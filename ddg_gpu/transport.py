"""Messages between processes, over torch.distributed point-to-point operations (gloo on CPUs).

Three facts shape this module. A gloo send is complete only once it was received, so a sender keeps
its tensor until then. A message travels only once its receive is posted, so receives are posted
ahead, as many as the channel has ring slots, and transfers overlap computation. Every wait has a
limit, so that a dead or hung neighbour ends the run instead of stopping it for ever.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ddg_gpu.execute import CREDIT_SHAPE
from ddg_gpu.value import Value, members
from ddg_sim.dependencies import Relation
from ddg_sim.lowering import Barrier, Message, Receive, channels, slots
from ddg_sim.schedule import OpKind, Schedule, ScheduleError

_KINDS = (Relation.ACTIVATION, Relation.GRADIENT, Relation.CREDIT)  # of messages between stages
#: Most tensors of one message.
MOST_MEMBERS = 16
_TAGS = MOST_MEMBERS + 1  # the number of examples may go ahead
Stream = tuple[Relation, int]  # what is received, and by which stage


class PeerLostError(RuntimeError):
    """A neighbour died or did not answer in time: the consequence of a failure, not its cause."""


def require_processes(schedule: Schedule) -> None:
    """Refuse what can be trained in one process only.

    Raises:
        ScheduleError: naming the method.

    >>> from ddg_sim.methods import pd_asgd
    >>> require_processes(pd_asgd(2))
    Traceback (most recent call last):
    ...
    ddg_sim.schedule.ScheduleError: pd-asgd: the two workers of stage 0 share its weights: take ...
    """
    if schedule.replicas > 1:
        raise ScheduleError(
            f"{schedule.method}: replicas {schedule.replicas} train in one process only: take the"
            " serial executor"
        )
    for stage in range(schedule.num_stages):
        if schedule.worker_of(stage, OpKind.FORWARD) != schedule.worker_of(stage):
            raise ScheduleError(
                f"{schedule.method}: the two workers of stage {stage} share its weights: take the"
                " serial executor"
            )


class GlooTransport:
    """Point-to-point messages of one worker.

    Args:
        schedule: tells which worker holds a stage.
        rank: index of this worker, which is its rank in the process group.
        buffer: makes the empty value that a message is received into.
        timeout: seconds that any wait may last.
        trusting: whether all processes surely have the same mini-batches. If not, the number of
            examples goes ahead of each value and is compared, as gloo says nothing of messages that
            are shorter than was expected, and waits for ever for longer ones. The value itself
            travels only then.

    Raises:
        ScheduleError: for a schedule that is for one process only, see `require_processes`.
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        buffer: Callable[[Message], Value],
        timeout: float,
        trusting: bool = True,
    ) -> None:
        require_processes(schedule)
        self._rank = {stage: schedule.worker_of(stage) for stage in range(schedule.num_stages)}
        self._buffer = buffer
        self._timeout = timedelta(seconds=timeout)
        self._trusting = trusting
        self._num_stages = schedule.num_stages
        self._incoming: Counter[Stream] = Counter()  # ring slots
        self._outgoing: Counter[Stream] = Counter()
        for channel, count in zip(channels(schedule), slots(schedule), strict=True):
            stream = (channel.relation, channel.target)
            if channel.dependency.target.worker == rank:
                self._incoming[stream] += count
            if channel.dependency.source.worker == rank:
                self._outgoing[stream] += count
        self._sent: dict[Stream, deque[_Transfer]] = defaultdict(deque)
        self._upcoming: deque[Iterator[Message]] = deque()
        self._future: dict[Stream, deque[Message]] = defaultdict(deque)
        self._posted: dict[Message, _Transfer] = {}
        self._arrived: dict[Message, Value] = {}

    def expect(self, messages: Iterator[Message]) -> None:
        """Say which messages will be received from now on; their receives are posted ahead."""
        self._upcoming.append(messages)
        waiting = Counter((message.relation, message.target) for message in self._posted)
        for stream, count in self._incoming.items():
            for _ in range(count - waiting[stream]):
                self._post(stream)

    def ready(self, instruction: Receive | Barrier) -> bool:
        """Always: this process holds one worker, which may simply wait."""
        return True

    def send(self, message: Message, value: Value) -> None:
        """Start a send; at most as many values are kept as the stream has ring slots.

        So a send waits only where the message that used the slot before has not been received,
        which the slots' number rules out in a healthy run. (Asking a gloo send whether it is
        complete would not do: it says no until it has been waited for.)

        Raises:
            PeerLostError: if the receiver is gone, or did not take that message within the limit.
        """
        stream = (message.relation, message.target)
        sent = self._sent[stream]
        while len(sent) >= self._outgoing[stream]:
            self._finish(sent.popleft(), message.target)
        tensors = [tensor.contiguous() for tensor in members(value)]
        if not self._trusting:
            tensors.insert(0, torch.tensor([len(tensors[0])]))
        sent.append(self._transfer(message, value, tensors, dist.isend, message.target))

    def receive(self, message: Message) -> Value:
        """Wait for a message, and post the receive of the next one of its stream.

        Raises:
            PeerLostError: if the sender is gone, or nothing came within the limit.
        """
        self.peek(message)
        return self._arrived.pop(message)

    def peek(self, message: Message) -> Value:
        """Wait for a message; it stays to be received.

        Raises:
            PeerLostError: if the sender is gone, or nothing came within the limit.
        """
        if message not in self._arrived:
            # Before a checkpoint, messages are looked at that nobody has said to expect.
            transfer = self._posted.pop(message, None) or self._receiving(message)
            self._wait(transfer, f"for {message}", message.source)
            if not self._trusting:
                transfer = self._check(transfer)
                self._wait(transfer, f"for {message}", message.source)
            self._arrived[message] = transfer.value
            self._post((message.relation, message.target))
        return self._arrived[message]

    def preload(self, messages: Mapping[Message, Value]) -> None:
        """Put messages there that were sent in an earlier process."""
        self._arrived.update(messages)

    def meet(self, barrier: Barrier) -> None:
        """Wait until all workers have come to the barrier."""
        try:
            dist.barrier()
        except RuntimeError as error:
            raise PeerLostError(f"waited at barrier {barrier.number} in vain: {error}") from None

    def close(self) -> None:
        """Wait until everything that was sent has been received."""
        for (_, target), sent in self._sent.items():
            while sent:
                self._finish(sent.popleft(), target)

    @property
    def kept(self) -> dict[Stream, int]:
        """Sent values that are kept now, per stream."""
        return {stream: len(sent) for stream, sent in self._sent.items()}

    def _finish(self, transfer: _Transfer, target: int) -> None:
        self._wait(transfer, f"until {transfer.message} was received", target)

    def _check(self, ahead: _Transfer) -> _Transfer:
        """Receive the value, if it has as many examples as were expected."""
        message, tensors = ahead.message, list(members(ahead.value))
        sent, expected = int(ahead.tensors[0]), len(tensors[0])
        if sent != expected:
            raise ValueError(
                f"{message}: stage {message.source} has {sent} examples, stage {message.target}"
                f" has {expected}: give all processes the same mini-batches"
            )
        return self._transfer(message, ahead.value, tensors, dist.irecv, message.source, 1)

    def _wait(self, transfer: _Transfer, what: str, stage: int) -> None:
        try:
            for work in transfer.works:
                work.wait(self._timeout)
        except RuntimeError as error:
            raise self._lost(error, f"waited {what}", stage) from None

    def _lost(self, error: RuntimeError, what: str, stage: int) -> PeerLostError:
        reason = str(error).splitlines()[0].rpartition("] ")[2]  # without gloo's source file
        return PeerLostError(
            f"{what}; worker {self._rank[stage]} (stage {stage}) is gone or did not"
            f" answer within {self._timeout.total_seconds():g} s: {reason}"
        )

    def _transfer(
        self,
        message: Message,
        value: Value,
        tensors: list[Tensor],
        start: Any,
        stage: int,
        first: int = 0,
    ) -> _Transfer:
        """Start the transfers of a message's tensors to or from the worker of a stage.

        ``first`` is how many of its tensors have been transferred.
        """
        if len(members(value)) > MOST_MEMBERS:
            raise ValueError(
                f"at most {MOST_MEMBERS} tensors pass between two stages, {message} has"
                f" {len(members(value))}"
            )
        tag = self._tag(message) + first
        try:
            works = [
                start(tensor, self._rank[stage], tag=tag + index)
                for index, tensor in enumerate(tensors)
            ]
        except RuntimeError as error:  # the connection is known to be broken
            raise self._lost(error, f"could not start {message}", stage) from None
        return _Transfer(message, value, tensors, works)

    def _post(self, stream: Stream) -> None:
        """Post the next receive of a stream, looking ahead in the program for it."""
        future = self._future[stream]
        while not future and self._upcoming:
            message = next(self._upcoming[0], None)
            if message is None:
                self._upcoming.popleft()
            elif message not in self._arrived:
                self._future[message.relation, message.target].append(message)
        if future:
            message = future.popleft()
            self._posted[message] = self._receiving(message)

    def _receiving(self, message: Message) -> _Transfer:
        """Post the receive of a message."""
        credit = message.relation is Relation.CREDIT
        value = torch.empty(CREDIT_SHAPE) if credit else self._buffer(message)
        tensors = list(members(value)) if self._trusting else [torch.zeros(1, dtype=torch.long)]
        return self._transfer(message, value, tensors, dist.irecv, message.source)

    def _tag(self, message: Message) -> int:
        """Tells apart all tensors between two ranks, which may hold several stages each."""
        kind = _KINDS.index(message.relation)
        sample = message.sample % 2**16  # a tag has 32 bits
        number = (len(_KINDS) * sample + kind) * self._num_stages + message.target
        return _TAGS * number


@dataclass(frozen=True, slots=True)
class _Transfer:
    """A message on its way; its tensors are kept until it is complete."""

    message: Message
    value: Value
    tensors: list[Tensor]
    works: list[Any]
