"""One stage of a network, and the operations that a schedule asks of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ddg_gpu.step import OptimizerFactory, Step
from ddg_gpu.weights import VersionStore, Weights, call
from ddg_sim.rule import Activations, Gradient, Jacobian, TransformKind
from ddg_sim.schedule import Op, OpKind, Schedule, ScheduleError, staleness


@dataclass(slots=True)
class InFlight:
    """What a stage keeps of a sample between its forward and its backward pass."""

    inputs: Tensor
    targets: Tensor | None
    version: int
    weights: Weights
    root: Tensor | None = None  # of the graph: the activation, or the loss where there is one


class Stage:
    """A stage that runs a schedule's operations on its weights.

    Args:
        module: the stage's layers; its parameters are trained in place.
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
        loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
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
        self._gradients: dict[int, tuple[Tensor | None, ...]] = {}  # by sample
        self._in_flight: dict[int, InFlight] = {}
        self._halves: dict[int, tuple[InFlight, Tensor | None]] = {}  # with the error that came
        self._seed = seed
        self._loss = loss

    @property
    def held(self) -> tuple[int, int]:
        """Samples in flight, and weight versions held, now."""
        return len(self._in_flight.keys() | self._halves.keys()), self._store.count

    def forward(self, op: Op, inputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """Run a sample forward; returns the activation for the next stage, without a graph.

        Args:
            op: a forward operation.
            inputs: (B, ...) the previous stage's activation, or the data.
            targets: (B,) the labels; a stage with a loss needs them.
        """
        if self._sends_error:
            inputs = inputs.detach().requires_grad_(inputs.is_floating_point())
        sample = InFlight(inputs, targets, op.version, self._store.forward(op.version))
        if self._activations is Activations.NEWEST:
            self._in_flight.clear()
        self._in_flight[op.sample] = sample
        keeps_graph = self._activations is not Activations.INPUT
        with torch.set_grad_enabled(keeps_graph):
            output = self._run(op, sample, sample.weights)
        if not keeps_graph:
            sample.root = None
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

    def backward(self, op: Op, error: Tensor | None = None) -> Tensor | None:
        """Differentiate a sample; keeps the weights' gradients for the update.

        The half that sends the error on leaves the graph to the half that differentiates the
        weights, which goes through the stage's activations once more.

        Args:
            op: a backward operation, or one of its halves.
            error: (B, ...) gradient of the loss by this stage's activation; None where the stage
                has a loss, and for the second half.

        Returns:
            (B, ...) the gradient of the loss by the stage's input; None if nobody needs it.

        Raises:
            ScheduleError: if the error of a sample does not fit the newest one's activations.
        """
        self._store.differentiate(op.version)
        if op.kind is OpKind.BACKWARD_WEIGHT:
            sample, error = self._halves.pop(op.sample)
        else:
            sample = self._take(op, error)
            if error is not None and self._shrink is not None:
                error = self._shrink * error
        weights: list[Tensor] = []
        inputs: list[Tensor] = []
        if op.kind is OpKind.BACKWARD_INPUT:
            self._halves[op.sample] = sample, error
        else:
            weights = [weight for weight in sample.weights.values() if weight.requires_grad]
        if op.kind is not OpKind.BACKWARD_WEIGHT and self._sends_error:
            inputs = [sample.inputs]
        found: tuple[Tensor | None, ...] = ()
        if weights or inputs:
            assert sample.root is not None
            again = op.kind is OpKind.BACKWARD_INPUT or self._keeps_newest
            found = torch.autograd.grad(
                sample.root, [*weights, *inputs], error, retain_graph=again, allow_unused=True
            )
        if op.kind is not OpKind.BACKWARD_INPUT:
            self._gradients[op.sample] = found[: len(weights)]
            self._store.release(sample.version)
        return found[-1] if inputs else None

    def update(self, op: Op) -> None:
        """Apply the mean gradient of all samples up to the operation's that were not applied yet.

        The learning rate is the one in force now.
        """
        samples = [sample for sample in sorted(self._gradients) if sample <= op.sample]
        found = [self._gradients.pop(sample) for sample in samples]
        gradients = [_mean(list(own)) for own in zip(*found, strict=True)]
        self._store.updating()
        self._store.updated(self._step(gradients, op.version - 1))
        if self._store.newest != op.version:
            raise RuntimeError(f"{op} produced version {self._store.newest}")

    @property
    def _keeps_newest(self) -> bool:
        return self._activations is Activations.NEWEST

    def _take(self, op: Op, error: Tensor | None) -> InFlight:
        """The sample whose activations the error meets: its own, or the newest one."""
        if not self._keeps_newest:
            return self._in_flight.pop(op.sample)
        ((number, newest),) = self._in_flight.items()
        if self.has_loss and number != op.sample:
            raise ScheduleError(f"{op}: the torch backend takes the loss of the newest sample only")
        if error is not None and newest.root is not None and error.shape != newest.root.shape:
            raise ScheduleError(
                f"{op}: the newest mini-batch has {len(newest.root)} examples, not {len(error)}:"
                " take a batch size that divides the data"
            )
        return newest

    def _run(self, op: Op, sample: InFlight, weights: Weights) -> Tensor:
        """Forward pass; sets the root of the graph, returns the activation."""
        with seeded(self._seed, self.index, op.sample):
            found = call(self._trained, weights, sample.inputs)
        output: Tensor = found if self._head is None else found[0]
        logits: Tensor = found if self._head is None else found[1]
        sample.root = output
        if self.has_loss:
            assert sample.targets is not None
            sample.root = loss = self._loss(logits, sample.targets)
            if op.kind is OpKind.FORWARD:
                self.losses[op.sample] = float(loss.detach())
        return output.detach()


class _Headed(nn.Module):
    """A stage with an auxiliary head: gives the activation and what the head makes of it."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
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


def _mean(gradients: list[Tensor | None]) -> Tensor | None:
    """Mean over samples; None where the loss does not depend on the parameter."""
    present = [gradient for gradient in gradients if gradient is not None]
    if not present:
        return None
    return present[0] if len(gradients) == 1 else torch.stack(present).sum(0) / len(gradients)


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
