"""A stage's weights, version by version: what an operation reads and what an update makes of them.

The formulas are those of `ddg_sim.rule.TransformKind`, for SGD with momentum.
"""

from bisect import bisect_left
from dataclasses import dataclass, field, replace

import numpy as np

from ddg_sim.rule import Jacobian, Rule, TransformKind
from ddg_sim.schedule import Op, OpKind, Schedule
from theory.protocols import FloatArray
from theory.rows import align


@dataclass(frozen=True, eq=False)
class Version:
    """Weights after a number of updates, shape (rows, block)."""

    weights: FloatArray
    #: v of the update that made them; None before the first one, and where nothing will read it.
    direction: FloatArray | None = None
    #: The mean of past updates, for `TransformKind.DISCREPANCY`.
    drift: FloatArray | None = None


@dataclass(eq=False)
class StageWeights:
    """One stage's versions, what samples in flight read of them, and the gradients that wait."""

    stage: int
    rule: Rule
    gammas: FloatArray
    momentum: float
    versions: list[Version]
    #: (tick, weights) of every update, in order, and of the start before them.
    history: list[tuple[int, FloatArray]] = field(init=False)
    #: By sample: what its forward pass read.
    stash: dict[int, FloatArray] = field(default_factory=dict)
    #: By sample: the gradient of every replica, or their mean alone.
    pending: dict[int, list[FloatArray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.history = [(-1, self.versions[0].weights)]

    def read(self, op: Op) -> FloatArray:
        """Return the weights that a forward, recompute or backward operation reads.

        Without a correction that is the version's own array, so identity tells whether two
        operations read the same.
        """
        version = self.versions[op.version]
        if op.kind is OpKind.FORWARD:
            ahead = self._number(TransformKind.PREDICT_FORWARD)
            self.stash[op.sample] = self._predict(version, ahead, op)
            return self.stash[op.sample]
        last = op.kind in (OpKind.BACKWARD, OpKind.BACKWARD_WEIGHT)
        stashed = self.stash.pop(op.sample) if last else self.stash[op.sample]
        if self.rule.jacobian is Jacobian.STASHED:
            return stashed
        if self.rule.jacobian is Jacobian.PREDICTED:
            return self._predict(version, self._number(TransformKind.PREDICT_BACKWARD), op)
        if version.drift is None:
            return version.weights
        weights, drift = align(version.weights, version.drift)
        _, *behind = self.rule.values(TransformKind.DISCREPANCY)
        return weights - behind[self.stage] * drift

    def reduce(self, op: Op) -> None:
        """Replace the replicas' gradients of all samples up to the operation's by their mean."""
        for sample in self._up_to(op):
            self.pending[sample] = [_mean(self.pending[sample])]

    def apply(self, update: Op) -> FloatArray:
        """Apply the mean gradient of all samples up to the update's; return the new weights."""
        newest = self.versions[-1]
        gradients = [g for sample in self._up_to(update) for g in self.pending.pop(sample)]
        v = g = _mean(gradients)
        if self.momentum and newest.direction is not None:
            direction, g = align(newest.direction, g)
            v = self.momentum * direction + g
        step = v
        if values := self.rule.values(TransformKind.SPIKE):
            m, delay = self.momentum, values[self.stage]
            step = m**delay * v + (1.0 - m**delay) / (1.0 - m) * g
        gamma = self._rate(update)
        before, step = align(newest.weights, step)
        weights: FloatArray = before - gamma * step
        made = Version(weights, v if self._extrapolates else None, self._drift(newest, gamma, step))
        self.versions.append(made)
        self.history.append((update.iteration, weights))
        return weights

    def share(self, weights: FloatArray, tick: int) -> None:
        """Take over the weights that the update of a tied stage has made."""
        self.versions[-1] = replace(self.versions[-1], weights=weights)
        self.history.append((tick, weights))

    def at(self, tick: int) -> FloatArray:
        """Return the weights at the start of ``tick``."""
        return self.history[bisect_left(self.history, tick, key=lambda event: event[0]) - 1][1]

    @property
    def _extrapolates(self) -> bool:
        """Whether anything will read the directions: they take as much memory as the weights."""
        predicts = (TransformKind.PREDICT_FORWARD, TransformKind.PREDICT_BACKWARD)
        return self.momentum > 0.0 or any(map(self._number, predicts))

    def _up_to(self, op: Op) -> list[int]:
        return [sample for sample in sorted(self.pending) if sample <= op.sample]

    def _number(self, kind: TransformKind) -> float:
        """Return this stage's number of a transform that has one for every stage; or 0."""
        values = self.rule.values(kind)
        return values[self.stage] if values else 0.0

    def _predict(self, version: Version, ahead: float, op: Op) -> FloatArray:
        """Return w - s gamma v."""
        if not ahead or version.direction is None:
            return version.weights
        weights, direction = align(version.weights, version.direction)
        return weights - ahead * float(self.gammas[op.iteration]) * direction

    def _rate(self, update: Op) -> float:
        gamma = float(self.gammas[update.iteration])
        if values := self.rule.values(TransformKind.RATE):
            done = min((update.version - 1) / values[0], 1.0)
            gamma /= float(values[1 + self.stage] ** (1.0 - done))
        return gamma

    def _drift(self, newest: Version, gamma: float, step: FloatArray) -> FloatArray | None:
        values = self.rule.values(TransformKind.DISCREPANCY)
        if not values:
            return None
        change = -gamma * step
        decay = float(values[0] ** (1.0 / values[1 + self.stage]))
        if newest.drift is None:
            return (1.0 - decay) * change
        drift, change = align(newest.drift, change)
        return decay * drift + (1.0 - decay) * change


def tied_stages(schedule: Schedule) -> tuple[int, int] | None:
    """Return the two stages that share weights, or None.

    Raises ValueError if they are on two workers: which update comes first would depend on timing.

    >>> from ddg_sim.methods import ouroboros
    >>> tied_stages(ouroboros(3))
    (0, 2)
    """
    values = schedule.rule.values(TransformKind.TIED)
    if not values:
        return None
    first, second = (int(value) for value in values)
    if schedule.worker_of(first) != schedule.worker_of(second):
        raise ValueError(f"schedule: tied stages {first} and {second} must share a worker")
    return first, second


def require_meaning(schedule: Schedule) -> None:
    """Raise ValueError if parts of the schedule's rule contradict one another.

    >>> from ddg_sim.methods import ddg
    >>> require_meaning(ddg(2))
    """
    if flaw := schedule.rule.contradiction(schedule.num_stages):
        raise ValueError(f"schedule: {flaw}")


def _mean(gradients: list[FloatArray]) -> FloatArray:
    total, *others = align(*gradients)
    for gradient in others:
        total = total + gradient
    result: FloatArray = total / np.float64(len(gradients))
    return result
