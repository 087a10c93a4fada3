"""Scalar functions rho(z; b) >= 0 with proved bounds on slope and curvature.

z = a . w is what a term sees of the weights and b its parameter. Most depend on r = z - b only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from theory.elementary import tanh
from theory.protocols import FloatArray

Scalar = Callable[[FloatArray, FloatArray], FloatArray]


@dataclass(frozen=True)
class Link:
    """A scalar function rho(z; b) >= 0, and the suprema that certify L and M.

    Both functions take z of shape (E, P) and b of shape (E, 1) or (E, P), and return new arrays
    (E, P).
    """

    name: str
    value: Scalar
    slope: Scalar  # rho', in z
    sup_slope: float  # sup |rho'|
    sup_curvature: float  # sup |rho''|
    largest_offset: float = math.inf  # the suprema are over |b| <= this


def _geman_mcclure_value(z: FloatArray, b: FloatArray) -> FloatArray:
    square = np.square(z - b)
    return square / (1.0 + square)


def _geman_mcclure_slope(z: FloatArray, b: FloatArray) -> FloatArray:
    r = z - b
    below = r * r
    below += 1.0
    below *= below
    r /= below
    r *= 2.0
    return r


# rho' is largest where (1 + r^2) = 4 r^2, r = 1/sqrt 3: 2 r / (4/3)^2 = 3 sqrt 3 / 8.
# rho'' = (2 - 6 r^2) / (1 + r^2)^3 falls from 2 (r = 0) to -1/2 (r = 1) and rises to 0.
GEMAN_MCCLURE = Link(
    "geman-mcclure", _geman_mcclure_value, _geman_mcclure_slope, 3.0 * math.sqrt(3.0) / 8.0, 2.0
)


def _welsch_value(z: FloatArray, b: FloatArray) -> FloatArray:
    # expm1: no cancellation near the minimum.
    return -np.expm1(-0.5 * np.square(z - b))


def _welsch_slope(z: FloatArray, b: FloatArray) -> FloatArray:
    r = z - b
    r *= np.exp(-0.5 * r * r)
    return r


# rho' = r e^{-r^2/2} is largest at r = 1. rho'' = (1 - r^2) e^{-r^2/2} falls from 1 (r = 0) to
# -2 e^{-3/2} (r = sqrt 3) and rises to 0.
WELSCH = Link("welsch", _welsch_value, _welsch_slope, math.exp(-0.5), 1.0)


def _cauchy_value(z: FloatArray, b: FloatArray) -> FloatArray:
    return 0.5 * np.log1p(np.square(z - b))


def _cauchy_slope(z: FloatArray, b: FloatArray) -> FloatArray:
    r = z - b
    r /= 1.0 + r * r
    return r


# rho' = r/(1 + r^2) is largest at r = 1. rho'' = (1 - r^2)/(1 + r^2)^2 falls from 1 (r = 0) to
# -1/8 (r = sqrt 3) and rises to 0.
CAUCHY = Link("cauchy", _cauchy_value, _cauchy_slope, 0.5, 1.0)


def _cosine_value(z: FloatArray, b: FloatArray) -> FloatArray:
    # 2 sin^2(r/2) instead of 1 - cos r: no cancellation near the minimum.
    return 2.0 * np.square(np.sin(0.5 * (z - b)))


def _cosine_slope(z: FloatArray, b: FloatArray) -> FloatArray:
    r = z - b
    return np.sin(r, out=r)


COSINE = Link("cosine", _cosine_value, _cosine_slope, 1.0, 1.0)


def _sigmoid_value(z: FloatArray, b: FloatArray) -> FloatArray:
    p: FloatArray = expit(b - z)
    return p


def _sigmoid_slope(z: FloatArray, b: FloatArray) -> FloatArray:
    p: FloatArray = expit(b - z)
    p *= p - 1.0
    return p


# rho = p: rho' = -p (1 - p), largest at p = 1/2; rho'' = p (1 - p) (1 - 2 p), whose square is
# largest where (1 - 2 p)^2 = 1/3.
SIGMOID = Link("sigmoid", _sigmoid_value, _sigmoid_slope, 0.25, 1.0 / (6.0 * math.sqrt(3.0)))


def _log_loss_value(z: FloatArray, b: FloatArray) -> FloatArray:
    result: FloatArray = np.logaddexp(0.0, b - z)
    return result


def _log_loss_slope(z: FloatArray, b: FloatArray) -> FloatArray:
    p: FloatArray = expit(b - z)
    return -p


# rho = log(1 + e^{-r}): rho' = -p, which tends to -1; rho'' = p (1 - p) <= 1/4, at r = 0.
LOG_LOSS = Link("log-loss", _log_loss_value, _log_loss_slope, 1.0, 0.25)


def _tanh_neuron_value(z: FloatArray, b: FloatArray) -> FloatArray:
    return 0.5 * np.square(tanh(z) - b)


def _tanh_neuron_slope(z: FloatArray, b: FloatArray) -> FloatArray:
    u = tanh(z)
    s = 1.0 - u * u
    u -= b
    s *= u
    return s


# With u = tanh z: rho' = (u - b)(1 - u^2), for |b| <= 1 at most (1 + u)(1 - u^2) = 32/27, at
# u = 1/3 and b = -1. rho'' = (1 - u^2)(1 - 3 u^2 + 2 b u), for |b| <= 1 largest at b = 1 (or the
# mirror image), as (1 - u)^2 (1 + u)(1 + 3 u) where 6 u^2 + 3 u = 1; its least value there, -0.962,
# is smaller in size.
_U = (math.sqrt(33.0) - 3.0) / 12.0
TANH_NEURON = Link(
    "tanh-neuron",
    _tanh_neuron_value,
    _tanh_neuron_slope,
    32.0 / 27.0,
    (1.0 - _U) ** 2 * (1.0 + _U) * (1.0 + 3.0 * _U),
    largest_offset=1.0,
)

#: All of them, by name.
LINKS = {
    link.name: link
    for link in (CAUCHY, COSINE, GEMAN_MCCLURE, LOG_LOSS, SIGMOID, TANH_NEURON, WELSCH)
}
