"""What a stage does beyond its schedule, and what it does not do."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ddg_gpu.step import SchedulerFactory
from ddg_sim.rule import Activations, Gradient, Jacobian, Rule, TransformKind
from ddg_sim.schedule import OpKind, Schedule, ScheduleError, staleness


class NonFiniteLossError(RuntimeError):
    """A loss that is not a number, or infinite; the message names stage and sample."""


@dataclass(frozen=True, slots=True)
class StageOptions:
    """What a stage does beyond its schedule.

    Args:
        clip_norm: the most that the norm of this stage's gradient may be, see `Step`; or None.
        scheduler: makes the scheduler of the learning rate, stepped after every update; or None.
        precision: dtype of the forward pass under `torch.autocast`, such as ``torch.bfloat16``; or
            None. Activations cross to the next stage in the dtype that they come out in, and errors
            come back in it; the loss is in single precision.
        recompute: keep only the input of a sample, and run forward again inside the backward pass,
            at the same weights: less memory, more time, the same numbers.
        non_finite: what becomes of a sample whose loss is not finite. "raise" a
            `NonFiniteLossError`, or "skip": every stage leaves it out of its update (the mean is
            over the others), and an update without samples counts as one but changes nothing, no
            momentum and no learning rate either. Buffers, such as running means, that it would
            make infinite or NaN stay as they were.
        restorable: keep what `Stage.state` needs to build graphs again, also where the weights that
            a pass has read are overwritten (one more copy of them per version in flight), and
            the buffers that it has read.

    Raises:
        ValueError: naming the argument and its value.
    """

    clip_norm: float | None = None
    scheduler: SchedulerFactory | None = None
    precision: torch.dtype | None = None
    recompute: bool = False
    non_finite: str = "raise"
    restorable: bool = False

    def __post_init__(self) -> None:
        if self.non_finite not in ("raise", "skip"):
            raise ValueError(f"non_finite must be 'raise' or 'skip', got {self.non_finite!r}")
        if self.precision not in (None, torch.bfloat16):
            raise ValueError(f"precision must be torch.bfloat16 or None, got {self.precision}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, got {self.clip_norm}")


USUAL = StageOptions()


def refuse(schedule: Schedule, stage: int, options: StageOptions | None = None) -> None:
    """Refuse what the torch backend does not run.

    Raises:
        ScheduleError: naming the first such part of the schedule.

    >>> from ddg_sim.methods import method
    >>> refuse(method("sideways", 2, replicas=2), 0)
    Traceback (most recent call last):
    ...
    ddg_sim.schedule.ScheduleError: sideways: the torch backend does not know the newest ...
    """
    rule, name = schedule.rule, schedule.method
    kinds = {template.kind for template in schedule.templates()}
    unknown: str | None = None
    tied = tuple(map(int, rule.values(TransformKind.TIED)))
    if rule.activations is Activations.RECONSTRUCT and rule.gradient is Gradient.LOCAL:
        unknown = "reconstructed activations with local losses, for nothing brings outputs back"
    elif rule.activations is Activations.RECONSTRUCT and OpKind.RECOMPUTE in kinds:
        unknown = "reconstructed activations recomputed"
    elif tied and schedule.worker_of(tied[0]) != schedule.worker_of(tied[1]):
        unknown = f"tied stages {tied[0]} and {tied[1]} on two workers"
    elif tied and any(template.version_lag for template in schedule.templates()):
        unknown = "tied stages that read older weights"
    elif rule.values(TransformKind.PREDICT_FORWARD) and rule.jacobian is Jacobian.STASHED:
        unknown = "stashed weights that are predicted"
    elif rule.activations is Activations.NEWEST and rule.jacobian is Jacobian.STASHED:
        unknown = "the newest activations at stashed weights"
    elif rule.activations is Activations.NEWEST and schedule.replicas > 1:
        unknown = "the newest activations of several replicas"
    elif rule.activations is Activations.NEWEST and OpKind.RECOMPUTE in kinds:
        unknown = "the newest activations recomputed"
    if unknown is not None:
        raise ScheduleError(f"{name}: the torch backend does not know {unknown}")
    if flaw := rule.contradiction(schedule.num_stages):
        raise ScheduleError(f"{name}: {flaw}")
    if options is not None:
        _refuse_options(schedule, stage, options)


def _refuse_options(schedule: Schedule, stage: int, options: StageOptions) -> None:
    rule, name = schedule.rule, schedule.method
    stashed = rule.jacobian is Jacobian.STASHED
    if options.recompute and not (stashed and rule.activations is Activations.GRAPH):
        raise ScheduleError(
            f"{name}: recompute is for kept graphs at stashed weights, not for"
            f" activations={rule.activations.value} jacobian={rule.jacobian.value}"
        )
    if options.non_finite == "skip" and rule.activations is Activations.NEWEST:
        raise ScheduleError(
            f"{name}: non_finite='skip' cannot tell which samples a bad activation has met:"
            " take 'raise'"
        )
    if options.precision is not None and rule.activations is Activations.RECONSTRUCT:
        raise ScheduleError(
            f"{name}: activations cannot be reconstructed at precision {options.precision}, whose"
            " rounding they would carry from layer to layer: take float32"
        )
    # Under autocast a graph keeps its own copies of the weights, in the lower precision: those that
    # the forward pass has read, whatever is written over the weights afterwards.
    rewritten = not stashed and rule.activations is not Activations.INPUT
    if (
        options.precision is not None
        and rewritten
        and (staleness(schedule)[stage] or _corrects(rule))
    ):
        raise ScheduleError(
            f"{name}: precision {options.precision} cannot differentiate a kept graph at"
            f" jacobian={rule.jacobian.value}: take stashed weights or replay"
        )


def _corrects(rule: Rule) -> bool:
    kinds = (TransformKind.PREDICT_FORWARD, TransformKind.PREDICT_BACKWARD)
    return any(rule.values(kind) for kind in kinds)
