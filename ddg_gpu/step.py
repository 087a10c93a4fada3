"""An optimizer's step with the corrections that a method's rule makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ddg_gpu.state import shaped
from ddg_sim.rule import Rule, TransformKind
from ddg_sim.schedule import ScheduleError

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], LRScheduler]

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

    def state(self) -> dict[str, Any]:
        """As plain data."""
        return {"rate": self.rate, "step": self.step, "drift": self.drift}


class Step:
    """The updates of one stage's parameters.

    The optimizer is asked for nothing but its step and its learning rate: v is read off what a step
    subtracts, so every optimizer has one. Only spike compensation needs to know more (SGD).

    Args:
        parameters: what is trained, by name.
        optimizer: makes the optimizer; it is not called if there are no parameters.
        rule: the corrections.
        stage: whose numbers of the corrections apply.
        clip_norm: the most that the norm of the stage's gradient may be: longer ones are scaled
            down. It is this stage's norm, not the network's: the stages update the same sample at
            different times, so that a norm over all of them would be known too late, and would
            make every stage wait for the last one.
        scheduler: makes a scheduler of the learning rate, which is stepped after every update.

    Raises:
        ScheduleError: if the rule has a correction that the optimizer does not allow.
        ValueError: if ``clip_norm`` is not positive, or the scheduler wants to know the loss.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: OptimizerFactory,
        rule: Rule,
        stage: int,
        clip_norm: float | None = None,
        scheduler: SchedulerFactory | None = None,
    ) -> None:
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, got {clip_norm}")
        self._names = list(parameters)
        self._parameters = list(parameters.values())
        self._optimizer = optimizer(self._parameters) if parameters else None
        if parameters and not isinstance(self._optimizer, torch.optim.Optimizer):
            raise ValueError(
                "optimizer must be a function of a list of parameters that returns a"
                f" torch.optim.Optimizer, not a {type(self._optimizer).__name__}"
            )
        self._clip_norm = clip_norm
        self._scheduler = (
            None if scheduler is None or self._optimizer is None else scheduler(self._optimizer)
        )
        if scheduler is not None and parameters and not isinstance(self._scheduler, LRScheduler):
            raise ValueError(
                "scheduler must be a function of an optimizer that returns a scheduler of its"
                f" learning rate, not a {type(self._scheduler).__name__}"
            )
        if isinstance(self._scheduler, ReduceLROnPlateau):
            raise ValueError(
                "scheduler ReduceLROnPlateau needs the loss at every update, which most stages do"
                " not have: take one that goes by the number of updates"
            )
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
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        before = [p.detach().clone() for p in self._parameters] if self._observes else []
        with self._scaled(number) as rate:
            self._optimizer.step()
        motion = self._motion(before, rate) if self._observes else None
        self._optimizer.zero_grad(set_to_none=True)
        if self._scheduler is not None:
            self._scheduler.step()
        return motion

    def state(self, motion: Motion | None) -> dict[str, dict[str, Any]]:
        """What training has left behind, besides the weights, by the name of the parameter.

        Args:
            motion: of the last update.
        """
        records: dict[str, dict[str, Any]] = {name: {} for name in self._names}
        if self._optimizer is None:
            return records
        found, order = self._optimizer.state_dict(), self._order()
        for group in found["param_groups"]:
            options = {key: value for key, value in group.items() if key != "params"}
            for place in group["params"]:
                record = records[order[place]]
                record["options"] = options
                record["optimizer"] = found["state"].get(place, {})
                if self._scheduler is not None:
                    record["scheduler"] = self._scheduler.state_dict()
        for index, record in enumerate(records.values()):
            if self._drift is not None:
                record["drift"] = self._drift[index]
            if motion is not None:
                record["rate"], record["step"] = motion.rate, motion.step[index]
        return records

    def restore(self, records: Mapping[str, Mapping[str, Any]]) -> Motion | None:
        """Take over what `state` gave, of this stage or, parameter by parameter, of others.

        Returns:
            The motion of the last update.

        Raises:
            ValueError: if parameters of one group of the optimizer had different options, or one
                had none.
        """
        if self._optimizer is None:
            return None
        wanted, order = self._optimizer.state_dict(), self._order()
        for group in wanted["param_groups"]:
            names = [order[place] for place in group["params"]]
            for name in names:
                if "options" not in records[name]:
                    raise ValueError(f"parameter {name!r} comes without a state of its optimizer")
                if str(records[name]["options"]) != str(records[names[0]]["options"]):
                    raise ValueError(
                        f"parameters {names[0]!r} and {name!r} were trained with different options"
                        " of the optimizer, and are in one group of it now"
                    )
            options = deepcopy(records[names[0]]["options"])
            group.update({key: shaped(value, group.get(key)) for key, value in options.items()})
        own = {place: deepcopy(records[name]["optimizer"]) for place, name in enumerate(order)}
        wanted["state"] = {place: state for place, state in own.items() if state}
        self._optimizer.load_state_dict(wanted)
        if self._scheduler is not None:
            if "scheduler" not in records[order[0]]:
                raise ValueError(f"parameter {order[0]!r} comes without a state of its scheduler")
            now, given = self._scheduler.state_dict(), deepcopy(records[order[0]]["scheduler"])
            self._scheduler.load_state_dict(
                {key: shaped(value, now.get(key)) for key, value in given.items()}
            )
        self._drift = self._each(records, "drift")
        steps = self._each(records, "step")
        if steps is None:
            return None
        return Motion(records[self._names[0]]["rate"], steps, self._drift)

    def _each(self, records: Mapping[str, Mapping[str, Any]], key: str) -> list[Tensor] | None:
        """Copies of what the records have under ``key``, like the parameters; None if nothing."""
        found = [
            records[name][key].to(parameter.device, copy=True)
            for name, parameter in zip(self._names, self._parameters, strict=True)
            if key in records[name]
        ]
        return found if len(found) == len(self._names) else None

    def _order(self) -> list[str]:
        """Names of the parameters in the order in which the optimizer numbers them."""
        assert self._optimizer is not None
        names = {id(p): name for name, p in zip(self._names, self._parameters, strict=True)}
        return [names[id(p)] for group in self._optimizer.param_groups for p in group["params"]]

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
