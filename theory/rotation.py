"""The rotation layer h -> tanh(R(w) h) of a `Chain`, and its certified bounds."""

import math
from dataclasses import dataclass

import numpy as np

from theory.chain import Bounds, Replay
from theory.elementary import tanh
from theory.protocols import FloatArray

# sup |tanh''| = sup 2 u (1 - u^2), attained at u = tanh = 1/sqrt 3.
SUP_TANH_CURVATURE = 4.0 / (3.0 * math.sqrt(3.0))


@dataclass(frozen=True)
class Rotation:
    """h_k = tanh(R(w_k) h_{k-1}), R the rotation of the plane by an angle.

    >>> one, zero = np.ones(1), np.zeros(1)
    >>> Rotation().forward(cos=zero, sin=one, h=np.array([[0.5], [0.0]])).T  # a quarter turn
    array([[0.        , 0.46211716]])
    """

    def forward(self, cos: FloatArray, sin: FloatArray, h: FloatArray) -> FloatArray:
        """Return tanh(R h), shape (2, P)."""
        turned = _rotate(cos, sin, h)
        return tanh(turned)

    def backward(
        self,
        cos: FloatArray,
        sin: FloatArray,
        h_in: FloatArray,
        h_out: FloatArray,
        delta: FloatArray,
    ) -> tuple[FloatArray, FloatArray]:
        """Return the gradient of the angle (P,) and delta of the stage before (2, P)."""
        inner = h_out * h_out
        np.subtract(1.0, inner, out=inner)
        inner *= delta
        before = _rotate_back(cos, sin, inner)
        # R'(w) h is R(w) h turned by a right angle, and delta . R' h is (R^T delta) . (h turned).
        slope = before[1] * h_in[0]
        slope -= before[0] * h_in[1]
        return slope, before

    def inverse(self, cos: FloatArray, sin: FloatArray, h: FloatArray) -> FloatArray:
        """Return R^T artanh(h), shape (2, P).

        Raises ValueError where |h| >= 1: no state leads there.
        """
        if not np.abs(h).max() < 1.0:
            raise ValueError("h cannot be reconstructed: tanh stays below 1; take smaller steps")
        return _rotate_back(cos, sin, np.arctanh(h))

    def bounds(self, radius: float, stages: int) -> Bounds:
        """Return r, p_K = r sqrt K and q_K: q_k = s r^2 k + lambda_max[[r, p], [p, q]]_{k-1}.

        Derived here, for s = sup|tanh''| and q_0 = 0. tanh and R do not lengthen a vector. The
        Jacobian of h_k is diag(tanh')[R' h_{k-1}, R J_{k-1}], so ||J_k||^2 <= r^2 + ||J_{k-1}||^2.
        D^2 h_k[v, v] = tanh''(z) (Dz[v])^2 + tanh'(z) D^2 z[v, v], whose first part is at most
        s ||Dz[v]||^2 <= s r^2 k (the 4-norm is below the 2-norm), and
        ||D^2 z[v, v]|| <= r v_k^2 + 2 p_{k-1} |v_k| ||v'|| + q_{k-1} ||v'||^2 for v = (v', v_k).
        """
        bend = 0.0
        for k in range(1, stages + 1):
            p = radius * math.sqrt(k - 1)
            top = np.linalg.eigvalsh(np.array([[radius, p], [p, bend]]))[-1]
            bend = SUP_TANH_CURVATURE * radius * radius * k + float(top)
        return Bounds(radius, radius * math.sqrt(stages), bend)

    def replay(self, radius: float) -> Replay:
        """Return 1, r, s r + 1 and s r^2 + r, s = sup|tanh''|: tanh' turns by s r, R by 1."""
        turn = SUP_TANH_CURVATURE * radius + 1.0
        return Replay(1.0, radius, turn, radius * turn)


def _rotate(cos: FloatArray, sin: FloatArray, h: FloatArray) -> FloatArray:
    """Return R(angle[p]) h[:, p] for every column p."""
    turned = np.empty(h.shape)
    np.multiply(cos, h[0], out=turned[0])
    turned[0] -= sin * h[1]
    np.multiply(sin, h[0], out=turned[1])
    turned[1] += cos * h[1]
    return turned


def _rotate_back(cos: FloatArray, sin: FloatArray, h: FloatArray) -> FloatArray:
    """Return R(-angle[p]) h[:, p] for every column p."""
    turned = np.empty(h.shape)
    np.multiply(cos, h[0], out=turned[0])
    turned[0] += sin * h[1]
    np.multiply(cos, h[1], out=turned[1])
    turned[1] -= sin * h[0]
    return turned
