"""What chains of stages with a state in the plane and one angle per stage have in common.

Inside, states are (2, P) and the numbers of all paths lie together. The weights enter by their
cosine and sine only, which bounds every weight map and is computed once per gradient.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from theory.elementary import cos_sin
from theory.protocols import FloatArray, IntArray


class Bounds(NamedTuple):
    """What holds for K stages at all weights and all inputs with ||h_0|| <= r."""

    reach: float  # ||h_K||
    slope: float  # ||Dh_K||, the Jacobian in all K weights
    bend: float  # ||D^2 h_K[v, v]|| for ||v|| = 1


class Replay(NamedTuple):
    """How a layer's backward pass from the same h_in depends on its weight, for ||delta|| = 1."""

    carry: float  # ||d loss/d h_in||
    slope: float  # |d loss/d w|
    carry_turn: float  # Lipschitz constant of the former in w
    slope_turn: float  # and of the latter


class Layer(Protocol):
    """One stage h_out = T(w, h_in) in the plane, with cos w and sin w of shape (P,)."""

    def forward(self, cos: FloatArray, sin: FloatArray, h: FloatArray) -> FloatArray:
        """Return h_out (2, P) for h = h_in (2, P)."""

    def backward(
        self,
        cos: FloatArray,
        sin: FloatArray,
        h_in: FloatArray,
        h_out: FloatArray,
        delta: FloatArray,
    ) -> tuple[FloatArray, FloatArray]:
        """Return (d loss/d w (P,), d loss/d h_in (2, P)) from delta = d loss/d h_out."""

    def inverse(self, cos: FloatArray, sin: FloatArray, h: FloatArray) -> FloatArray:
        """Return h_in (2, P) for h = h_out (2, P)."""

    def bounds(self, radius: float, stages: int) -> Bounds:
        """Return the bounds for inputs with ||h_0|| <= ``radius``."""

    def replay(self, radius: float) -> Replay:
        """Return the bounds of the backward pass, h_out computed again or not."""


@dataclass(frozen=True, eq=False)
class Chain:
    """h_k = T(w_k, h_{k-1}), loss 1/2 ||h_K - y||^2: a `LayeredProblem`, one weight per stage.

    ``h_0`` (n, 2) are the samples' inputs, ``targets`` (n, 2) the y, ``start`` (K,) the weights.
    Plain tanh or linear chains have no global L or M; bounded weight maps do.

    ``f_star = 0`` is a lower bound for any targets, and attained where a teacher chain made them.

    Raises ValueError where the shapes disagree.

    >>> from theory.rotation import Rotation
    >>> x = np.array([[0.5, 0.0]])
    >>> chain = Chain("toy", Rotation(), x, np.tanh(x), np.zeros(1))
    >>> round(float(chain.value(np.zeros((1, 1)))[0]), 15)
    0.0
    """

    name: str
    layer: Layer = field(repr=False)
    h_0: FloatArray = field(repr=False)
    targets: FloatArray = field(repr=False)
    start: FloatArray = field(repr=False)

    def __post_init__(self) -> None:
        if self.h_0.shape != self.targets.shape or self.h_0.shape[1:] != (2,):
            raise ValueError(
                f"h_0 {self.h_0.shape} and targets {self.targets.shape} must both be (n, 2)"
            )

    @property
    def blocks(self) -> tuple[slice, ...]:
        """One weight per stage."""
        return tuple(slice(k, k + 1) for k in range(len(self.start)))

    @property
    def num_samples(self) -> int:
        """The number n of samples."""
        return len(self.h_0)

    @property
    def f_star(self) -> float:
        """Zero: the loss is a square."""
        return 0.0

    @cached_property
    def _bounds(self) -> Bounds:
        radius = float(np.linalg.norm(self.h_0, axis=1).max())
        return self.layer.bounds(radius, len(self.start))

    @cached_property
    def _residual_bound(self) -> float:
        """The B with ||h_K - y|| <= B."""
        return self._bounds.reach + float(np.linalg.norm(self.targets, axis=1).max())

    @property
    def L(self) -> float:
        """p^2 + B q, for p, q the layer's bounds on Dh_K and D^2 h_K, and B on h_K - y.

        Derived here: the Hessian of f_i is J^T J + sum_j (h_K - y)_j D^2 (h_K)_j, and J = Dh_K. A
        sum of worst cases that need not meet: not attained in general.
        """
        return self._bounds.slope**2 + self._residual_bound * self._bounds.bend

    @property
    def M(self) -> float:
        """p^2 B^2, because grad f_i = J^T (h_K - y). Not attained in general."""
        return (self._bounds.slope * self._residual_bound) ** 2

    @property
    def variance(self) -> float:
        """M, the second moment; 0 for a single sample."""
        return self.M if self.num_samples > 1 else 0.0

    @cached_property
    def _replay(self) -> tuple[Replay, FloatArray]:
        """The layer's bounds, and B carry^(K-k), which bounds ||delta|| behind stage k."""
        radius = float(np.linalg.norm(self.h_0, axis=1).max())
        replay = self.layer.replay(radius)
        behind = np.arange(len(self.start) - 1, -1, -1)
        delta: FloatArray = self._residual_bound * replay.carry ** behind.astype(np.float64)
        return replay, delta

    @property
    def replay_M(self) -> float:
        """Bound on ||u||^2, u made of stages' gradients at any weights: sum of squared slopes."""
        replay, delta = self._replay
        return float(np.sum((replay.slope * delta) ** 2))

    @property
    def replay_L(self) -> float:
        """The L' with ||u - grad f_i(w)|| <= L' ||Delta w||, backward passes at w + Delta w.

        Forward passes are at w: what a stage received does not change. Derived here: the change of
        block k is at most sum_j A_kj |Delta w_j|, A_kk its own turn and A_kj for j > k that of the
        delta which stage j sends. The last stage, if it is delayed and computes h_K again, moves
        the h_K - y that all start from: by slope |Delta w_K|. L' = ||A||. Not attained in general.
        """
        replay, delta = self._replay
        stage = np.arange(len(delta))
        between = np.maximum(stage[None, :] - stage[:, None] - 1, 0)
        change = np.triu(replay.slope * replay.carry**between * replay.carry_turn * delta, 1)
        change += np.diag(replay.slope_turn * delta)
        change[:, -1] += replay.slope**2 * replay.carry ** stage[::-1].astype(np.float64)
        return float(np.linalg.norm(change, 2))

    def outputs(self, w: FloatArray) -> FloatArray:
        """Return what the last stage makes of every sample at weights w (K,), shape (n, 2)."""
        h = self.h_0
        for k in range(len(self.start)):
            h = self.forward(k, np.full((len(h), 1), w[k]), h)
        return h

    def inputs(self, sample: IntArray) -> FloatArray:
        """Return the samples' inputs h_0, shape (P, 2)."""
        return self.h_0.T.take(sample, axis=1).T

    def forward(self, stage: int, w_k: FloatArray, h: FloatArray) -> FloatArray:
        """Return h_k, shape (P, 2), for w_k (P, 1) and h = h_{k-1} (P, 2).

        ``stage`` is 0-based and unused: the stages differ in their weight only.
        """
        angle = w_k[:, 0]
        return self.layer.forward(*cos_sin(angle), h.T).T

    def backward(
        self, stage: int, w_k: FloatArray, h_in: FloatArray, h_out: FloatArray, delta: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Return (gradient of w_k (P, 1), delta of the stage before (P, 2)).

        The three readings of "the delayed backward" are three choices of the arguments:
        stash = everything from the forward; current = w_k new, h_in and h_out from the forward
        (a retained graph whose weights moved); replay = w_k new and h_out = forward(w_k, h_in).
        """
        cos, sin = cos_sin(w_k[:, 0])
        slope, before = self.layer.backward(cos, sin, h_in.T, h_out.T, delta.T)
        return slope[:, None], before.T

    def inverse(self, stage: int, w_k: FloatArray, h: FloatArray) -> FloatArray:
        """Return h_{k-1}, shape (P, 2), for w_k (P, 1) and h = h_k (P, 2).

        Raises ValueError where the layer's outputs do not reach h.
        """
        angle = w_k[:, 0]
        return self.layer.inverse(*cos_sin(angle), h.T).T

    def loss_gradient(self, h: FloatArray, sample: IntArray) -> FloatArray:
        """Return h - y, the gradient of the loss at the output h, shape (P, 2)."""
        return (h.T - self.targets.T.take(sample, axis=1)).T

    def value(self, w: FloatArray) -> FloatArray:
        """Return f(w), shape (P,), for w of shape (P, K)."""
        cos, sin = cos_sin(w.T)
        total = np.zeros(len(w))
        for x, y in zip(self.h_0, self.targets, strict=True):
            h = np.repeat(x[:, None], len(w), axis=1)
            for k in range(len(self.start)):
                h = self.layer.forward(cos[k], sin[k], h)
            total += 0.5 * np.sum(np.square(h - y[:, None]), axis=0)
        return total / len(self.h_0)

    def gradients(self, w: FloatArray, sample: IntArray) -> FloatArray:
        """Return row p = grad f_{sample[p]}(w[p]), shape (P, K)."""
        angles = w.T
        cos, sin = cos_sin(angles)
        states = [self.h_0.T.take(sample, axis=1)]
        for k in range(len(self.start)):
            states.append(self.layer.forward(cos[k], sin[k], states[k]))
        delta = states[-1] - self.targets.T.take(sample, axis=1)
        gradient = np.empty(cos.shape)
        for k in reversed(range(len(self.start))):
            gradient[k], delta = self.layer.backward(
                cos[k], sin[k], states[k], states[k + 1], delta
            )
        return gradient.T

    def full_gradient(self, w: FloatArray) -> FloatArray:
        """Return grad f, shape (P, K)."""
        total = np.zeros(w.T.shape).T
        for i in range(len(self.h_0)):
            total += self.gradients(w, np.full(len(w), i, dtype=np.int64))
        return total / len(self.h_0)
