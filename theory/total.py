"""The sum of two problems on the same weights and samples."""

import math
from dataclasses import dataclass

from theory.protocols import FloatArray, IntArray, Problem


@dataclass(frozen=True, eq=False)
class Sum:
    """f_i = g_i + h_i. Start and blocks are those of the first part.

    Derived here: L adds up by the triangle inequality; square roots of M and of the variance do by
    Minkowski's, in the space of n gradients with the mean square as squared norm; lower bounds
    add up. Attained where both parts' worst cases meet, in place and direction.

    Raises ValueError if the parts disagree on the numbers of samples or weights.

    >>> from theory.problems import one_sided_cosine
    >>> twice = Sum("twice", one_sided_cosine(), one_sided_cosine())
    >>> twice.L, twice.M, twice.variance
    (2.0, 4.0, 0.0)
    """

    name: str
    first: Problem
    second: Problem

    def __post_init__(self) -> None:
        sizes = [(part.num_samples, len(part.start)) for part in (self.first, self.second)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"first and second must agree on (samples, weights), got {sizes}")

    @property
    def blocks(self) -> tuple[slice, ...]:
        """Those of the first part."""
        return self.first.blocks

    @property
    def num_samples(self) -> int:
        """The number n of samples."""
        return self.first.num_samples

    @property
    def start(self) -> FloatArray:
        """That of the first part."""
        return self.first.start

    @property
    def L(self) -> float:
        """L_g + L_h."""
        return self.first.L + self.second.L

    @property
    def M(self) -> float:
        """(sqrt M_g + sqrt M_h)^2."""
        return (math.sqrt(self.first.M) + math.sqrt(self.second.M)) ** 2

    @property
    def variance(self) -> float:
        """(sqrt s_g^2 + sqrt s_h^2)^2."""
        return (math.sqrt(self.first.variance) + math.sqrt(self.second.variance)) ** 2

    @property
    def f_star(self) -> float:
        """The sum of the lower bounds: a lower bound."""
        return self.first.f_star + self.second.f_star

    def value(self, w: FloatArray) -> FloatArray:
        """Return f(w), shape (P,), for w of shape (P, dim)."""
        return self.first.value(w) + self.second.value(w)

    def gradients(self, w: FloatArray, sample: IntArray) -> FloatArray:
        """Return row p = grad f_{sample[p]}(w[p]), shape (P, dim)."""
        return self.first.gradients(w, sample) + self.second.gradients(w, sample)

    def full_gradient(self, w: FloatArray) -> FloatArray:
        """Return grad f, shape (P, dim)."""
        return self.first.full_gradient(w) + self.second.full_gradient(w)
