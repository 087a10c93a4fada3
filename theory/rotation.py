"""The rotation chain: a real K-stage network with certified constants."""

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from theory.protocols import FloatArray, IntArray

# sup |tanh''| = sup 2 u (1 - u^2), attained at u = tanh = 1/sqrt 3.
SUP_TANH_CURVATURE = 4.0 / (3.0 * math.sqrt(3.0))


@dataclass(frozen=True, eq=False)
class RotationChain:
    """h_k = tanh(R(theta_k) h_{k-1}), loss 1/2 ||h_K - y||^2; one angle theta_k per stage.

    ``h_0`` (n, 2) are the samples' inputs, ``targets`` (n, 2) the y, ``start`` (K,) the initial
    angles. Plain tanh chains have no global L or M; a rotation keeps every weight map bounded.

    ``f_star = 0`` is a lower bound for any targets, and attained where a teacher chain made them.

    >>> import numpy as np
    >>> x = np.array([[0.5, 0.0]])
    >>> chain = RotationChain("toy", x, np.tanh(x), np.zeros(1))
    >>> float(chain.value(np.zeros((1, 1)))[0])
    0.0
    """

    name: str
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
        """One angle per stage."""
        return tuple(slice(k, k + 1) for k in range(len(self.start)))

    @property
    def num_samples(self) -> int:
        """The number n of samples."""
        return len(self.h_0)

    @property
    def f_star(self) -> float:
        """Zero: the loss is a square."""
        return 0.0

    @property
    def _radius(self) -> float:
        """The r with ||h_k|| <= r for every k: tanh and R do not lengthen a vector."""
        return float(np.linalg.norm(self.h_0, axis=1).max())

    @property
    def _residual_bound(self) -> float:
        """The B with ||h_K - y|| <= B."""
        return self._radius + float(np.linalg.norm(self.targets, axis=1).max())

    @cached_property
    def M(self) -> float:
        """K B^2 r^2.

        Derived here: the Jacobian J_k of h_k in the angles is diag(tanh')[R'h_{k-1}, R J_{k-1}],
        so ||J_k||^2 <= r^2 + ||J_{k-1}||^2 <= k r^2 =: p_k^2, and grad f_i = J_K^T (h_K - y).
        """
        return len(self.start) * (self._residual_bound * self._radius) ** 2

    @property
    def variance(self) -> float:
        """M, the second moment; 0 for a single sample."""
        return self.M if self.num_samples > 1 else 0.0

    @cached_property
    def L(self) -> float:
        """K r^2 + B q_K, with q_0 = 0 and q_k = s r^2 k + lambda_max[[r, p], [p, q]]_{k-1}.

        Derived here, for s = sup|tanh''|: the Hessian of f_i is J^T J + sum_j (h - y)_j D^2 h_j.
        D^2 h_k[v, v] = tanh''(z) (Dz[v])^2 + tanh'(z) D^2 z[v, v], whose first part is at most
        s ||Dz[v]||^2 <= s r^2 k (the 4-norm is below the 2-norm), and
        ||D^2 z[v, v]|| <= r v_k^2 + 2 p_{k-1} |v_k| ||v'|| + q_{k-1} ||v'||^2 for v = (v', v_k).
        """
        r = self._radius
        q = 0.0
        for k in range(1, len(self.start) + 1):
            p = r * math.sqrt(k - 1)
            top = np.linalg.eigvalsh(np.array([[r, p], [p, q]]))[-1]
            q = SUP_TANH_CURVATURE * r * r * k + float(top)
        return len(self.start) * r * r + self._residual_bound * q

    def inputs(self, sample: IntArray) -> FloatArray:
        """Return the samples' inputs h_0, shape (P, 2)."""
        return self.h_0[sample]

    def forward(self, stage: int, w_k: FloatArray, h: FloatArray) -> FloatArray:
        """Return tanh(R(w_k) h), shape (P, 2), for w_k (P, 1) and h (P, 2).

        ``stage`` is 0-based and unused: the stages differ in their angle only.
        """
        return np.tanh(_rotate(w_k[:, 0], h))

    def backward(
        self, stage: int, w_k: FloatArray, h_in: FloatArray, h_out: FloatArray, delta: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Return (gradient of w_k (P, 1), delta of the stage before (P, 2)).

        The three readings of "the delayed backward" are three choices of the arguments:
        stash = everything from the forward; current = w_k new, h_in and h_out from the forward
        (a retained graph whose weights moved); replay = w_k new and h_out = forward(w_k, h_in).
        """
        inner = delta * (1.0 - h_out * h_out)
        # R'(theta) h is R(theta) h turned by a right angle.
        turned = _rotate(w_k[:, 0] + 0.5 * np.pi, h_in)
        gradient = np.sum(inner * turned, axis=1, keepdims=True)
        return gradient, _rotate(-w_k[:, 0], inner)

    def loss_gradient(self, h: FloatArray, sample: IntArray) -> FloatArray:
        """Return h - y, the gradient of the loss at the last output, shape (P, 2)."""
        return h - self.targets[sample]

    def value(self, w: FloatArray) -> FloatArray:
        """Return f(w), shape (P,), for w of shape (P, K)."""
        total = np.zeros(len(w))
        for i in range(self.num_samples):
            sample = np.full(len(w), i, dtype=np.int64)
            residual = self.loss_gradient(self._outputs(w, sample)[-1], sample)
            total += 0.5 * np.sum(residual * residual, axis=1)
        return total / self.num_samples

    def gradients(self, w: FloatArray, sample: IntArray) -> FloatArray:
        """Return row p = grad f_{sample[p]}(w[p]), shape (P, K)."""
        outputs = self._outputs(w, sample)
        delta = self.loss_gradient(outputs[-1], sample)
        gradient = np.empty_like(w)
        for k in reversed(range(len(self.start))):
            gradient[:, k : k + 1], delta = self.backward(
                k, w[:, k : k + 1], outputs[k], outputs[k + 1], delta
            )
        return gradient

    def full_gradient(self, w: FloatArray) -> FloatArray:
        """Return grad f, shape (P, K)."""
        total = np.zeros_like(w)
        for i in range(self.num_samples):
            total += self.gradients(w, np.full(len(w), i, dtype=np.int64))
        return total / self.num_samples

    def _outputs(self, w: FloatArray, sample: IntArray) -> list[FloatArray]:
        outputs = [self.inputs(sample)]
        for k in range(len(self.start)):
            outputs.append(self.forward(k, w[:, k : k + 1], outputs[-1]))
        return outputs


def _rotate(angle: FloatArray, h: FloatArray) -> FloatArray:
    """Return R(angle[p]) h[p] for every row p."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack((cos * h[:, 0] - sin * h[:, 1], sin * h[:, 0] + cos * h[:, 1]), axis=1)
