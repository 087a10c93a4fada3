"""The reversible layer (u, v) -> (v, u + a sin(w) tanh(v)) of a `Chain`, and its bounds."""

import math
from dataclasses import dataclass

import numpy as np

from theory.chain import Bounds, Replay
from theory.elementary import tanh
from theory.protocols import FloatArray
from theory.rotation import SUP_TANH_CURVATURE


@dataclass(frozen=True)
class Coupling:
    """h_k = (v, u + a sin(w_k) tanh(v)) for h_{k-1} = (u, v), a = ``strength``.

    An additive coupling, as in reversible networks (Gomez, Ren, Urtasun, Grosse, 2017): whatever
    the weights, the input follows from the output.

    >>> layer, state = Coupling(0.5), np.array([[0.1], [0.2]])
    >>> cos, sin = np.cos(np.ones(1)), np.sin(np.ones(1))
    >>> layer.inverse(cos, sin, layer.forward(cos, sin, state)).T
    array([[0.1, 0.2]])
    """

    strength: float

    def forward(self, cos: FloatArray, sin: FloatArray, h: FloatArray) -> FloatArray:
        """Return (v, u + a sin(w) tanh(v)), shape (2, P)."""
        out = np.empty(h.shape)
        out[0] = h[1]
        out[1] = tanh(h[1])
        out[1] *= sin
        out[1] *= self.strength
        out[1] += h[0]
        return out

    def backward(
        self,
        cos: FloatArray,
        sin: FloatArray,
        h_in: FloatArray,
        h_out: FloatArray,
        delta: FloatArray,
    ) -> tuple[FloatArray, FloatArray]:
        """Return the gradient of the weight (P,) and delta of the stage before (2, P).

        tanh(v) is computed again from the input: h_out = u + a sin(w) tanh(v) holds it only where
        sin(w) is not 0.
        """
        bent = tanh(h_in[1])
        pull = self.strength * delta[1]
        before = np.empty(h_in.shape)
        before[0] = delta[1]
        np.subtract(1.0, bent * bent, out=before[1])
        before[1] *= sin * pull
        before[1] += delta[0]
        bent *= cos
        bent *= pull
        return bent, before

    def inverse(self, cos: FloatArray, sin: FloatArray, h: FloatArray) -> FloatArray:
        """Return (h_2 - a sin(w) tanh(h_1), h_1), shape (2, P)."""
        before = np.empty(h.shape)
        before[1] = h[0]
        np.subtract(h[1], self.strength * sin * tanh(h[0]), out=before[0])
        return before

    def bounds(self, radius: float, stages: int) -> Bounds:
        """Return r_K, p_K and q_K, from r_0 = r and p_0 = q_0 = 0.

        With b = a tanh(r_{k-1}): r_k = r_{k-1} + b, p_k^2 = b^2 + nu^2 p_{k-1}^2 and
        q_k = lambda_max[[b, a p], [a p, nu q + a s p^2]]_{k-1}, where nu = (a + sqrt(a^2 + 4))/2
        and s = sup|tanh''|.

        Derived here. A stage adds a vector of length at most a |tanh(v)| <= b. Its Jacobian in h is
        [[0, 1], [1, c]], |c| <= a, whose norm is at most nu; its derivative in w is at most b. So
        ||Dh_k[v]|| <= nu p_{k-1} ||v'|| + b |v_k| for v = (v', v_k), hence p_k. With x = Dv[v'],
        D^2 h_k[v, v] = J_h D^2 h_{k-1}[v', v'] + (0, y), where
        y = a sin(w) tanh''(v) x^2 + 2 a cos(w) tanh'(v) x v_k - a sin(w) tanh(v) v_k^2, so
        |y| <= a s p_{k-1}^2 ||v'||^2 + 2 a p_{k-1} ||v'|| |v_k| + b v_k^2.
        """
        a = self.strength
        growth = 0.5 * (a + math.hypot(a, 2.0))
        slope = bend = 0.0
        for _ in range(stages):
            b = a * math.tanh(radius)
            corner = growth * bend + a * SUP_TANH_CURVATURE * slope**2
            top = np.linalg.eigvalsh(np.array([[b, a * slope], [a * slope, corner]]))[-1]
            radius, slope, bend = radius + b, math.hypot(b, growth * slope), float(top)
        return Bounds(radius, slope, bend)

    def replay(self, radius: float) -> Replay:
        """Return ||[[0, 1], [1, a]]||, a, a and a: sin, cos, tanh and tanh' are at most 1."""
        a = self.strength
        return Replay(0.5 * (a + math.sqrt(a * a + 4.0)), a, a, a)
