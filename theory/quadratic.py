"""The quadratic with additive noise: unbounded gradients, a variance that is known exactly."""

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from theory.protocols import FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class NoisyQuadratic:
    """f_i(w) = (w - w*)' A (w - w*)/2 + xi_i . (w - w*), with noise that sums to zero.

    Shapes: ``matrix`` A (dim, dim), symmetric and positive semidefinite; ``solution`` w* (dim,);
    ``noise`` xi (n, dim); ``start`` (dim,).

    Derived here: f = (w - w*)' A (w - w*)/2, so L = lambda_max(A) and f* = 0, both attained;
    grad f_i - grad f = xi_i everywhere, so the variance is mean ||xi_i||^2 exactly. grad f is not
    bounded: M = inf.

    Raises ValueError where shapes disagree, A is not as said, or the noise has another mean.

    >>> eye = np.eye(1)
    >>> f = NoisyQuadratic("one", eye, np.zeros(1), np.array([[3.0], [-3.0]]), eye[0], (slice(1),))
    >>> f.L, f.M, f.variance, f.gradients(f.start[None], np.array([1]))
    (1.0, inf, 9.0, array([[-2.]]))
    """

    name: str
    matrix: FloatArray = field(repr=False)
    solution: FloatArray = field(repr=False)
    noise: FloatArray = field(repr=False)
    start: FloatArray = field(repr=False)
    blocks: tuple[slice, ...]

    def __post_init__(self) -> None:
        dim = len(self.start)
        wanted = {"matrix": (dim, dim), "solution": (dim,), "noise": (len(self.noise), dim)}
        for name, shape in wanted.items():
            if (found := getattr(self, name).shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {found}")
        least = float(np.linalg.eigvalsh(self.matrix)[0])
        if not np.array_equal(self.matrix, self.matrix.T) or least < -1e-12 * self.L:
            raise ValueError(
                f"matrix must be symmetric and positive semidefinite, its least eigenvalue: {least}"
            )
        mean = float(np.abs(self.noise.mean(axis=0)).max())
        if mean > 1e-14 * max(1.0, math.sqrt(self.variance)):
            raise ValueError(f"noise must have mean zero, got {mean}")

    @property
    def num_samples(self) -> int:
        """The number n of samples."""
        return len(self.noise)

    @property
    def f_star(self) -> float:
        """Zero, at w*."""
        return 0.0

    @property
    def M(self) -> float:
        """inf: the gradient grows with w."""
        return math.inf

    @cached_property
    def L(self) -> float:
        """lambda_max(A)."""
        return float(np.linalg.eigvalsh(self.matrix)[-1])

    @cached_property
    def variance(self) -> float:
        """mean ||xi_i||^2, exact at every w."""
        return float(np.sum(self.noise**2)) / self.num_samples

    def value(self, w: FloatArray) -> FloatArray:
        """Return f(w), shape (P,), for w of shape (P, dim)."""
        away = w - self.solution
        result: FloatArray = 0.5 * np.sum(away * (away @ self.matrix), axis=1)
        return result

    def gradients(self, w: FloatArray, sample: IntArray) -> FloatArray:
        """Return row p = grad f_{sample[p]}(w[p]), shape (P, dim)."""
        result = self.full_gradient(w)
        result += self._noise_by_weight.take(sample, axis=1).T
        return result

    def full_gradient(self, w: FloatArray) -> FloatArray:
        """Return grad f, shape (P, dim)."""
        result: FloatArray = self.matrix @ (w - self.solution).T
        return result.T

    @cached_property
    def _noise_by_weight(self) -> FloatArray:
        return np.ascontiguousarray(self.noise.T)
