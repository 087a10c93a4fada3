"""What a training method does to the numbers, beyond the order and the delay of its operations.

A rule is data. An executor that does not implement a part of it must refuse the schedule: no
answer is better than one that leaves out a correction.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Activations(Enum):
    """What a stage keeps of a sample between its forward and its backward pass."""

    #: Everything that the backward pass needs.
    GRAPH = "graph"
    #: Its input only: a recompute operation runs the forward pass again.
    INPUT = "input"
    #: Nothing: the stage is reversible, and its output comes back with the error.
    RECONSTRUCT = "reconstruct"
    #: Only what the newest sample left: the error of an older sample meets its activations.
    NEWEST = "newest"


class Jacobian(Enum):
    """At which weights a stage differentiates."""

    #: Those that the sample's forward pass read.
    STASHED = "stashed"
    #: Those that the stage has now.
    CURRENT = "current"
    #: Those extrapolated from the weights it has now, see `TransformKind.PREDICT_BACKWARD`.
    PREDICTED = "predicted"


class Gradient(Enum):
    """Where the error that a stage propagates comes from."""

    #: The next stage (the loss, at the last one).
    NEXT = "next"
    #: A local loss of the stage's own; nothing is received.
    LOCAL = "local"


class TransformKind(Enum):
    """A correction of gradients or weights; the formulas take the values of a `Transform`.

    k counts stages from 0, γ is the learning rate, v the direction of the optimizer's last update
    (the velocity of SGD with momentum m, the preconditioned mean of Adam).
    """

    #: (β): the error is multiplied by β whenever it arrives from the next stage.
    SHRINK = "shrink"
    #: (D_0, …): v ← m v + g, w ← w − γ (a v + b g) with a = m^D, b = (1 − m^D)/(1 − m).
    SPIKE = "spike"
    #: (s_0, …): forward passes read w − s γ v, weights predicted s updates ahead.
    PREDICT_FORWARD = "predict-forward"
    #: (s_0, …): the same for backward passes.
    PREDICT_BACKWARD = "predict-backward"
    #: (T, τ_0, …): update t of stage k uses the learning rate γ / τ_k^(1 − min(t/T, 1)).
    RATE = "rate"
    #: (D, τ_0, …): backward passes read w − τ_k δ, δ the mean of past updates with decay D^(1/τ_k).
    DISCREPANCY = "discrepancy"
    #: (i, j): stages i and j share weights; the updates of both apply to them.
    TIED = "tied"


@dataclass(frozen=True, slots=True)
class Transform:
    """One correction and its numbers.

    >>> print(Transform(TransformKind.SHRINK, (0.5,)))
    shrink=0.5
    """

    kind: TransformKind
    values: tuple[float, ...]

    def __str__(self) -> str:
        numbers = (repr(float(value)).removesuffix(".0") for value in self.values)
        return f"{self.kind.value}={','.join(numbers)}"


@dataclass(frozen=True, slots=True)
class Rule:
    """What a method does to the numbers, beyond order and delay."""

    activations: Activations = Activations.GRAPH
    jacobian: Jacobian = Jacobian.STASHED
    gradient: Gradient = Gradient.NEXT
    transforms: tuple[Transform, ...] = ()

    def unusual(self) -> str | None:
        """The first part beyond a kept or recomputed graph at stashed or current weights; or None.

        >>> Rule(Activations.INPUT, Jacobian.CURRENT).unusual() is None
        True
        >>> Rule(gradient=Gradient.LOCAL).unusual()
        'gradient=local'
        """
        if self.activations not in (Activations.GRAPH, Activations.INPUT):
            return f"activations={self.activations.value}"
        if self.jacobian not in (Jacobian.STASHED, Jacobian.CURRENT):
            return f"jacobian={self.jacobian.value}"
        if self.gradient is not Gradient.NEXT:
            return f"gradient={self.gradient.value}"
        return str(self.transforms[0]) if self.transforms else None

    def values(self, kind: TransformKind) -> tuple[float, ...]:
        """The numbers of the transform of that kind; empty if there is none.

        >>> Rule(transforms=(Transform(TransformKind.SHRINK, (0.5,)),)).values(TransformKind.SHRINK)
        (0.5,)
        """
        return next((found.values for found in self.transforms if found.kind is kind), ())

    def contradiction(self, num_stages: int) -> str | None:
        """What of the rule makes no sense for so many stages, or beside its other parts; or None.

        >>> Rule(transforms=(Transform(TransformKind.SPIKE, (2.0, 1.0)),)).contradiction(3)
        'spike=2,1 must have 3 numbers'
        """
        for transform in self.transforms:
            wanted = _LENGTHS.get(transform.kind, num_stages)
            if transform.kind in (TransformKind.RATE, TransformKind.DISCREPANCY):
                wanted = num_stages + 1
            if len(transform.values) != wanted:
                return f"{transform} must have {wanted} numbers"
            jacobian = _READ_AT.get(transform.kind, self.jacobian)
            if self.jacobian is not jacobian:
                return f"{transform} needs jacobian={jacobian.value}, not {self.jacobian.value}"
        return None


_LENGTHS = {TransformKind.SHRINK: 1, TransformKind.TIED: 2}
_READ_AT = {
    TransformKind.PREDICT_BACKWARD: Jacobian.PREDICTED,
    TransformKind.DISCREPANCY: Jacobian.CURRENT,
}
