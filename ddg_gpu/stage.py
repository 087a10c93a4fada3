"""One stage of a network, and the operations that a schedule asks of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ddg_gpu.weights import VersionStore, Weights, call
from ddg_sim.rule import Activations
from ddg_sim.schedule import Op, OpKind, Schedule, ScheduleError, staleness

UNDERSTOOD = (OpKind.FORWARD, OpKind.RECOMPUTE, OpKind.BACKWARD, OpKind.UPDATE)
OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(slots=True)
class InFlight:
    """What a stage keeps of a sample between its forward and its backward pass."""

    inputs: Tensor
    targets: Tensor | None
    version: int
    weights: Weights
    output: Tensor | None = None  # root of the graph: the activation, or the loss at the last stage


class Stage:
    """A stage that runs forward, recompute, backward and update operations on its weights.

    Args:
        module: the stage's layers; its parameters are trained in place.
        index: which stage of the schedule it is (0-based).
        schedule: gives the rule, and whether updates overtake samples in flight.
        optimizer: makes the optimizer of the stage's parameters.
        seed: of the stage's randomness (dropout), which depends on seed, stage and sample only.
        loss: loss of the last stage, (outputs, targets) -> scalar.

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
    ) -> None:
        if part := schedule.rule.unusual():
            raise ScheduleError(f"{schedule.method}: the torch backend does not know {part}")
        unknown = [t for t in schedule.templates() if t.kind not in UNDERSTOOD]
        if unknown:
            noun = unknown[0].kind.noun
            raise ScheduleError(f"{unknown[0]}: the torch backend does not run {noun} operations")
        if schedule.worker_of(index, OpKind.FORWARD) != schedule.worker_of(index):
            raise ScheduleError(f"stage {index}: the torch backend keeps a stage on one worker")
        lagging = [t for t in schedule.templates() if t.stage == index and t.version_lag]
        if lagging:
            raise ScheduleError(f"{lagging[0]}: the torch backend keeps no versions nobody reads")
        self.module = module
        self.index = index
        self.losses: dict[int, float] = {}
        self._is_first = index == 0
        self.is_last = index == schedule.num_stages - 1
        self._keeps_graph = schedule.rule.activations is Activations.GRAPH
        self._store = VersionStore(module, schedule.rule, staleness(schedule)[index] > 0)
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._optimizer = optimizer(self._parameters) if self._parameters else None
        self._gradients: dict[int, tuple[Tensor | None, ...]] = {}  # by sample
        self._in_flight: dict[int, InFlight] = {}
        self._seed = seed
        self._loss = loss

    @property
    def held(self) -> tuple[int, int]:
        """Samples in flight, and weight versions held, now."""
        return len(self._in_flight), self._store.count

    def forward(self, op: Op, inputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """Run a sample forward; returns the activation for the next stage, without a graph.

        Args:
            op: a forward operation.
            inputs: (B, ...) the previous stage's activation, or the data.
            targets: (B,) the labels; the last stage needs them.
        """
        if not self._is_first:
            inputs = inputs.detach().requires_grad_(inputs.is_floating_point())
        sample = InFlight(inputs, targets, op.version, self._store.acquire(op.version))
        self._in_flight[op.sample] = sample
        with torch.set_grad_enabled(self._keeps_graph):
            output = self._run(op, sample, sample.weights)
        if not self._keeps_graph:
            sample.output = None
        return output

    def recompute(self, op: Op) -> None:
        """Run a sample forward again on its stored input, at the version the operation names.

        Batch-norm statistics and other buffers were updated by the first pass: here they change
        on copies that are thrown away.
        """
        sample = self._in_flight[op.sample]
        weights = self._store.acquire(op.version)  # first, for it may be the version let go
        self._store.release(sample.version)
        sample.version, sample.weights = op.version, weights
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        self._run(op, sample, {**sample.weights, **buffers})

    def backward(self, op: Op, gradient: Tensor | None) -> Tensor | None:
        """Differentiate a sample; keeps the weights' gradients for the update.

        Args:
            op: a backward operation.
            gradient: (B, ...) of the loss by this stage's activation; None at the last stage.

        Returns:
            (B, ...) the gradient of the loss by the stage's input; None at the first stage.
        """
        sample = self._in_flight.pop(op.sample)
        assert sample.output is not None
        wanted = [weight for weight in sample.weights.values() if weight.requires_grad]
        count = len(wanted)
        if not self._is_first:
            wanted.append(sample.inputs)
        gradients: tuple[Tensor | None, ...] = ()
        if wanted:
            gradients = torch.autograd.grad(sample.output, wanted, gradient, allow_unused=True)
        self._store.release(sample.version)
        self._gradients[op.sample] = gradients[:count]
        return None if self._is_first else gradients[count]

    def update(self, op: Op) -> None:
        """Apply the mean gradient of all samples up to the operation's that were not applied yet.

        The learning rate is the one in force now.
        """
        samples = [sample for sample in sorted(self._gradients) if sample <= op.sample]
        found = [self._gradients.pop(sample) for sample in samples]
        if self._optimizer is not None:
            for parameter, *gradients in zip(self._parameters, *found, strict=True):
                parameter.grad = _mean(gradients)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        self._store.updated()
        if self._store.newest != op.version:
            raise RuntimeError(f"{op} produced version {self._store.newest}")

    def _run(self, op: Op, sample: InFlight, weights: Weights) -> Tensor:
        """Forward pass; sets the root of the graph, returns the activation."""
        with seeded(self._seed, self.index, op.sample):
            output = call(self.module, weights, sample.inputs)
        sample.output = output
        if self.is_last:
            assert sample.targets is not None
            sample.output = self._loss(output, sample.targets)
            if op.kind is OpKind.FORWARD:
                self.losses[op.sample] = float(sample.output.detach())
        return output.detach()


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
