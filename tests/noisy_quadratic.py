"""A quadratic with additive noise on the most delayed stage: exact answers are known for it."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class NoisyQuadratic:
    """f_i(w) = w_1^2/2 + xi_i w_1 with xi = +-noise; the other stages' weights do nothing.

    L = 1 and f* = 0. Not globally bounded, so M is what the user of the problem says.
    """

    num_stages: int
    noise: float = 0.0
    w_1: float = 1.0
    M: float = math.inf
    name: str = "noisy-quadratic"
    L: float = 1.0
    f_star: float = 0.0

    @property
    def variance(self):
        return self.noise**2

    @property
    def num_samples(self):
        return 2 if self.noise else 1

    @property
    def blocks(self):
        return tuple(slice(k, k + 1) for k in range(self.num_stages))

    @property
    def start(self):
        return np.eye(self.num_stages)[0] * self.w_1

    def value(self, w):
        return 0.5 * w[:, 0] ** 2

    def gradients(self, w, sample):
        return self.full_gradient(w) + np.where(
            np.arange(self.num_stages) == 0, self.noise * (1.0 - 2.0 * sample[:, None]), 0.0
        )

    def full_gradient(self, w):
        return np.where(np.arange(self.num_stages) == 0, w, 0.0)


def stability_limit(delay):
    """w_{t+1} = w_t - x w_{t-delay} is stable for 0 < x < 2 sin(pi/(2(2 delay + 1)))."""
    return 2.0 * math.sin(math.pi / (2 * (2 * delay + 1)))


def damping(delay, x):
    """The c with sum_t w_t^2 = 1/(2 x c) for w_{t+1} = w_t - x w_{t-delay} from 1."""
    phi = math.asin(0.5 * x)
    return math.cos(phi) * math.tan(0.25 * math.pi - 0.5 * (2 * delay + 1) * phi)
