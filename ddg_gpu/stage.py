"""One stage of a network, and the operations that a schedule asks of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddg_gpu.step import OptimizerFactory, Step
from ddg_gpu.value import Value, checked, detached, floating, like, members
from ddg_gpu.weights import VersionStore, Weights, call
from ddg_sim.rule import Activations, Gradient, Jacobian, TransformKind
from ddg_sim.schedule import Op, OpKind, Schedule, ScheduleError, staleness


@dataclass(slots=True)
class InFlight:
    """What a stage keeps of a sample between its forward and its backward pass."""

    inputs: Value
    targets: Value | None
    version: int
    weights: Weights
    #: Of the graph: the floating-point members of the activation, or the loss where there is one.
    roots: tuple[Tensor, ...] = ()


@dataclass(slots=True)
class _Sum:
    """Gradients of the samples of one update, added as they come; None where there are none."""

    count: int = 0
    total: tuple[Tensor | None, ...] = ()

    def add(self, found: tuple[Tensor | None, ...]) -> None:
        # Not in place: what autograd returns may also be the error that is on its way.
        if self.count:
            pairs = zip(self.total, found, strict=True)
            found = tuple(b if a is None else a if b is None else a + b for a, b in pairs)
        self.count, self.total = self.count + 1, found

    def mean(self) -> list[Tensor | None]:
        if self.count == 1:
            return list(self.total)
        return [None if total is None else total / self.count for total in self.total]


class Stage:
    """A stage that runs a schedule's operations on its weights.

    Args:
        module: the stage's layers; its parameters are trained in place. It takes one argument, as
            the modules of `nn.Sequential` do: a tensor or a flat tuple of tensors (`Value`), and
            returns one such value.
        index: which stage of the schedule it is (0-based).
        schedule: gives the rule, and whether updates overtake samples in flight.
        optimizer: makes the optimizer of the stage's parameters.
        seed: of the stage's randomness (dropout), which depends on seed, stage and sample only.
        loss: loss of the last stage, (outputs, targets) -> scalar.
        head: with local losses, what makes outputs for the loss of an activation; it is trained
            with the stage. The last stage needs none.

    Raises:
        ScheduleError: for whatever the schedule asks for that is not implemented here.
    """

    def __init__(
        self,
        module: nn.Module,
        index: int,
        schedule: Schedule,
        optimizer: OptimizerFactory,
        seed: int = 0,
        loss: Callable[..., Tensor] = nn.functional.cross_entropy,
        head: nn.Module | None = None,
    ) -> None:
        refuse(schedule, index)
        rule = schedule.rule
        local = rule.gradient is Gradient.LOCAL
        self.module = module
        self.index = index
        self.losses: dict[int, float] = {}
        self.is_last = index == schedule.num_stages - 1
        #: Whether it has a loss of its own, so that it needs targets, and no error.
        self.has_loss = local or self.is_last
        self._sends_error = index > 0 and not local
        self._head = None if self.is_last or not local else head
        if local and not self.is_last and head is None:
            raise ScheduleError(
                f"stage {index}: the torch backend needs a head for gradient={rule.gradient.value}"
            )
        self._trained = module if self._head is None else _Headed(module, self._head)
        self._activations = rule.activations
        shrink = rule.values(TransformKind.SHRINK)
        self._shrink = shrink[0] if shrink else None
        self._parameters = [p for p in self._trained.parameters() if p.requires_grad]
        self._step = Step(self._parameters, optimizer, rule, index)
        lags = (t.version_lag for t in schedule.templates() if t.stage == index)
        self._store = VersionStore(
            self._trained,
            rule,
            index,
            stale=staleness(schedule)[index] > 0,
            lag=max(lags),
            rate=lambda: self._step.rate,
        )
        self._per_update = schedule.samples_per_iteration
        self._sums: dict[int, _Sum] = {}  # of gradients, by update
        self._in_flight: dict[int, InFlight] = {}
        self._halves: dict[int, tuple[InFlight, Value | None]] = {}  # with the error that came
        self._seed = seed
        self._loss = loss

    @property
    def held(self) -> tuple[int, int]:
        """Samples in flight, and weight versions held, now."""
        return len(self._in_flight.keys() | self._halves.keys()), self._store.count

    def forward(self, op: Op, inputs: Value, targets: Value | None = None) -> Value:
        """Run a sample forward; returns the activation for the next stage, without a graph.

        Args:
            op: a forward operation.
            inputs: (B, ...) the previous stage's activation, or the data.
            targets: (B,) the labels; a stage with a loss needs them.

        Raises:
            ValueError: if the data or the activation is neither a tensor nor a tuple of tensors,
                or if no error can flow back through what the previous stage gave.
        """
        inputs = detached(checked(inputs, f"stage {self.index}: the input"))
        if self._sends_error:
            flowing = floating(inputs)
            if not flowing:
                raise ValueError(
                    f"stage {self.index}: the input has no floating-point tensor, so that stage"
                    f" {self.index - 1} gets no error: cut the network elsewhere"
                )
            for tensor in flowing:
                tensor.requires_grad_()
        sample = InFlight(inputs, targets, op.version, self._store.forward(op.version))
        if self._activations is Activations.NEWEST:
            self._in_flight.clear()
        self._in_flight[op.sample] = sample
        keeps_graph = self._activations is not Activations.INPUT
        with torch.set_grad_enabled(keeps_graph):
            output = self._run(op, sample, sample.weights)
        if not keeps_graph:
            sample.roots = ()
        return output

    def recompute(self, op: Op) -> None:
        """Run a sample forward again on its stored input, at the version the operation names.

        Batch-norm statistics and other buffers were updated by the first pass: here they change
        on copies that are thrown away.
        """
        sample = self._in_flight[op.sample]
        sample.weights = self._store.again(sample.version, op.version)
        sample.version = op.version
        buffers = {name: buffer.clone() for name, buffer in self._trained.named_buffers()}
        self._run(op, sample, {**sample.weights, **buffers})

    def backward(self, op: Op, error: Value | None = None) -> Value | None:
        """Differentiate a sample; keeps the weights' gradients for the update.

        The half that sends the error on leaves the graph to the half that differentiates the
        weights, which goes through the stage's activations once more.

        Args:
            op: a backward operation, or one of its halves.
            error: (B, ...) gradient of the loss by this stage's activation, a tensor per
                floating-point member; None where the stage has a loss, and for the second half.

        Returns:
            (B, ...) the gradient of the loss by the stage's input, a tensor per floating-point
            member: zeros where the loss does not depend on it; None if nobody needs it.

        Raises:
            ScheduleError: if the error of a sample does not fit the newest one's activations.
        """
        self._store.differentiate(op.version)
        if op.kind is OpKind.BACKWARD_WEIGHT:
            sample, error = self._halves.pop(op.sample)
        else:
            sample = self._take(op, error)
            if error is not None and self._shrink is not None:
                error = like(tuple(self._shrink * part for part in members(error)), error)
        weights: list[Tensor] = []
        inputs: tuple[Tensor, ...] = ()
        if op.kind is OpKind.BACKWARD_INPUT:
            self._halves[op.sample] = sample, error
        else:
            weights = [weight for weight in sample.weights.values() if weight.requires_grad]
        if op.kind is not OpKind.BACKWARD_WEIGHT and self._sends_error:
            inputs = floating(sample.inputs)
        again = op.kind is OpKind.BACKWARD_INPUT or self._keeps_newest
        found = _gradients(sample.roots, error, [*weights, *inputs], again)
        if op.kind is not OpKind.BACKWARD_INPUT:
            self._sums.setdefault(op.sample // self._per_update, _Sum()).add(found[: len(weights)])
            self._store.release(sample.version)
        if not inputs:
            return None
        own = zip(found[len(weights) :], inputs, strict=True)
        return like(
            tuple(torch.zeros_like(x) if part is None else part for part, x in own), sample.inputs
        )

    def update(self, op: Op) -> None:
        """Apply the mean gradient of the samples of an update: those that enter in one iteration.

        The learning rate is the one in force now.
        """
        gradients = self._sums.pop(op.sample // self._per_update).mean()
        self._store.updating()
        self._store.updated(self._step(gradients, op.version - 1))
        if self._store.newest != op.version:
            raise RuntimeError(f"{op} produced version {self._store.newest}")

    @property
    def _keeps_newest(self) -> bool:
        return self._activations is Activations.NEWEST

    def _take(self, op: Op, error: Value | None) -> InFlight:
        """The sample whose activations the error meets: its own, or the newest one."""
        if not self._keeps_newest:
            return self._in_flight.pop(op.sample)
        ((number, newest),) = self._in_flight.items()
        if self.has_loss and number != op.sample:
            raise ScheduleError(f"{op}: the torch backend takes the loss of the newest sample only")
        for own, root in zip(members(error), newest.roots, strict=False):
            if own.shape != root.shape:
                raise ScheduleError(
                    f"{op}: the newest mini-batch has {len(root)} examples, not {len(own)}:"
                    " take a batch size that divides the data"
                )
        return newest

    def _run(self, op: Op, sample: InFlight, weights: Weights) -> Value:
        """Forward pass; sets the roots of the graph, returns the activation."""
        with seeded(self._seed, self.index, op.sample):
            found = call(self._trained, weights, sample.inputs)
        output, logits = (found, found) if self._head is None else found
        output = checked(output, f"stage {self.index}: the activation")
        sample.roots = floating(output)
        if self.has_loss:
            loss = self._loss(logits, sample.targets)
            sample.roots = (loss,)
            if op.kind is OpKind.FORWARD:
                self.losses[op.sample] = float(loss.detach())
        return detached(output)


class _Headed(nn.Module):
    """A stage with an auxiliary head: gives the activation and what the head makes of it."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, inputs: Value) -> tuple[Any, Any]:
        activation = self.body(inputs)
        return activation, self.head(activation)


def refuse(schedule: Schedule, stage: int) -> None:
    """Refuse what the torch backend does not run.

    Raises:
        ScheduleError: naming the first such part of the schedule.

    >>> from ddg_sim.methods import petra
    >>> refuse(petra(2), 0)
    Traceback (most recent call last):
    ...
    ddg_sim.schedule.ScheduleError: petra: the torch backend does not know activations=reconstruct
    """
    rule, name = schedule.rule, schedule.method
    kinds = {template.kind for template in schedule.templates()}
    unknown: str | None = None
    if rule.activations is Activations.RECONSTRUCT:
        unknown = "activations=reconstruct"
    elif tied := rule.values(TransformKind.TIED):
        unknown = f"tied={','.join(f'{number:g}' for number in tied)}"
    elif rule.values(TransformKind.PREDICT_FORWARD) and rule.jacobian is Jacobian.STASHED:
        unknown = "stashed weights that are predicted"
    elif rule.activations is Activations.NEWEST and rule.jacobian is Jacobian.STASHED:
        unknown = "the newest activations at stashed weights"
    elif rule.activations is Activations.NEWEST and OpKind.RECOMPUTE in kinds:
        unknown = "the newest activations recomputed"
    if unknown is not None:
        raise ScheduleError(f"{name}: the torch backend does not know {unknown}")
    if flaw := rule.contradiction(schedule.num_stages):
        raise ScheduleError(f"{name}: {flaw}")
    if OpKind.ALL_REDUCE in kinds:
        raise ScheduleError(f"{name}: the torch backend does not run all-reduce operations")
    if schedule.worker_of(stage, OpKind.FORWARD) != schedule.worker_of(stage):
        raise ScheduleError(f"stage {stage}: the torch backend keeps a stage on one worker")


def _gradients(
    roots: tuple[Tensor, ...], error: Value | None, leaves: list[Tensor], again: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of the leaves, None where the roots do not depend on one.

    Args:
        roots: where the graph ends.
        error: gradients of the roots; None if the only one is a loss.
        leaves: where gradients are wanted.
        again: whether the graph is needed once more.
    """
    errors = (None,) * len(roots) if error is None else members(error)
    grown = [pair for pair in zip(roots, errors, strict=True) if pair[0].requires_grad]
    if not grown or not leaves:
        return (None,) * len(leaves)
    outputs, given = zip(*grown, strict=True)
    return torch.autograd.grad(outputs, leaves, given, retain_graph=again, allow_unused=True)


@contextmanager
def seeded(seed: int, stage: int, sample: int) -> Iterator[None]:
    """Key torch's CPU generator by (seed, stage, sample) inside, and restore it afterwards.

    So a stage draws the same dropout mask wherever and whenever it runs the sample.

    >>> with seeded(0, stage=1, sample=2):
    ...     first = torch.rand(1)
    >>> with seeded(0, stage=1, sample=2):
    ...     bool(first == torch.rand(1))
    True
    """
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(int(np.random.SeedSequence((seed, stage, sample)).generate_state(1)[0]))
    try:
        yield
    finally:
        generator.set_state(state)
