"""What to train, and the pieces of it that every executor builds in the same way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ddg_gpu import checkpoint, models
from ddg_gpu.data import Batches, Dataset
from ddg_gpu.partition import balanced_cuts, layer_costs, split
from ddg_gpu.reversible import is_reversible
from ddg_gpu.stage import Stage
from ddg_gpu.step import OptimizerFactory
from ddg_sim.dependencies import Relation
from ddg_sim.lowering import Message
from ddg_sim.methods import Semantics, method
from ddg_sim.rule import Activations, Gradient, TransformKind
from ddg_sim.schedule import Schedule, Sync

OPTIMIZERS = ("sgd", "adam")
LEARNING_RATES = {"sgd": 0.05, "adam": 1e-3}


@dataclass(frozen=True, slots=True)
class Job:
    """One training run, up to the executor.

    Args:
        method: name of the training method.
        stages: number of stages K.
        model: name of the network.
        iterations: iterations of the schedule, or None to go by ``epochs``. Each takes a
            mini-batch, or as many as the method has micro-batches or accumulates.
        epochs: passes over the training data, or None to go by ``iterations``.
        sync: synchronisation mode; None is the method's default.
        semantics: at which weights a delayed sample is differentiated; None is the method's
            default.
        options: further options of the method, by name, such as ``{"micro_batches": 4}``.
        batch_size: examples per mini-batch; per micro-batch, where the method has them.
        optimizer: "sgd" (with momentum and weight decay) or "adam" (with weight decay).
        learning_rate: None is 0.05 for sgd, 0.001 for adam.
        momentum: of sgd.
        weight_decay: L2 penalty's coefficient.
        seed: of the weights, the order of the data, the augmentation and dropout.
        cuts: first layers of stages 1..K-1; None balances estimated costs.
        load: file with weights to start from, as written by `checkpoint.save`.

    Raises:
        ValueError: naming the argument and its value.

    >>> Job("ddg", 2, "mlp", iterations=0)
    Traceback (most recent call last):
    ...
    ValueError: iterations must be at least 1, got 0
    """

    method: str
    stages: int
    model: str
    iterations: int | None = None
    epochs: int | None = None
    sync: Sync | None = None
    semantics: Semantics | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    batch_size: int = 64
    optimizer: str = "sgd"
    learning_rate: float | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    seed: int = 0
    cuts: tuple[int, ...] | None = None
    load: Path | None = None

    def __post_init__(self) -> None:
        if (self.iterations is None) == (self.epochs is None):
            raise ValueError("give either iterations or epochs, not both and not neither")
        for name in ("iterations", "epochs", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"unknown optimizer {self.optimizer!r}; known optimizers: {', '.join(OPTIMIZERS)}"
            )
        if not (math.isfinite(self.step_size) and self.step_size > 0):
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in 0..2**63-1, got {self.seed}")

    @property
    def step_size(self) -> float:
        """The learning rate, with the optimizer's default filled in."""
        if self.learning_rate is None:
            return LEARNING_RATES[self.optimizer]
        return self.learning_rate

    def schedule(self) -> Schedule:
        """The schedule that is run."""
        return method(self.method, self.stages, self.sync, self.semantics, **self.options)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Network:
    """A network cut into stages, and the shapes between them.

    Args:
        modules: the stages, sharing their parameters with ``model``.
        boundaries: shape of one example's activation after each stage but the last.
        classes: number of the model's outputs.
    """

    model: nn.Sequential
    modules: list[nn.Sequential]
    cuts: tuple[int, ...]
    boundaries: tuple[torch.Size, ...]
    classes: int


def network(job: Job, dataset: Dataset) -> Network:
    """Build a job's network, initialised or loaded, and cut it into stages.

    Raises:
        ValueError: if the job asks for more stages than there are layers, or for impossible cuts.
        CheckpointError: if the weights to start from cannot be used.
    """
    model = models.build(job.model, dataset.input_shape, dataset.classes, job.seed)
    example, rule = dataset.example, job.schedule().rule
    if rule.activations is Activations.RECONSTRUCT and not any(map(is_reversible, model)):
        raise ValueError(
            f"model {job.model!r} has no layer that {job.method} can reverse: take revnet16"
        )
    if job.cuts is None:
        cuts = tuple(balanced_cuts(layer_costs(model, example), job.stages))
    else:
        cuts = job.cuts
        if len(cuts) != job.stages - 1:
            raise ValueError(
                f"cuts must give {job.stages - 1} layer"
                f" {'index' if job.stages == 2 else 'indices'} for stages {job.stages},"
                f" got {list(cuts)}"
            )
    modules = split(model, cuts, tied=[int(k) for k in rule.values(TransformKind.TIED)])
    if job.load is not None:
        checkpoint.load_into(model, job.load)
    return Network(model, modules, cuts, _boundaries(model, cuts, example), dataset.classes)


def _boundaries(
    model: nn.Sequential, cuts: Sequence[int], example: torch.Tensor
) -> tuple[torch.Size, ...]:
    shapes = []
    model.eval()  # a dry run must not move batch-norm statistics
    with torch.no_grad():
        for index, layer in enumerate(model, start=1):
            example = layer(example)
            if index in cuts:
                shapes.append(example.shape[1:])
    model.train()
    return tuple(shapes)


def num_iterations(job: Job, batches: Batches) -> int:
    """Iterations of a job's schedule, the last of which may reach into the next epoch."""
    if job.iterations is not None:
        return job.iterations
    assert job.epochs is not None
    schedule = job.schedule()
    return -(
        -job.epochs * batches.per_epoch // (schedule.samples_per_iteration * schedule.replicas)
    )


def num_samples(job: Job, batches: Batches) -> int:
    """Mini-batches, or micro-batches, that a job trains on, on all replicas together.

    Raises:
        ValueError: if errors of one size would meet activations of another (see
            `Activations.NEWEST`), because the batch size does not divide the data.
    """
    schedule = job.schedule()
    count = num_iterations(job, batches) * schedule.samples_per_iteration * schedule.replicas
    if schedule.rule.activations is Activations.NEWEST and schedule.num_stages > 1:
        rest = {batches.size(sample) for sample in range(min(count, batches.per_epoch))}
        if len(rest) > 1:
            raise ValueError(
                f"batch_size {job.batch_size} leaves a last mini-batch of {min(rest)} examples,"
                f" which {job.method} cannot mix with others: take a divisor of the data's size"
            )
    return count


def optimizer_factory(job: Job) -> OptimizerFactory:
    """Maker of the optimizer of one stage's parameters.

    >>> factory = optimizer_factory(Job("bp", 1, "mlp", iterations=1, optimizer="adam"))
    >>> factory([nn.Parameter(torch.zeros(1))]).defaults["lr"]
    0.001
    """

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if job.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=job.step_size, weight_decay=job.weight_decay)
        return torch.optim.SGD(
            parameters, lr=job.step_size, momentum=job.momentum, weight_decay=job.weight_decay
        )

    return make


def make_stage(job: Job, schedule: Schedule, parts: Network, index: int) -> Stage:
    """The trainable stage ``index`` of a job, around its module.

    Raises:
        ScheduleError: for whatever the schedule asks for that the torch backend does not run.
    """
    head = None
    if schedule.rule.gradient is Gradient.LOCAL and index < len(parts.boundaries):
        seed = int(np.random.SeedSequence((job.seed, index)).generate_state(1)[0])
        head = models.head(parts.boundaries[index], parts.classes, seed)
    return Stage(parts.modules[index], index, schedule, optimizer_factory(job), job.seed, head=head)


def message_shape(
    boundaries: Sequence[torch.Size], batches: Batches, reconstructs: bool = False
) -> Callable[[Message], torch.Size]:
    """Shape of a message: that of the activation at the boundary it crosses, for its batch."""

    def shape(message: Message) -> torch.Size:
        boundary = boundaries[min(message.source, message.target)]
        both = reconstructs and message.relation is Relation.GRADIENT
        pair = (2,) if both else ()  # the activation comes back with its gradient
        return torch.Size((*pair, batches.size(message.sample), *boundary))

    return shape
