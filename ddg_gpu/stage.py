"""One stage of a network, and the operations that a schedule asks of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from itertools import chain

import torch
from torch import Tensor, nn

from ddg_gpu.flight import Flight, InFlight, Sum
from ddg_gpu.forward import Forward, seeded
from ddg_gpu.options import USUAL, NonFiniteLossError, StageOptions, refuse
from ddg_gpu.reversible import Inverse, is_reversible
from ddg_gpu.state import StageState, Tree, copied
from ddg_gpu.step import OptimizerFactory, Step
from ddg_gpu.value import Value, checked, detached, filled, finite, floating, like, members
from ddg_gpu.weights import VersionStore, call
from ddg_sim.rule import Activations, Gradient, Jacobian, TransformKind
from ddg_sim.schedule import Op, OpKind, Schedule, ScheduleError, staleness

__all__ = ["InFlight", "NonFiniteLossError", "Stage", "StageOptions", "refuse", "seeded"]

_KEEPS_GRAPH = (Activations.GRAPH, Activations.NEWEST)


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
        options: what it does beyond its schedule.

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
        options: StageOptions = USUAL,
    ) -> None:
        refuse(schedule, index, options)
        rule = schedule.rule
        local = rule.gradient is Gradient.LOCAL
        self.module = module
        self.index = index
        self.is_last = index == schedule.num_stages - 1
        #: Whether it has a loss of its own, so that it needs targets, and no error.
        self.has_loss = local or self.is_last
        self._sends_error = index > 0 and not local
        if local and not self.is_last and head is None:
            raise ScheduleError(
                f"stage {index}: the torch backend needs a head for gradient={rule.gradient.value}"
            )
        self._run = Forward(
            module,
            None if self.is_last or not local else head,
            loss if self.has_loss else None,
            index,
            seed,
            options.precision,
        )
        self._options = options
        self._named = f"stage {index} (of {schedule.num_stages})"
        self._activations = rule.activations
        self._stashes = rule.jacobian is Jacobian.STASHED
        self._reconstructs = self._activations is Activations.RECONSTRUCT
        reverses = self._reconstructs and is_reversible(module)
        self._inverse = Inverse(module) if reverses else None
        shrink = rule.values(TransformKind.SHRINK)
        self._shrink = shrink[0] if shrink else None
        parameters = {name: p for name, p in self._run.named_parameters() if p.requires_grad}
        self._step = Step(parameters, optimizer, rule, index, options.clip_norm, options.scheduler)
        self.tied_to = tied_stage(schedule, index)
        self._partner: Stage | None = None
        lag = max(t.version_lag for t in schedule.templates() if t.stage == index)
        stale = staleness(schedule)[index]
        if schedule.worker_of(index, OpKind.FORWARD) != schedule.worker_of(index):
            lag += stale  # updates come before the forward passes that must not see them
        self._store = VersionStore(
            self._run.trained,
            rule,
            index,
            stale=stale > 0,
            lag=lag,
            tied=self.tied_to is not None,
            rate=lambda: self._step.rate,
        )
        self._replicas = schedule.replicas
        self._per_update = schedule.samples_per_iteration * schedule.replicas
        self._first = 0  # sample of the first update
        self._updates = 0
        self._flight = Flight()

    @property
    def losses(self) -> dict[int, float]:
        """Losses by sample, where the stage has one."""
        return self._flight.losses

    @property
    def updates(self) -> int:
        """How many updates the stage has made; not those of a stage that is tied to it."""
        return self._updates

    @property
    def held(self) -> tuple[int, int]:
        """Samples in flight, and weight versions held, now."""
        return len(self._flight.samples.keys() | self._flight.halves.keys()), self._store.count

    def tie(self, stages: Mapping[int, Stage]) -> None:
        """Find the stage with which this one shares weights, if the schedule ties it to one.

        The two have one parameter, in both modules, and an optimizer each. Both update it, with
        their own gradient, momentum and weight decay, each when the schedule says so.

        Args:
            stages: the stages of this process, by index.

        Raises:
            ScheduleError: if the two share no parameter.
        """
        if self.tied_to is None:
            return
        self._partner = stages[self.tied_to]
        own = set(map(id, self.module.parameters()))
        if own.isdisjoint(map(id, self._partner.module.parameters())):
            raise ScheduleError(
                f"stages {self.index} and {self.tied_to} are tied, but share no parameter: take a"
                " network whose first and last layers do, such as gpt-tiny-tied"
            )

    def forward(self, op: Op, inputs: Value, targets: Value | None = None) -> Value:
        """Run a sample forward; returns the activation for the next stage, without a graph.

        Args:
            op: a forward operation.
            inputs: (B, ...) the previous stage's activation, or the data.
            targets: (B,) the labels; a stage with a loss needs them.

        Raises:
            ValueError: if the data or the activation is neither a tensor nor a tuple of tensors,
                or if no error can flow back through what the previous stage gave.
            NonFiniteLossError: if its loss is not finite, and such samples are not skipped.
        """
        inputs = self._leaves(inputs)
        version = self._reads(op)
        sample = InFlight(op.sample, inputs, targets, version, self._store.forward(version))
        if self._keeps_newest:
            self._flight.samples.clear()
        graph = self._activations in _KEEPS_GRAPH and not self._options.recompute
        self._note_reading(sample, graph)
        self._flight.samples[op.sample] = sample
        moves = (op.sample - self._first) % self._replicas == 0
        skips = self._options.non_finite == "skip"
        with self._run.sound() if moves and skips else nullcontext():
            output = self._run(sample, graph, moves)
        if self.has_loss:
            assert sample.roots is not None
            self._note_loss(sample, float(sample.roots[0].detach()))
        if not graph:
            sample.roots = None
        if self._inverse is not None:
            sample.inputs, sample.outputs = (), output if self.is_last else ()
        return output

    def recompute(self, op: Op) -> None:
        """Run a sample forward again on its stored input, at the version the operation names.

        Batch-norm statistics and other buffers were updated by the first pass: here they change
        on copies that are thrown away.
        """
        sample = self._flight.samples[op.sample]
        self._read_again(op, sample)
        self._run.again(sample)

    def backward(self, op: Op, error: Value | None = None) -> Value | None:
        """Differentiate a sample; keeps the weights' gradients for the update.

        The half that sends the error on leaves the graph to the half that differentiates the
        weights, which goes through the stage's activations once more.

        Args:
            op: a backward operation, or one of its halves.
            error: (B, ...) gradient of the loss by this stage's activation, a tensor per
                floating-point member; None where the stage has a loss, and for the second half.
                Where activations are reconstructed: the activation, and its gradient.

        Returns:
            (B, ...) the gradient of the loss by the stage's input, a tensor per floating-point
            member: zeros where the loss does not depend on it; None if nobody needs it. Where
            activations are reconstructed: the input, and its gradient.

        Raises:
            ScheduleError: if the error of a sample does not fit the newest one's activations.
        """
        first, second = op.kind is OpKind.BACKWARD_INPUT, op.kind is OpKind.BACKWARD_WEIGHT
        self._store.differentiate(self._reads(op))
        if second:
            sample, error = self._flight.halves.pop(op.sample)
        else:
            sample = self._take(op, error)
            if self._reconstructs:
                error = self._reconstruct(op, sample, error)
            if error is not None and self._shrink is not None:
                error = like(tuple(self._shrink * part for part in members(error)), error)
            if self._options.non_finite == "skip":
                sample.skipped |= not finite(error)
        if first:
            self._flight.halves[op.sample] = sample, error
        inputs = floating(sample.inputs) if self._sends_error and not second else ()
        weights = [w for w in sample.weights.values() if w.requires_grad and not first]
        total = Sum() if first else self._flight.sums.setdefault(self._group(op), Sum())
        found: list[Tensor | None] = []
        if not sample.skipped:
            if weights or inputs:
                if sample.roots is None:
                    self._run.again(sample)
                assert sample.roots is not None
                # A sample with a loss of its own meets no other one's activations.
                again = first or (self._keeps_newest and not self.has_loss)
                found = _gradients(sample.roots, error, weights, inputs, total, again)
            total.count += 1
        if not first:
            self._store.release(sample.version)
        if not inputs:
            return None
        if sample.skipped:
            sent = filled(sample.inputs, math.nan)
        else:
            own = zip(found, inputs, strict=True)
            parts = tuple(torch.zeros_like(x) if part is None else part for part, x in own)
            sent = like(parts, sample.inputs)
        return (inputs[0].detach(), *members(sent)) if self._reconstructs else sent

    def update(self, op: Op) -> None:
        """Apply the mean gradient of the samples of an update: those that enter in one iteration.

        The learning rate is the one in force now.
        """
        total = self._flight.sums.pop(self._group(op))
        self._store.updating()
        if self._partner is not None:
            self._partner._store.updating()
        if total.count:
            self._store.updated(self._step(total.mean(), op.version - 1))
        else:
            self._store.updated(self._store.motion)
        if self._partner is not None:
            self._partner._store.shared()
        self._updates += 1
        if self._updates != op.version:
            raise RuntimeError(f"{op} produced version {self._updates}")

    def state(self) -> StageState:
        """What the stage holds now, between two operations; the tensors are the stage's own.

        Raises:
            RuntimeError: if a graph could not be built again from it, for want of
                `StageOptions.restorable`.
        """
        if not self._options.restorable and any(s.roots is not None for s in self._flight.all()):
            raise RuntimeError(
                f"{self._named} has samples in flight and was not made with"
                " StageOptions(restorable=True)"
            )
        buffers = dict(self._run.named_buffers())
        records: dict[str, Tree] = {
            name: {"value": parameter.data} for name, parameter in self._run.named_parameters()
        }
        for name, record in self._step.state(self._store.motion).items():
            records[name] |= record
        trained = {"parameters": records, "buffers": buffers}
        flight = {
            "first": self._first,
            "updates": self._updates,
            "weights": self._store.state(),
            "samples": self._flight.state(buffers),
        }
        return StageState(trained, flight)

    def load(self, trained: Tree, samples: int = 0, updates: int = 0) -> None:
        """Go on from what has been trained, here or in stages of another cut.

        Args:
            trained: the records of this stage's parameters and buffers, and maybe of others, as in
                `StageState.trained`.
            samples: how many samples were used for that: the number of the next one.
            updates: how many updates the weights have had.

        Raises:
            ValueError: naming a parameter or buffer that is missing or has another shape.
        """
        parameters, buffers = trained["parameters"], trained["buffers"]
        for name, parameter in self._run.named_parameters():
            _copy(parameter.data, parameters.get(name, {}).get("value"), f"parameter {name!r}")
        for name, buffer in self._run.named_buffers():
            _copy(buffer, buffers.get(name), f"buffer {name!r}")
        self._store.begin(updates, self._step.restore(parameters))
        self._first, self._updates = samples, updates

    def restore(self, state: StageState) -> None:
        """Take over what another stage of the same schedule held, made with the same arguments.

        Graphs are built again from the inputs: with the values that were read, on the same random
        numbers. What a module keeps beside parameters and buffers is not seen.

        Raises:
            ValueError: naming a parameter or buffer that is missing or has another shape.
        """
        self.load(state.trained)
        tensors = chain(self.module.parameters(), self.module.buffers())
        flight = copied(state.flight, next((tensor.device for tensor in tensors), None))
        self._first, self._updates = flight["first"], flight["updates"]
        self._store.restore(flight["weights"])
        buffers = dict(self._run.named_buffers())
        self._flight = Flight.restored(flight["samples"], buffers, self._grow)

    def _grow(self, sample: InFlight, graph: bool) -> None:
        if self._inverse is None:
            sample.inputs = self._leaves(sample.inputs)
        with self._store.rebuilding(sample.version, sample.reading) as sample.weights:
            if graph:
                self._run.again(sample)

    def _leaves(self, inputs: Value) -> Value:
        """Inputs without a graph; where errors are sent on, a new graph begins at them."""
        inputs = detached(checked(inputs, f"stage {self.index}: the input"))
        if self._sends_error:
            flowing = floating(inputs)
            if not flowing:
                raise ValueError(
                    f"stage {self.index}: the input has no floating-point tensor, so that stage"
                    f" {self.index - 1} gets no error: cut the network elsewhere"
                )
            if self._reconstructs and not isinstance(inputs, Tensor):
                raise ValueError(
                    f"stage {self.index}: what is reconstructed must be one tensor, not a tuple:"
                    " cut the network elsewhere"
                )
            for tensor in flowing:
                tensor.requires_grad_()
        return inputs

    def _reads(self, op: Op) -> int:
        """The version that an operation reads; those of tied stages count the updates of both."""
        return op.version if self.tied_to is None else self._store.newest

    def _read_again(self, op: Op, sample: InFlight) -> None:
        """Take the weights and buffers that a second forward pass reads."""
        version = sample.version if self._stashes else self._reads(op)
        sample.weights = self._store.again(sample.version, version)
        sample.version = version
        sample.buffers = None  # it reads those of now
        self._note_reading(sample, graph=True)

    def _reconstruct(self, op: Op, sample: InFlight, received: Value | None) -> Value | None:
        """Run a sample forward again, on the input that follows from its output.

        A stage that is not reversible has kept its input. All happens at the weights that the
        backward operation reads; buffers do not change.

        Returns:
            The error of what was received; None at the last stage.
        """
        self._read_again(op, sample)
        outputs, error = sample.outputs, None
        if received is not None:
            outputs, error = members(received)
        if self._inverse is not None:
            named = {f"body.{name}": tensor for name, tensor in self._run.spare(sample).items()}
            with torch.no_grad():
                sample.inputs = self._leaves(call(self._inverse, named, outputs))
            sample.outputs = ()
        self._run.again(sample)
        return error

    def _note_reading(self, sample: InFlight, graph: bool) -> None:
        """Keep what the coming pass reads, where it is needed to run it again."""
        if graph and self._options.restorable:
            sample.reading = self._store.reading(self._flight.reading)
        if self._options.recompute or (graph and self._options.restorable):
            sample.buffers = self._flight.buffers(dict(self._run.named_buffers()))

    def _note_loss(self, sample: InFlight, loss: float) -> None:
        self.losses[sample.number] = loss
        if not math.isfinite(loss):
            if self._options.non_finite == "raise":
                raise NonFiniteLossError(
                    f"{self._named}, sample {sample.number}: the loss is {loss}: the training has"
                    " diverged, take a smaller learning rate, or skip such samples"
                )
            sample.skipped = True

    def _group(self, op: Op) -> int:
        """Number of the update that uses the operation's sample."""
        return (op.sample - self._first) // self._per_update

    @property
    def _keeps_newest(self) -> bool:
        return self._activations is Activations.NEWEST

    def _take(self, op: Op, error: Value | None) -> InFlight:
        """The sample whose activations the error meets: its own, or the newest one."""
        if not self._keeps_newest:
            return self._flight.samples.pop(op.sample)
        ((number, newest),) = self._flight.samples.items()
        if self.has_loss and number != op.sample:
            raise ScheduleError(f"{op}: the torch backend takes the loss of the newest sample only")
        for own, root in zip(members(error), newest.roots or (), strict=False):
            if own.shape != root.shape:
                raise ScheduleError(
                    f"{op}: the newest mini-batch has {len(root)} examples, not {len(own)}:"
                    " take a batch size that divides the data"
                )
        return newest


def _gradients(
    roots: tuple[Tensor, ...],
    error: Value | None,
    weights: list[Tensor],
    inputs: tuple[Tensor, ...],
    total: Sum,
    again: bool,
) -> list[Tensor | None]:
    """Gradients of a stage's inputs, None where the roots do not depend on one.

    Those of the weights are added to the total weight by weight, as autograd comes to them: so no
    second set of them is ever there.

    Args:
        roots: where the graph ends.
        error: gradients of the roots; None if the only one is a loss.
        weights: leaves whose gradients are added.
        inputs: leaves whose gradients are given back.
        total: what they are added to.
        again: whether the graph is needed once more.
    """
    total.total = total.total or [None] * len(weights)
    errors = (None,) * len(roots) if error is None else members(error)
    grown = [pair for pair in zip(roots, errors, strict=True) if pair[0].requires_grad]
    if not grown:
        return [None] * len(inputs)
    outputs, given = zip(*grown, strict=True)
    for leaf, own in zip(weights, total.total, strict=True):
        leaf.grad = own
    torch.autograd.backward(outputs, given, again, inputs=[*weights, *inputs])
    total.total = [leaf.grad for leaf in weights]
    found = [leaf.grad for leaf in inputs]
    for leaf in (*weights, *inputs):
        leaf.grad = None
    return found


def tied_stage(schedule: Schedule, stage: int) -> int | None:
    """The stage that shares weights with this one; or None.

    >>> from ddg_sim.methods import ouroboros
    >>> [tied_stage(ouroboros(3), stage) for stage in range(3)]
    [2, None, 0]
    """
    tied = [int(number) for number in schedule.rule.values(TransformKind.TIED)]
    return sum(tied) - stage if stage in tied else None


def _copy(target: Tensor, source: Tensor | None, what: str) -> None:
    if source is None or source.shape != target.shape:
        found = "missing" if source is None else f"of shape {tuple(source.shape)}"
        raise ValueError(f"{what} is {found}, the stage needs shape {tuple(target.shape)}")
    with torch.no_grad():
        target.copy_(source)
