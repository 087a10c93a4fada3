"""The worst L-smooth function for delayed gradients, exactly, by semidefinite programming.

Performance estimation (Drori and Teboulle 2014): a run of T iterations touches f only through its
values f_p and gradients g_p at the visited points x_p. An L-smooth function with these exists
if and only if, for all pairs of points (Taylor, Hendrickx, Glineur 2017, theorem 4 with mu = -L),

    f_p >= f_q + <g_p + g_q, x_p - x_q>/2 + ||g_p - g_q||^2/(4 L) - L ||x_p - x_q||^2/4,

and one that is bounded below by f* = 0 if moreover f_p >= ||g_p||^2/(2 L). The points are linear in
the gradients, so all is linear in the f_p and in inner products of gradients, that is in one Gram
matrix per stage (derived here: the stages are orthogonal blocks of coordinates, with a delay each).
The maximum over Gram matrices is the maximum over functions of any dimension.

Where samples are drawn, the points are the nodes of the tree of their histories. The noise of a
sample's gradient is bounded at the visited points; functions f_i with these gradients, and with
the bound everywhere up to any factor above 1, exist (f_i - f may be as rough as it likes).

Needs the optional extra `worst-cases` (the solver Clarabel).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.util import find_spec
from typing import Any

import numpy as np
from scipy import sparse

from theory.protocols import FloatArray

#: Largest number of inequalities between points; 20 iterations without samples have 420.
MOST_PAIRS = 4000
#: Largest order of a Gram matrix.
MOST_VECTORS = 80


class Criterion(StrEnum):
    """What of the run is as large as possible."""

    #: (1/T) sum_{t<T} E||grad f(w^t)||^2.
    AVERAGE = "average"
    #: min_{t<=T} E||grad f(w^t)||^2.
    LEAST = "least"


@dataclass(frozen=True, eq=False)
class WorstCase:
    """The worst value over all functions, and the data of one that attains it.

    ``value`` and ``dual`` enclose the true maximum up to the solver's accuracy: ``dual`` comes from
    multipliers that prove no function is worse. Of the P points, ``values`` (P,) are f,
    ``gradients`` and ``points`` (K, P, V) the coordinates in each stage, relative to w^0.
    """

    value: float
    dual: float
    values: FloatArray = field(repr=False)
    gradients: FloatArray = field(repr=False)
    points: FloatArray = field(repr=False)


def available() -> bool:
    """Whether the solver is installed.

    >>> isinstance(available(), bool)
    True
    """
    return find_spec("clarabel") is not None


def worst_case(
    delays: Sequence[int],
    gamma: float,
    iterations: int,
    criterion: Criterion = Criterion.AVERAGE,
    *,
    smoothness: float = 1.0,
    gap: float = 1.0,
    num_samples: int = 1,
    variance: float = 0.0,
) -> WorstCase:
    """Return the worst function for w_k^{t+1} = w_k^t - gamma grad_k f_{i(t-d_k)}(w^{t-d_k}).

    Args:
        delays: d_k of every stage; nothing is applied while t < d_k.
        gamma: the step size.
        iterations: the number T.
        criterion: what is maximised.
        smoothness: L of f (the f_i need none).
        gap: f(w^0) - f* is at most this.
        num_samples: n; 1 means full gradients. All n^T sample paths enter, so only few fit.
        variance: s^2 with (1/n) sum_i ||grad f_i(w) - grad f(w)||^2 <= s^2.

    Raises:
        ValueError: naming the argument, if it is out of range or the program too large.
        RuntimeError: if the solver is not installed, or fails.

    >>> if available():  # gradient descent with gamma L = 1: 2 gap L/T, and 4 gap L/(3 T + 2)
    ...     average = worst_case([0], 1.0, 4)
    ...     least = worst_case([0], 1.0, 4, Criterion.LEAST)
    ...     assert abs(average.value - 2 / 4) < 1e-6 and abs(least.value - 4 / 14) < 1e-6
    """
    _validate(delays, gamma, iterations, smoothness, gap, num_samples, variance)
    require_solver()
    depth, gradients, drawn, parents = _tree(iterations, num_samples)
    points = _points(delays, gamma, iterations, gradients, drawn, parents)
    program = _Program(len(delays), gradients.shape[1], len(depth), criterion)
    for p in range(len(depth)):
        program.at_most(0.0, {p: -1.0}, [np.outer(gradients[p], gradients[p]) / (2 * smoothness)])
        for q in range(len(depth)):
            if p != q:
                program.at_most(
                    0.0,
                    {q: 1.0, p: -1.0},
                    [
                        _pair(gradients[p], gradients[q], block[p] - block[q], smoothness)
                        for block in points
                    ],
                )
    program.at_most(gap, {0: 1.0}, [np.zeros(2 * gradients.shape[1:])])
    for node, samples in enumerate(drawn):
        if num_samples > 1:
            noise = samples - gradients[node]
            program.at_most(variance, {}, [noise.T @ noise / num_samples])
    squares = [
        np.einsum("pv,pw->vw", gradients[depth == t], gradients[depth == t]) / (depth == t).sum()
        for t in range(iterations + 1)
    ]
    value, dual, values, grams = program.solve(squares)
    roots = [_root(gram) for gram in grams]
    return WorstCase(
        value,
        dual,
        values,
        np.stack([gradients @ root for root in roots]),
        np.stack([block @ root for block, root in zip(points, roots, strict=True)]),
    )


def violation(found: WorstCase, smoothness: float = 1.0) -> float:
    """Return by how much the witness misses an inequality that an L-smooth f >= 0 must meet.

    It is computed from the points, gradients and values alone: at most the solver's accuracy.

    >>> if available():
    ...     assert violation(worst_case([1, 0], 0.3, 3)) < 1e-6
    """
    x, g = (np.concatenate(list(part), axis=1) for part in (found.points, found.gradients))
    step, change = x[:, None] - x, g[:, None] - g
    needed = 0.5 * np.sum((g[:, None] + g) * step, axis=-1)
    needed += np.sum(change**2, axis=-1) / (4 * smoothness)
    needed -= 0.25 * smoothness * np.sum(step**2, axis=-1)
    pairs = found.values + needed - found.values[:, None]
    below = np.sum(g**2, axis=1) / (2 * smoothness) - found.values
    return float(max(pairs.max(), below.max(), 0.0))


def require_solver() -> None:
    """Raise RuntimeError, with what to install, where the solver is missing."""
    if not available():
        raise RuntimeError(
            "worst cases need the solver clarabel: pip install 'ddg-toolkit[worst-cases]'"
        )


def _pair(g_p: FloatArray, g_q: FloatArray, step: FloatArray, smoothness: float) -> FloatArray:
    """The quadratic form of a pair's inequality in one stage's vectors."""
    mixed = np.outer(g_p + g_q, step)
    change = np.outer(g_p - g_q, g_p - g_q)
    found: FloatArray = (
        (mixed + mixed.T) / 4 + change / (4 * smoothness) - smoothness * np.outer(step, step) / 4
    )
    return found


def _tree(
    iterations: int, n: int
) -> tuple[np.ndarray, FloatArray, list[FloatArray], list[tuple[int, int]]]:
    """Nodes = histories i(0..t-1), breadth first; the basis is all samples' gradients at them.

    Returns each node's t; its gradient, (P, V); for t < T its samples' gradients, (n, V); and
    its parent with the sample that was drawn there.
    """
    depth = np.concatenate([np.full(n**t, t) for t in range(iterations + 1)])
    inner = int((depth < iterations).sum())
    size = n * inner + (len(depth) - inner)
    drawn = [np.eye(n, size, n * node) for node in range(inner)]
    leaves = np.eye(len(depth) - inner, size, n * inner)
    gradients = np.concatenate((np.stack([each.mean(axis=0) for each in drawn]), leaves))
    parents = [(-1, 0)] + [((p - 1) // n, (p - 1) % n) for p in range(1, len(depth))]
    return depth, gradients, drawn, parents


def _points(
    delays: Sequence[int],
    gamma: float,
    iterations: int,
    gradients: FloatArray,
    drawn: list[FloatArray],
    parents: list[tuple[int, int]],
) -> FloatArray:
    """Each stage's weights minus w^0 in the basis, (K, P, V)."""
    points = np.zeros((len(delays), *gradients.shape))
    for p in range(1, len(gradients)):
        line = [p]  # the node and its ancestors
        while line[-1]:
            line.append(parents[line[-1]][0])
        for k, delay in enumerate(delays):
            points[k, p] = points[k, line[1]]
            if delay + 1 < len(line):
                source = line[delay + 1]
                points[k, p] -= gamma * drawn[source][parents[line[delay]][1]]
    return points


def _root(gram: FloatArray) -> FloatArray:
    values, vectors = np.linalg.eigh(gram)
    found: FloatArray = vectors * np.sqrt(np.maximum(values, 0.0))
    return found


@dataclass(eq=False)
class _Program:
    """max of a criterion over values f_0..f_{P-1}, K Gram matrices and one more number."""

    stages: int
    order: int
    values: int
    criterion: Criterion
    rows: list[FloatArray] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)

    def at_most(self, limit: float, linear: dict[int, float], forms: list[FloatArray]) -> None:
        """Add sum linear f + sum_k <form_k, G_k> <= limit; one form counts for all stages."""
        row = np.zeros(self.values + 1 + self.stages * len(self._upper[0]))
        for place, factor in linear.items():
            row[place] = factor
        row[self.values + 1 :] = self._vector(forms)
        self.rows.append(row)
        self.limits.append(limit)

    def solve(self, squares: list[FloatArray]) -> tuple[float, float, FloatArray, list[FloatArray]]:
        """Return (value, dual value, f, Gram matrices)."""
        import clarabel

        width = len(self.rows[0])
        cost = np.zeros(width)
        if self.criterion is Criterion.AVERAGE:
            mean = sum(squares[:-1], np.zeros_like(squares[0])) / (len(squares) - 1)
            cost[self.values + 1 :] = -self._vector([mean])
        else:
            cost[self.values] = -1.0  # the extra number is below every E||grad f(w^t)||^2
            for square in squares:
                self.at_most(0.0, {self.values: 1.0}, [-square])
        grams = sparse.eye(width, format="csc")[self.values + 1 :]
        matrix = sparse.vstack((sparse.csc_matrix(np.array(self.rows)), -grams), format="csc")
        limits = np.concatenate((self.limits, np.zeros(grams.shape[0])))
        cones: list[Any] = [clarabel.NonnegativeConeT(len(self.rows))]
        cones += [clarabel.PSDTriangleConeT(self.order)] * self.stages
        settings = clarabel.DefaultSettings()
        settings.verbose = False
        nothing = sparse.csc_matrix((width, width))
        found = clarabel.DefaultSolver(nothing, cost, matrix, limits, cones, settings).solve()
        if str(found.status) not in ("Solved", "AlmostSolved"):
            raise RuntimeError(
                f"the solver gave up ({found.status}): the worst case may be unbounded, or the "
                "program too badly scaled"
            )
        x = np.array(found.x)
        parts = x[self.values + 1 :].reshape(self.stages, -1)
        return -found.obj_val, -found.obj_val_dual, x[: self.values], [*map(self._matrix, parts)]

    @property
    def _upper(self) -> tuple[np.ndarray, np.ndarray]:
        # Column by column, the order in which the solver stores the upper triangle.
        columns, rows = np.tril_indices(self.order)
        return rows, columns

    def _vector(self, forms: list[FloatArray]) -> FloatArray:
        rows, columns = self._upper
        scale = np.where(rows == columns, 1.0, math.sqrt(2.0))
        parts = [form[rows, columns] * scale for form in forms]
        return np.concatenate(parts if len(parts) == self.stages else parts * self.stages)

    def _matrix(self, part: FloatArray) -> FloatArray:
        rows, columns = self._upper
        gram = np.zeros((self.order, self.order))
        gram[rows, columns] = part / np.where(rows == columns, 1.0, math.sqrt(2.0))
        gram[columns, rows] = gram[rows, columns]
        return gram


def _validate(
    delays: Sequence[int],
    gamma: float,
    iterations: int,
    smoothness: float,
    gap: float,
    num_samples: int,
    variance: float,
) -> None:
    if not delays or any(int(delay) != delay or delay < 0 for delay in delays):
        raise ValueError(f"delays must be integers of at least 0, got {delays}")
    for name, value in (("gamma", gamma), ("smoothness", smoothness), ("gap", gap)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite, got {value}")
    if iterations < 1 or num_samples < 1:
        raise ValueError(
            f"iterations and num_samples must be at least 1, got {iterations} and {num_samples}"
        )
    if not (math.isfinite(variance) and variance >= 0):
        raise ValueError(f"variance must be at least 0 and finite, got {variance}")
    nodes = sum(num_samples**t for t in range(min(iterations, 400) + 1))
    inner = (nodes - 1) // num_samples
    if nodes * (nodes - 1) > MOST_PAIRS or num_samples * inner + nodes - inner > MOST_VECTORS:
        raise ValueError(
            f"iterations = {iterations} with num_samples = {num_samples} visits too many "
            f"points for the solver; at most {MOST_PAIRS} pairs and {MOST_VECTORS} gradients fit"
        )
