"""Decoupled training for a loop of your own: ordinary modules, optimizers and data loaders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddg_gpu.boundaries import Boundary, boundaries
from ddg_gpu.execute import LocalTransport, Transport, timeline
from ddg_gpu.messages import message_buffer
from ddg_gpu.options import USUAL, StageOptions
from ddg_gpu.session import Session
from ddg_gpu.stage import Stage
from ddg_gpu.step import OptimizerFactory
from ddg_gpu.transport import GlooTransport, PeerLostError
from ddg_gpu.value import Value, checked, members
from ddg_sim.dependencies import Relation, dependencies
from ddg_sim.lowering import Message
from ddg_sim.rule import TransformKind
from ddg_sim.schedule import Op, OpKind, Schedule, ScheduleError
from ddg_sim.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Finished:
    """A step whose gradients every stage has applied but those that are still on their way.

    Args:
        step: number of the `Trainer.step` call that fed it, from 0 on.
        loss: its training loss; the mean over its micro-batches.
    """

    step: int
    loss: float


class Trainer:
    """Trains the stages of a network by a schedule.

    Alone, a process runs all stages in turns, which is for trying things out. In a process group of
    as many processes as the schedule has workers (torchrun), every process runs its own worker;
    all of them make the same `step` calls, each with at least the data that its stages need.

    Args:
        schedule: the training method, such as ``ddg(2)`` from `ddg_sim.methods`.
        modules: the K stages, as from `ddg_gpu.partition.split`; trained in place, on their device.
        optimizer: makes the optimizer of a list of parameters.
        loss: of the last stage's outputs and the targets; a scalar tensor.
        example: inputs of one mini-batch. Several processes need it, to know what will be sent.
        timeout: seconds that any wait for another process may last.
        seed: of dropout and other randomness inside the stages.
        heads: with local losses (DGL), the auxiliary head of every stage but the last.
        options: clipping, learning rate's schedule, precision and more, see `StageOptions`.

    Raises:
        ScheduleError: for whatever the schedule asks for that is not implemented.
        ValueError: if modules and schedule, or processes and schedule, do not fit.

    >>> from ddg_sim.methods import ddg
    >>> modules = [nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 2))]
    >>> trainer = Trainer(ddg(2), modules, lambda weights: torch.optim.SGD(weights, lr=0.1))
    >>> x, y = torch.randn(16, 4), torch.randint(2, (16,))
    >>> trainer.step(x, y).step
    0
    >>> rest = trainer.flush()
    >>> accuracy = trainer.evaluate([(x, y)])
    """

    def __init__(
        self,
        schedule: Schedule,
        modules: Sequence[nn.Module],
        optimizer: OptimizerFactory,
        loss: Callable[[Any, Any], Tensor] = nn.functional.cross_entropy,
        *,
        example: Value | None = None,
        timeout: float = 120.0,
        seed: int = 0,
        heads: Sequence[nn.Module] | None = None,
        options: StageOptions = USUAL,
    ) -> None:
        if len(modules) != schedule.num_stages:
            raise ValueError(
                f"modules must be {schedule.num_stages}, one per stage of {schedule.method},"
                f" got {len(modules)}"
            )
        _check_shared(schedule, modules)
        if any(edge.tokens < 0 for edge in dependencies(schedule)):
            raise ScheduleError(
                f"{schedule.method}: a step of one worker waits for a later step of another:"
                " number its iterations so that it does not"
            )
        workers: Sequence[int] = range(len(schedule.workers))
        self._connected = dist.is_available() and dist.is_initialized()
        self._crossing: list[Boundary] = []
        self._evaluated: list[Boundary] = []  # the same in full precision
        if self._connected:
            workers = [_rank(len(workers))]
            if example is None:
                raise ValueError("example must be given where several processes train")
            self._crossing = boundaries(modules, example, options.precision)
            self._evaluated = boundaries(modules, example)
        self.schedule = schedule
        self.modules = list(modules)
        self._parts = schedule.samples_per_iteration * schedule.replicas  # of a mini-batch
        self._timeout = timeout
        self._stages = {
            index: Stage(
                module,
                index,
                schedule,
                optimizer,
                seed,
                loss,
                head=None if heads is None or index >= len(heads) else heads[index],
                options=options,
            )
            for index, module in enumerate(modules)
            if schedule.worker_of(index) in workers
        }
        self._fed: dict[int, tuple[Value, Any]] = {}
        self._applied: list[int] = []  # samples of the last stage
        self._session = Session(
            schedule, workers, self._stages, self, self._connect, watch=self._watch
        )

    def step(self, inputs: Value, targets: Any) -> Finished | None:
        """Feed a mini-batch, and run one iteration of the schedule.

        Where the schedule takes several samples per iteration (micro-batches, replicas), the
        mini-batch is divided into as many parts, as equal as can be. Every part counts the same in
        the mean, so where they are not equal, examples of smaller parts count a little more.

        Args:
            inputs: (B, ...) a tensor, or a flat tuple of tensors.
            targets: (B, ...) a tensor, or a flat tuple of tensors.

        Returns:
            The mini-batch that the last stage applied in this step: usually an older one. None
            if there is none yet, and in processes that do not hold the last stage.

        Raises:
            ValueError: if inputs and targets are not of one batch size, or fewer than the parts.
            PeerLostError: if another process is gone, or does not answer in time.
        """
        parts = self._parts
        size = _batch_size(checked(inputs, "inputs"), checked(targets, "targets"))
        if size < parts:
            raise ValueError(f"inputs must have at least {parts} examples, got {size}")
        divided = zip(_divide(inputs, parts), _divide(targets, parts), strict=True)
        for number, part in enumerate(divided, self._session.fed):
            self._fed[number] = part
        iteration = self._session.iteration
        self._session.advance(iteration + 1)
        oldest = (iteration + 1 - self.schedule.num_ticks(0)) * parts
        for number in [sample for sample in self._fed if sample < oldest]:
            del self._fed[number]
        return next(iter(self._finished()), None)

    def flush(self) -> list[Finished]:
        """Go on until every sample is applied by every stage; the next step begins a new pipeline.

        Returns:
            The mini-batches that the last stage applied meanwhile.

        Raises:
            PeerLostError: if another process is gone, or does not answer in time.
        """
        self._session.flush()
        self._fed.clear()
        return self._finished()

    def evaluate(
        self,
        batches: Iterable[tuple[Value, Any]],
        score: Callable[[Any, Any], float] | None = None,
    ) -> float:
        """Mean score over test batches, with the weights of now; samples may be in flight.

        It is computed in full precision, whatever the training's.

        Args:
            batches: (inputs, targets); with several processes, the same in each of them.
            score: of outputs and targets, a mean over the batch; by default the fraction of
                outputs (B, C, ...) whose largest entry along C is the target (B, ...).

        Returns:
            The mean over all examples, the same in all processes.

        Raises:
            ValueError: if there are no batches.
            PeerLostError: if another process is gone, or does not answer in time.
        """
        score = score or _accuracy
        total, count = 0.0, 0
        with torch.no_grad(), _evaluating(stage.module for stage in self._stages.values()):
            for inputs, targets in batches:
                size = _batch_size(inputs, targets)
                outputs = self._forward(inputs, size)
                if outputs is not None:
                    total += size * float(score(outputs, targets))
                count += size
        if not count:
            raise ValueError("batches is empty: there is nothing to evaluate")
        if self._connected:
            shared = torch.tensor([total], dtype=torch.float64)
            last = self.schedule.worker_of(self.schedule.num_stages - 1)
            self._wait(lambda: dist.broadcast(shared, last, async_op=True), last)
            total = float(shared)
        return total / count

    @property
    def iteration(self) -> int:
        """How many steps were made."""
        return self._session.iteration

    def state_dict(self) -> dict[str, Any]:
        """Everything that this process holds, samples in flight included.

        It consists of tensors and plain values, so that ``torch.load(…, weights_only=True)`` reads
        it. The tensors are the trainer's own: save or copy them before the next step. Samples in
        flight need ``StageOptions(restorable=True)``, or a `flush` before.

        Raises:
            RuntimeError: if the stages do not keep what this needs.
            PeerLostError: if another process is gone, or does not answer in time.
        """
        fed = {sample: list(pair) for sample, pair in self._fed.items()}
        return {"schedule": str(self.schedule), "session": self._session.state(), "fed": fed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave in a process with the same stages.

        Alone, a process may do so at any time, such as after an error; of several, all do so before
        any step, as messages may be on their way later.

        Raises:
            ValueError: if it is of another schedule.
            RuntimeError: if there are several processes, and steps were made.
        """
        if self._connected and self.iteration:
            raise RuntimeError(
                f"with several processes a state is loaded before any step, not after"
                f" {self.iteration}: make a new trainer"
            )
        needed = {"position", *(f"stage {index}" for index in self._stages)}
        if not isinstance(state, Mapping) or not {"schedule", "session", "fed"} <= state.keys():
            raise ValueError("state must be what state_dict of a trainer gave")
        if missing := needed - state["session"].keys():
            raise ValueError(f"state is of another process: it has no {', '.join(sorted(missing))}")
        if state["schedule"] != str(self.schedule):
            raise ValueError(
                f"state is of another schedule than {self.schedule.method} on"
                f" {self.schedule.num_stages} stages: {state['schedule'].splitlines()[0]}"
            )
        self._fed = {sample: (pair[0], pair[1]) for sample, pair in state["fed"].items()}
        self._applied.clear()
        self._session.restore(state["session"])

    @property
    def timeline(self) -> Timeline:
        """What the workers of this process did, and when, since the last flush but one."""
        spans = self._session.records
        workers = range(len(self.schedule.workers))
        return timeline(
            self.schedule,
            self._session.length,
            [spans[worker].spans if worker in spans else () for worker in workers],
        )

    # What the executor asks for.

    def inputs(self, sample: int) -> Value:
        """Inputs of a sample that was fed."""
        return self._fed[sample][0]

    def targets(self, sample: int) -> Any:
        """Targets of a sample that was fed."""
        return self._fed[sample][1]

    def _watch(self, op: Op, _seconds: float) -> None:
        if op.kind is OpKind.UPDATE and op.stage == self.schedule.num_stages - 1:
            self._applied.append(op.sample)

    def _finished(self) -> list[Finished]:
        """The steps whose last sample was applied by the last stage, with their losses."""
        parts = self._parts
        losses = self._stages[self.schedule.num_stages - 1].losses if self._applied else {}
        found = []
        for last in self._applied:
            values = [losses.pop(sample) for sample in range(last - parts + 1, last + 1)]
            found.append(Finished(last // parts, fmean(values)))
        self._applied.clear()
        for index, stage in self._stages.items():
            if index < self.schedule.num_stages - 1:
                stage.losses.clear()  # local ones
        return found

    def _connect(self, first: int) -> Transport:
        if not self._connected:
            return LocalTransport(len(self.schedule.workers))

        def size(sample: int) -> int:
            return _batch_size(*self._fed[first + sample])

        buffer = message_buffer(self.schedule, self._crossing, size)
        return GlooTransport(self.schedule, dist.get_rank(), buffer, self._timeout, trusting=False)

    def _forward(self, value: Value | None, size: int) -> Any:
        """The last stage's outputs in its process, None elsewhere."""
        for index in range(self.schedule.num_stages):
            own = index in self._stages
            if own:
                value = self.modules[index](value)
            if not self._connected or index == self.schedule.num_stages - 1:
                continue
            source, target = map(self.schedule.worker_of, (index, index + 1))
            if source == target:
                continue
            if own:
                for tensor in members(value):
                    ready = tensor.contiguous()
                    self._wait(partial(dist.isend, ready, target, tag=_EVALUATION), target)
                value = None
            elif index + 1 in self._stages:
                crossing = Message(Relation.ACTIVATION, index, index + 1, 0)
                value = message_buffer(self.schedule, self._evaluated, lambda _: size)(crossing)
                for tensor in members(value):
                    self._wait(partial(dist.irecv, tensor, source, tag=_EVALUATION), source)
        return value if self.schedule.num_stages - 1 in self._stages else None

    def _wait(self, start: Callable[[], Any], worker: int) -> None:
        """Start a transfer of an evaluation, and wait until it is complete."""
        try:
            start().wait(timedelta(seconds=self._timeout))
        except RuntimeError as error:
            raise PeerLostError(
                f"evaluation: worker {worker} is gone or did not answer within {self._timeout:g} s:"
                f" {str(error).splitlines()[0]}"
            ) from None


#: Tag of messages of an evaluation; those of training are below.
_EVALUATION = 2**31 - 1


def _rank(workers: int) -> int:
    """This process's worker.

    Raises:
        ValueError: if there are more or fewer processes, or no device for their backend.
    """
    if dist.get_backend() == "nccl" and not torch.cuda.is_available():
        raise ValueError(
            "the process group's backend is nccl, which needs a GPU per process, and there is none"
            " here: initialise it with gloo"
        )
    if dist.get_world_size() != workers:
        raise ValueError(
            f"the schedule has {workers} workers, the process group {dist.get_world_size()}"
            f" processes: start {workers}"
        )
    return dist.get_rank()


def _check_shared(schedule: Schedule, modules: Sequence[nn.Module]) -> None:
    """Refuse parameters on two stages, but for those that the schedule ties.

    Raises:
        ValueError: naming the parameter.
    """
    tied = {int(number) for number in schedule.rule.values(TransformKind.TIED)}
    home: dict[int, int] = {}
    for index, module in enumerate(modules):
        for name, parameter in module.named_parameters():
            other = home.setdefault(id(parameter), index)
            if other != index and not {other, index} <= tied:
                raise ValueError(
                    f"modules {other} and {index} share the parameter {name!r}: cut the network so"
                    " that the layers that use it are in one stage"
                )


def _batch_size(inputs: Value, targets: Any) -> int:
    tensors = (*members(inputs), *members(targets))
    if any(tensor.dim() == 0 for tensor in tensors):
        raise ValueError("inputs and targets must have a batch as their first dimension, got none")
    sizes = {len(tensor) for tensor in tensors}
    if len(sizes) != 1:
        raise ValueError(
            f"inputs and targets must have one batch size, got {sorted(sizes, reverse=True)}"
        )
    return sizes.pop()


def _divide(value: Any, parts: int) -> Iterator[Any]:
    """Parts of a tensor, or of every tensor of a tuple, along the batch."""
    if parts == 1:
        return iter([value])
    if isinstance(value, Tensor):
        return iter(value.tensor_split(parts))
    return zip(*(tensor.tensor_split(parts) for tensor in value), strict=True)


def _accuracy(outputs: Tensor, targets: Tensor) -> float:
    return float((outputs.argmax(dim=1) == targets).double().mean())


@contextmanager
def _evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, the modules are in evaluation mode; each submodule gets its own mode back."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
