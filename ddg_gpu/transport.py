"""Messages between processes, over torch.distributed point-to-point operations (gloo on CPUs).

Three facts shape this module. A gloo send is complete only once it was received, so a sender keeps
its tensor until then. A message travels only once its receive is posted, so receives are posted
ahead, as many as the channel has ring slots, and transfers overlap computation. Every wait has a
limit, so that a dead or hung neighbour ends the run instead of stopping it for ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ddg_gpu.execute import CREDIT_SHAPE
from ddg_sim.dependencies import Relation
from ddg_sim.lowering import Barrier, Instruction, Message, Receive
from ddg_sim.schedule import Schedule

_KINDS = (Relation.ACTIVATION, Relation.GRADIENT, Relation.CREDIT)  # of messages between stages
Stream = tuple[Relation, int]  # what is received, and by which stage


class PeerLostError(RuntimeError):
    """A neighbour died or did not answer in time: the consequence of a failure, not its cause."""


class GlooTransport:
    """Point-to-point messages of one worker.

    Args:
        schedule: tells which worker holds a stage.
        program: the worker's instructions once more: its future receives, in order.
        incoming: ring slots of each stream that this worker receives.
        outgoing: ring slots of each stream that it sends.
        shape: shape of an activation's or gradient's tensor (float32).
        timeout: seconds that any wait may last.
    """

    def __init__(
        self,
        schedule: Schedule,
        program: Iterable[Instruction],
        incoming: dict[Stream, int],
        outgoing: dict[Stream, int],
        shape: Callable[[Message], torch.Size],
        timeout: float,
    ) -> None:
        self._rank = {stage: schedule.worker_of(stage) for stage in range(schedule.num_stages)}
        self._shape = shape
        self._timeout = timedelta(seconds=timeout)
        self._num_stages = schedule.num_stages
        self._sent: dict[Stream, deque[tuple[Message, Tensor, Any]]] = {}
        self._outgoing = outgoing
        self._future: dict[Stream, deque[Message]] = {stream: deque() for stream in incoming}
        self._upcoming = _receives(program)
        self._posted: dict[Message, tuple[Tensor, Any]] = {}
        for stream, count in incoming.items():
            for _ in range(count):
                self._post(stream)

    def ready(self, instruction: Receive | Barrier) -> bool:
        """Always: this process holds one worker, which may simply wait."""
        return True

    def send(self, message: Message, tensor: Tensor) -> None:
        """Start a send; at most as many tensors are kept as the stream has ring slots.

        So a send waits only where the message that used the slot before has not been received,
        which the slots' number rules out in a healthy run. (Asking a gloo send whether it is
        complete would not do: it says no until it has been waited for.)

        Raises:
            PeerLostError: if the receiver is gone, or did not take that message within the limit.
        """
        stream = (message.relation, message.target)
        sent = self._sent.setdefault(stream, deque())
        while len(sent) >= self._outgoing[stream]:
            self._finish(*sent.popleft())
        tensor = tensor.contiguous()
        work = dist.isend(tensor, self._rank[message.target], tag=self._tag(message))
        sent.append((message, tensor, work))

    def receive(self, message: Message) -> Tensor:
        """Wait for a message, and post the receive of the next one of its stream.

        Raises:
            PeerLostError: if the sender is gone, or nothing came within the limit.
        """
        tensor, work = self._posted.pop(message)
        self._wait(work, f"for {message}", message.source)
        self._post((message.relation, message.target))
        return tensor

    def meet(self, barrier: Barrier) -> None:
        """Wait until all workers have come to the barrier."""
        try:
            dist.barrier()
        except RuntimeError as error:
            raise PeerLostError(f"waited at barrier {barrier.number} in vain: {error}") from None

    def close(self) -> None:
        """Wait until everything that was sent has been received."""
        for sent in self._sent.values():
            while sent:
                self._finish(*sent.popleft())

    @property
    def kept(self) -> dict[Stream, int]:
        """Sent tensors that are kept now, per stream."""
        return {stream: len(sent) for stream, sent in self._sent.items()}

    def _finish(self, message: Message, _tensor: Tensor, work: Any) -> None:
        self._wait(work, f"until {message} was received", message.target)

    def _wait(self, work: Any, what: str, stage: int) -> None:
        try:
            work.wait(self._timeout)
        except RuntimeError as error:
            reason = str(error).splitlines()[0].rpartition("] ")[2]  # without gloo's source file
            raise PeerLostError(
                f"waited {what}; worker {self._rank[stage]} (stage {stage}) is gone or did not"
                f" answer within {self._timeout.total_seconds():g} s: {reason}"
            ) from None

    def _post(self, stream: Stream) -> None:
        """Post the next receive of a stream, looking ahead in the program for it."""
        future = self._future[stream]
        while not future:
            message = next(self._upcoming, None)
            if message is None:
                return
            self._future[message.relation, message.target].append(message)
        message = future.popleft()
        credit = message.relation is Relation.CREDIT
        tensor = torch.empty(CREDIT_SHAPE if credit else self._shape(message))
        work = dist.irecv(tensor, self._rank[message.source], tag=self._tag(message))
        self._posted[message] = (tensor, work)

    def _tag(self, message: Message) -> int:
        """Tells apart all messages between two ranks, which may hold several stages each."""
        kind = _KINDS.index(message.relation)
        return (len(_KINDS) * message.sample + kind) * self._num_stages + message.target


def _receives(program: Iterable[Instruction]) -> Iterator[Message]:
    for instruction in program:
        if isinstance(instruction, Receive):
            yield instruction.message
