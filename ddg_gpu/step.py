"""An optimizer's step with the corrections that a method's rule makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddg_sim.rule import Rule, TransformKind
from ddg_sim.schedule import ScheduleError

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

_OBSERVING = frozenset(TransformKind) - {TransformKind.SHRINK, TransformKind.RATE}


@dataclass(frozen=True, slots=True)
class Motion:
    """What an update did to the weights; the lists go like the parameters.

    Args:
        rate: the learning rate γ of the update.
        step: γ v, what the optimizer itself subtracted (v: velocity of SGD, direction of Adam).
        drift: δ, the mean of past updates, for `TransformKind.DISCREPANCY`; else None.
    """

    rate: float
    step: list[Tensor]
    drift: list[Tensor] | None


class Step:
    """The updates of one stage's parameters.

    The optimizer is asked for nothing but its step and its learning rate: v is read off what a step
    subtracts, so every optimizer has one. Only spike compensation needs to know more (SGD).

    Args:
        parameters: what is trained.
        optimizer: makes the optimizer; it is not called if there are no parameters.
        rule: the corrections.
        stage: whose numbers of the corrections apply.

    Raises:
        ScheduleError: if the rule has a correction that the optimizer does not allow.
    """

    def __init__(
        self, parameters: list[nn.Parameter], optimizer: OptimizerFactory, rule: Rule, stage: int
    ) -> None:
        self._parameters = parameters
        self._optimizer = optimizer(parameters) if parameters else None
        self._anneal = rule.values(TransformKind.RATE)
        self._stage = stage
        spike = rule.values(TransformKind.SPIKE)
        self._delay = spike[stage] if spike else None
        averages = rule.values(TransformKind.DISCREPANCY)
        self._decay = averages[0] ** (1.0 / averages[1 + stage]) if averages else None
        self._observes = any(transform.kind in _OBSERVING for transform in rule.transforms)
        self._drift: list[Tensor] | None = None
        if self._optimizer is None or not rule.transforms:
            return
        groups = self._optimizer.param_groups
        if (self._observes or self._anneal) and len(groups) != 1:
            raise ScheduleError(
                f"{rule.transforms[0]} needs one learning rate, the optimizer has {len(groups)}"
                " parameter groups"
            )
        plain = isinstance(self._optimizer, torch.optim.SGD) and not (
            groups[0]["nesterov"] or groups[0]["dampening"] or groups[0]["maximize"]
        )
        if spike and not plain:
            raise ScheduleError(
                f"spike={spike[stage]:g} is a correction of SGD with momentum; the optimizer is"
                f" {type(self._optimizer).__name__}: take sgd"
            )

    @property
    def rate(self) -> float:
        """The learning rate in force now; of the first parameter group."""
        return 0.0 if self._optimizer is None else float(self._optimizer.param_groups[0]["lr"])

    def __call__(self, gradients: list[Tensor | None], number: int) -> Motion | None:
        """Update the parameters.

        Args:
            gradients: like the parameters; None where the loss does not depend on one.
            number: how many updates there were before.

        Returns:
            What it did, or None where no correction asks.
        """
        if self._optimizer is None:
            return None
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        before = [p.detach().clone() for p in self._parameters] if self._observes else []
        with self._scaled(number) as rate:
            self._optimizer.step()
        motion = self._motion(before, rate) if self._observes else None
        self._optimizer.zero_grad(set_to_none=True)
        return motion

    @contextmanager
    def _scaled(self, number: int) -> Iterator[float]:
        """Inside, the learning rate is that of update ``number``; gives it."""
        assert self._optimizer is not None
        if not self._anneal:
            yield self.rate
            return
        updates, *delays = self._anneal
        group = self._optimizer.param_groups[0]
        full = group["lr"]
        group["lr"] = full / delays[self._stage] ** (1.0 - min(number / updates, 1.0))
        try:
            yield float(group["lr"])
        finally:
            group["lr"] = full

    @torch.no_grad()
    def _motion(self, before: list[Tensor], rate: float) -> Motion:
        """Compare with the weights ``before`` the step; compensate its spike, if the rule says."""
        step = [old - new.detach() for old, new in zip(before, self._parameters, strict=True)]
        if self._delay is not None:
            self._compensate(before, step, rate, self._delay)
        if self._decay is not None:
            changes = [
                new.detach() - old for old, new in zip(before, self._parameters, strict=True)
            ]
            past = self._drift or [torch.zeros_like(change) for change in changes]
            self._drift = [
                self._decay * old + (1.0 - self._decay) * change
                for old, change in zip(past, changes, strict=True)
            ]
        return Motion(rate, step, self._drift)

    def _compensate(
        self, before: list[Tensor], step: list[Tensor], rate: float, delay: float
    ) -> None:
        """Make w - γ v into w - γ (a v + b g)."""
        assert self._optimizer is not None
        group = self._optimizer.param_groups[0]
        momentum, decay = group["momentum"], group["weight_decay"]
        a = momentum**delay
        b = (1.0 - a) / (1.0 - momentum)
        for parameter, old, moved in zip(self._parameters, before, step, strict=True):
            if parameter.grad is not None:
                g = parameter.grad + decay * old
                parameter.copy_(old - (a * moved + (b * rate) * g))
