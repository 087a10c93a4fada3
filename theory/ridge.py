"""Problems in index form, f_i(w) = sum_e c_ie rho(a_e . w; b_e), and their certified constants."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from theory.links import Link
from theory.protocols import FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class RidgeSum:
    """f_i(w) = sum_e coefficients[i, e] * rho(rows[e] . w; offsets[e]), f = (1/n) sum_i f_i.

    Shapes: ``rows`` (E, dim), ``offsets`` (E,), ``coefficients`` (n, E), ``start`` (dim,).
    The mean coefficients must be non-negative (single ones need not be): with rho >= 0 this
    makes ``f_star = 0`` a lower bound, attained where every term is zero (see `theory.links`).

    Raises ValueError where the shapes disagree, a mean coefficient is negative or an offset is
    outside of the range for which the link's suprema are proved.

    >>> from theory.links import COSINE
    >>> eye = np.eye(1)
    >>> f = RidgeSum("one", COSINE, eye, np.zeros(1), eye, np.zeros(1), (slice(0, 1),))
    >>> float(f.value(np.array([[np.pi]]))[0]), f.L, f.M
    (2.0, 1.0, 1.0)
    """

    name: str
    link: Link
    rows: FloatArray = field(repr=False)
    offsets: FloatArray = field(repr=False)
    coefficients: FloatArray = field(repr=False)
    start: FloatArray = field(repr=False)
    blocks: tuple[slice, ...]

    def __post_init__(self) -> None:
        edges, dim = self.rows.shape
        if self.offsets.shape != (edges,) or self.coefficients.shape[1:] != (edges,):
            raise ValueError(
                f"rows {self.rows.shape}, offsets {self.offsets.shape} and coefficients "
                f"{self.coefficients.shape} disagree on the number of terms"
            )
        if self.start.shape != (dim,):
            raise ValueError(f"start has shape {self.start.shape}, rows ask for {(dim,)}")
        if not (np.abs(self.offsets) <= self.link.largest_offset).all():
            raise ValueError(
                f"offsets of {self.link.name} must be from -{self.link.largest_offset:g} to "
                f"{self.link.largest_offset:g}, or L and M are not certified; got {self.offsets}"
            )
        if (self._mean_coefficients < 0).any():
            raise ValueError(
                f"coefficients have a negative mean {self._mean_coefficients}: f_star = 0 and L "
                "would not be certified"
            )

    @property
    def num_samples(self) -> int:
        """The number n of samples."""
        return int(self.coefficients.shape[0])

    @property
    def f_star(self) -> float:
        """Zero: every term of f is a non-negative multiple of rho >= 0."""
        return 0.0

    @cached_property
    def _mean_coefficients(self) -> FloatArray:
        mean: FloatArray = self.coefficients.mean(axis=0)
        return mean

    @cached_property
    def L(self) -> float:
        """Lipschitz constant of grad f: sup|rho''| * lambda_max(sum_e cbar_e a_e a_e^T).

        Derived here: the Hessian is sum_e cbar_e rho''(r_e) a_e a_e^T with cbar_e >= 0, hence
        between -/+ sup|rho''| times the matrix above. Attained at w* if rho''(0) = sup|rho''|.
        """
        gram = (self.rows.T * self._mean_coefficients) @ self.rows
        return self.link.sup_curvature * float(np.linalg.eigvalsh(gram)[-1])

    @cached_property
    def M(self) -> float:
        """sup|rho'|^2 * (1/n) sum_i E_i * lambda_max(C_i A A^T C_i), E_i terms in sample i.

        Derived here: grad f_i = A^T C_i s with |s_e| <= sup|rho'| on the E_i terms that f_i has,
        so ||s||^2 <= E_i sup|rho'|^2. One term: c_i^2 ||a_i||^2 sup|rho'|^2, as in the table of
        the families. Attained if the all-ones vector is a top eigenvector for every i, up to
        signs, and the rows are independent (then one w brings every slope to its supremum).
        """
        total = 0.0
        for c in self.coefficients:
            scaled = c[c != 0, None] * self.rows[c != 0]
            if scaled.size:
                total += len(scaled) * float(np.linalg.eigvalsh(scaled @ scaled.T)[-1])
        return self.link.sup_slope**2 * total / self.num_samples

    @cached_property
    def variance(self) -> float:
        """min(M, sup|rho'|^2 * min(sum_ef |Q_ef|, E lambda_max(Q))), Q = (A A^T) * Cov(c).

        Derived here: grad f_i - grad f = A^T (C_i - Cbar) s, whose mean square is s^T Q s with
        Q_ef = (a_e . a_f) Cov_i(c_ie, c_if) and |s_e| <= sup|rho'|; and a variance is at most the
        second moment. Attained if signs sigma_e sigma_f Q_ef >= 0 exist and the rows are
        independent, for instance by two samples with one term each.
        """
        spread = self.coefficients - self._mean_coefficients
        q = (self.rows @ self.rows.T) * (spread.T @ spread) / self.num_samples
        largest = min(np.abs(q).sum(), len(q) * max(0.0, np.linalg.eigvalsh(q)[-1]))
        return min(self.M, self.link.sup_slope**2 * float(largest))

    def value(self, w: FloatArray) -> FloatArray:
        """Return f(w), shape (P,), for w of shape (P, dim)."""
        values = self.link.value(self.rows @ w.T, self.offsets[:, None])
        result: FloatArray = self._mean_coefficients @ values
        return result

    def gradients(self, w: FloatArray, sample: IntArray) -> FloatArray:
        """Return row p = grad f_{sample[p]}(w[p]), shape (P, dim)."""
        result: FloatArray
        if self._own_terms is None:
            weighted = self.link.slope(self.rows @ w.T, self.offsets[:, None])
            weighted *= self._by_term.take(sample, axis=1)
            result = self.rows.T @ weighted
            return result.T
        # Links cost most (a sine 10 ns, a product 0.4), so only those of a path's own sample are
        # evaluated. Term e = j n + i of path p is number (j n + i) P + p of z.
        own, scaled_rows = self._own_terms
        z, count = w.T[0] - w.T[1:] if self._is_star else self.rows @ w.T, len(sample)
        place = sample * count
        place += np.arange(count)
        steps = np.arange(own)[:, None] * (self.num_samples * count)
        slopes = self.link.slope(
            z.take(place + steps), self.offsets.reshape(own, -1).take(sample, axis=1)
        )
        drawn = np.eye(self.num_samples).take(sample, axis=1)
        if self._is_star:
            slopes *= -scaled_rows[0, 0]
            result = np.empty((len(self.start), count))
            np.negative(slopes.sum(axis=0), out=result[0])
            np.multiply(slopes[:, None], drawn, out=result[1:].reshape(own, -1, count))
        else:
            result = scaled_rows @ (slopes[:, None] * drawn).reshape(-1, count)
        return result.T

    def full_gradient(self, w: FloatArray) -> FloatArray:
        """Return grad f, shape (P, dim)."""
        slopes = self.link.slope(self.rows @ w.T, self.offsets[:, None])
        result: FloatArray = (self.rows.T * self._mean_coefficients) @ slopes
        return result.T

    @cached_property
    def _by_term(self) -> FloatArray:
        return np.ascontiguousarray(self.coefficients.T)

    @cached_property
    def _own_terms(self) -> tuple[int, FloatArray] | None:
        """E/n, and c_ie a_e in column e, if term e is in sample i = e mod n alone and n > 1."""
        n, terms = self.coefficients.shape
        others = np.arange(terms) % n != np.arange(n)[:, None]
        if n == 1 or terms % n or self.coefficients[others].any():
            return None
        return terms // n, self.rows.T * self.coefficients.sum(axis=0)

    @cached_property
    def _is_star(self) -> bool:
        """Whether term e is c rho(w_0 - w_e), e = 1, 2, ...: differences instead of products."""
        hub, leaves = self.rows[:, 0], self.rows[:, 1:]
        coefficients = self.coefficients.sum(axis=0)
        return (
            leaves.shape == (len(hub), len(hub))
            and bool((hub == 1.0).all() and (leaves.diagonal() == -1.0).all())
            and np.count_nonzero(leaves) == len(hub)
            and bool(np.ptp(coefficients) == 0.0)
        )
