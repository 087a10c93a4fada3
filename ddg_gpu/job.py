"""What to train, and the pieces of it that every executor builds in the same way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ddg_gpu import checkpoint, models
from ddg_gpu.boundaries import Boundary, TensorSpec, boundaries
from ddg_gpu.data import Batches, Dataset
from ddg_gpu.partition import balanced_cuts, layer_costs, split
from ddg_gpu.reversible import is_reversible
from ddg_gpu.stage import Stage, StageOptions
from ddg_gpu.step import OptimizerFactory, SchedulerFactory
from ddg_sim.methods import Semantics, method
from ddg_sim.rule import Activations, Gradient, TransformKind
from ddg_sim.schedule import Schedule, ScheduleError, Sync

OPTIMIZERS = ("sgd", "adam")
PRECISIONS = {"float32": None, "bf16": torch.bfloat16}
NON_FINITE = ("raise", "skip")
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
        clip_norm: the most that the norm of a stage's gradient may be; None clips nothing.
        milestones: updates after which the learning rate is multiplied by ``rate_factor``; one
            whose samples were all skipped does not count.
        rate_factor: see ``milestones``.
        precision: "float32", or "bf16" for forward and backward passes in bfloat16 (autocast).
        recompute: whether stages keep only the inputs of samples in flight, and run forward again.
        non_finite: what to do about a loss that is NaN or infinite: "raise", or "skip" the sample.

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
    clip_norm: float | None = None
    milestones: tuple[int, ...] = ()
    rate_factor: float = 0.1
    precision: str = "float32"
    recompute: bool = False
    non_finite: str = "raise"

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
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ValueError(f"clip_norm must be positive and finite, got {self.clip_norm}")
        if (
            list(self.milestones) != sorted(set(self.milestones))
            or min(self.milestones, default=1) < 1
        ):
            raise ValueError(f"milestones must be increasing and positive, got {self.milestones}")
        if not 0 < self.rate_factor < math.inf:
            raise ValueError(f"rate_factor must be positive, got {self.rate_factor}")
        for name, known in (("precision", tuple(PRECISIONS)), ("non_finite", NON_FINITE)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}"
                )

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
        boundaries: what every stage but the last hands on.
        classes: number of the model's outputs.
    """

    model: nn.Sequential
    modules: list[nn.Module]
    cuts: tuple[int, ...]
    boundaries: tuple[Boundary, ...]
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
    tied = [int(stage) for stage in rule.values(TransformKind.TIED)]
    modules = split(model, job.stages, by=cuts, tied=tied)
    if job.load is not None:
        checkpoint.load_into(model, job.load)
    crossing = tuple(boundaries(modules, example, PRECISIONS[job.precision]))
    return Network(model, modules, cuts, crossing, dataset.classes)


def num_iterations(job: Job, batches: Batches) -> int:
    """Iterations of a job's schedule, the last of which may reach into the next epoch."""
    if job.iterations is not None:
        return job.iterations
    assert job.epochs is not None
    return -(-job.epochs * batches.per_epoch // _batches_per_iteration(job.schedule()))


def num_samples(job: Job, batches: Batches) -> int:
    """Mini-batches, or micro-batches, that a job trains on, on all replicas together.

    Raises:
        ValueError: if errors of one size would meet activations of another (see
            `Activations.NEWEST`), because the batch size does not divide the data.
    """
    schedule = job.schedule()
    count = num_iterations(job, batches) * _batches_per_iteration(schedule)
    if schedule.rule.activations is Activations.NEWEST and schedule.num_stages > 1:
        rest = {batches.size(sample) for sample in range(min(count, batches.per_epoch))}
        if len(rest) > 1:
            raise ValueError(
                f"batch_size {job.batch_size} leaves a last mini-batch of {min(rest)} examples,"
                f" which {job.method} cannot mix with others: take a divisor of the data's size"
            )
    return count


def _batches_per_iteration(schedule: Schedule) -> int:
    return schedule.samples_per_iteration * schedule.replicas


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


def scheduler_factory(job: Job) -> SchedulerFactory | None:
    """Maker of the scheduler of a stage's learning rate; None if the rate stays.

    >>> scheduler_factory(Job("bp", 1, "mlp", iterations=1)) is None
    True
    """
    if not job.milestones:
        return None

    def make(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.MultiStepLR(
            optimizer, list(job.milestones), job.rate_factor
        )

    return make


def make_stage(
    job: Job, schedule: Schedule, parts: Network, index: int, restorable: bool = False
) -> Stage:
    """The trainable stage ``index`` of a job, around its module.

    Args:
        job: what is trained.
        schedule: of the job.
        parts: its network.
        index: which stage.
        restorable: whether its state will be asked for.

    Raises:
        ScheduleError: for whatever the schedule asks for that the torch backend does not run.
    """
    head = None
    if schedule.rule.gradient is Gradient.LOCAL and index < len(parts.boundaries):
        seed = int(np.random.SeedSequence((job.seed, index)).generate_state(1)[0])
        boundary = parts.boundaries[index]
        if not isinstance(boundary, TensorSpec):
            raise ScheduleError(f"stage {index}: an auxiliary head takes one tensor, not a tuple")
        head = models.head(boundary.shape, parts.classes, seed)
    return Stage(
        parts.modules[index],
        index,
        schedule,
        optimizer_factory(job),
        job.seed,
        head=head,
        options=StageOptions(
            job.clip_norm,
            scheduler_factory(job),
            PRECISIONS[job.precision],
            job.recompute,
            job.non_finite,
            restorable,
        ),
    )
