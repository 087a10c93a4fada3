"""Are a problem's claimed constants true? A numerical search for points that refute them.

A search can refute a claim, with the points as evidence, but never prove it: what it finds are
lower bounds of L, M and the variance, and an upper bound of inf f.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import minimize

from theory.protocols import FloatArray, IntArray, Problem

#: Half the distance of the two points of a secant, and the step of finite differences.
SECANT, DIFFERENCE = 1e-4, 1e-5
#: Differences, relative, that are put down to rounding.
ROUNDING = 1e-7
#: Random points, of which the best are improved on.
CANDIDATES = 256


@dataclass(frozen=True, eq=False)
class GivenProblem:
    """A `Problem` from plain functions, to be probed, checked or iterated.

    Args:
        value: f(w), shape (P,), for w of shape (P, dim).
        gradient: grad f_i(w), shape (P, dim), for such a w and the number i of a sample.
        num_samples: the number n of samples.
        start: w^0, shape (dim,).
        blocks: the weights of every stage; None is one stage.
        L, M, variance, f_star: the claims, see `Problem`.

    Raises ValueError if there is no sample.

    >>> square = GivenProblem(lambda w: 0.5 * w[:, 0] ** 2, lambda w, i: w, 1, np.ones(1), L=1.0)
    >>> square.full_gradient(square.start[None])
    array([[1.]])
    """

    value: Callable[[FloatArray], FloatArray]
    gradient: Callable[[FloatArray, int], FloatArray] = field(repr=False)
    num_samples: int
    start: FloatArray = field(repr=False)
    blocks: tuple[slice, ...] = ()
    L: float = math.inf
    M: float = math.inf
    variance: float = math.inf
    f_star: float = -math.inf
    name: str = "given"

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {self.num_samples}")
        if not self.blocks:
            object.__setattr__(self, "blocks", (slice(0, len(self.start)),))

    def gradients(self, w: FloatArray, sample: IntArray) -> FloatArray:
        """Return row p = grad f_{sample[p]}(w[p]), shape (P, dim)."""
        rows = np.empty(w.shape)
        for i in np.unique(sample):
            rows[sample == i] = self.gradient(w[sample == i], int(i))
        return rows

    def full_gradient(self, w: FloatArray) -> FloatArray:
        """Return grad f, shape (P, dim): the mean over the samples."""
        total = np.zeros(w.shape)
        for i in range(self.num_samples):
            total += self.gradient(w, i)
        return total / self.num_samples


@dataclass(frozen=True, eq=False)
class Finding:
    """The most that was found against one claim.

    ``found`` is a lower bound of L, M or the variance, or an upper bound of inf f; of "gradient"
    it is the largest deviation and ``claimed`` the one that rounding explains. ``points`` (1 or 2,
    dim) are where. ``wrong``: the claim cannot be true.
    """

    claim: str
    claimed: float
    found: float
    points: FloatArray
    wrong: bool

    def __str__(self) -> str:
        w = " and ".join(np.array2string(point, precision=6) for point in self.points)
        reason = {
            "L": f"the gradients at {w} need {self.found:.6g}",
            "M": f"the mean squared gradient at {w} is {self.found:.6g}",
            "variance": f"the variance at {w} is {self.found:.6g}",
            "f_star": f"f at {w} is {self.found:.6g}",
            "gradient": f"it differs from finite differences by {self.found:.6g} at {w}",
        }[self.claim]
        if self.claim == "gradient":
            return f"gradient is wrong: {reason}" if self.wrong else "gradient agrees with f"
        verdict = "but" if self.wrong else "and"
        return f"claimed {self.claim} = {self.claimed:.6g}, {verdict} {reason}"


def probe(
    problem: Problem, *, restarts: int = 4, radius: float = 3.0, seed: int = 0
) -> tuple[Finding, ...]:
    """Search for points that refute the problem's gradient, L, M, variance and f_star.

    Args:
        problem: one of `theory.problems`, or a `GivenProblem`.
        restarts: local searches per constant, at least 1, from the best of many random points.
        radius: scale of their distance from ``problem.start``, positive.
        seed: of the random points.

    Returns:
        One finding for each of the five, in that order. An infinite claim cannot be wrong, and is
        not searched beyond the random points.

    Raises:
        ValueError: if ``restarts`` or ``radius`` is out of range, or f or a gradient is not finite
            at ``problem.start``.

    >>> claims = {"L": 0.9, "M": 1.0, "variance": 0.0, "f_star": 0.0}
    >>> wave = GivenProblem(
    ...     lambda w: 1 - np.cos(w[:, 0]), lambda w, i: np.sin(w), 1, np.ones(1), **claims)
    >>> [finding.claim for finding in probe(wave) if finding.wrong]
    ['L']
    """
    if restarts < 1:
        raise ValueError(f"restarts must be at least 1, got {restarts}")
    if not (math.isfinite(radius) and radius > 0):
        raise ValueError(f"radius must be positive and finite, got {radius}")
    if not (np.isfinite(_values(problem, problem.start[None])[0])
            and np.isfinite(_moments(problem, problem.start[None])).all()):  # fmt: skip
        raise ValueError(f"problem {problem.name!r}: f or a gradient is not finite at its start")
    rng = np.random.default_rng(seed)
    scales = radius * rng.uniform(0.0, 1.0, (CANDIDATES, 1)) ** 2
    away = scales * rng.standard_normal((CANDIDATES, len(problem.start)))
    points = problem.start + np.concatenate((np.zeros((1, away.shape[1])), away))

    def highest(measure: Callable[[FloatArray], FloatArray], claimed: float) -> FloatArray:
        """The point (dim,) where the measure was found to be largest."""
        found = measure(points)
        best: FloatArray = points[np.argsort(-np.nan_to_num(found, nan=-np.inf))]
        if math.isinf(claimed):
            first: FloatArray = best[0]
            return first
        ends = [_climb(measure, point) for point in best[:restarts]]
        result: FloatArray = max([best[0], *ends], key=lambda w: float(measure(w[None])[0]))
        return result

    lowest = highest(lambda w: -_values(problem, w), problem.f_star)
    # Hessians are often largest at a minimum.
    points = np.concatenate((lowest[None], points))
    steepest = highest(lambda w: _moments(problem, w)[0], problem.M)
    scattered = highest(lambda w: _moments(problem, w)[1], problem.variance)
    curved = highest(lambda w: _curvature(problem, w), problem.L)
    secant = _secant(problem, curved)
    return (
        _gradient_finding(problem, points[:8]),
        _upper("L", problem.L, _ratio(problem, secant), secant),
        _upper("M", problem.M, float(_moments(problem, steepest[None])[0, 0]), steepest[None]),
        _upper(
            "variance",
            problem.variance,
            float(_moments(problem, scattered[None])[1, 0]),
            scattered[None],
        ),
        _lower(problem, lowest),
    )


def _climb(measure: Callable[[FloatArray], FloatArray], start: FloatArray) -> FloatArray:
    """Improve one point; every derivative is taken in one batch."""
    steps = 1e-6 * np.concatenate(
        (np.zeros((1, len(start))), np.eye(len(start)), -np.eye(len(start)))
    )

    def value_and_slope(w: FloatArray) -> tuple[float, FloatArray]:
        values = measure(w + steps)
        plus, minus = np.split(values[1:], 2)
        return -float(values[0]), -(plus - minus) / 2e-6

    # Not L-BFGS-B: on these few weights it spent its time waiting for threads of the BLAS.
    found = minimize(value_and_slope, start, jac=True, method="BFGS", options={"maxiter": 40})
    result: FloatArray = found.x if np.isfinite(found.x).all() else start
    return result


def _values(problem: Problem, w: FloatArray) -> FloatArray:
    return np.asarray(problem.value(w), dtype=np.float64)


def _moments(problem: Problem, w: FloatArray) -> FloatArray:
    """Return mean_i ||grad f_i||^2 and mean_i ||grad f_i - grad f||^2, shape (2, P)."""
    samples = range(problem.num_samples)
    rows = np.stack([problem.gradients(w, np.full(len(w), i, dtype=np.int64)) for i in samples])
    spread = rows - rows.mean(axis=0)
    squares = np.stack((np.sum(rows**2, axis=2), np.sum(spread**2, axis=2)))
    result: FloatArray = squares.mean(axis=1)
    return result


def _hessians(problem: Problem, w: FloatArray) -> FloatArray:
    """Return secants of grad f along all axes, shape (P, dim, dim)."""
    count, dim = w.shape
    steps = SECANT * np.eye(dim)
    ahead = problem.full_gradient((w[:, None] + steps).reshape(-1, dim))
    behind = problem.full_gradient((w[:, None] - steps).reshape(-1, dim))
    result: FloatArray = ((ahead - behind) / (2 * SECANT)).reshape(count, dim, dim)
    return result


def _curvature(problem: Problem, w: FloatArray) -> FloatArray:
    result: FloatArray = np.linalg.norm(_hessians(problem, w), ord=2, axis=(1, 2))
    return result


def _secant(problem: Problem, w: FloatArray) -> FloatArray:
    """Return the two points around w, along its direction of largest curvature."""
    hessian = _hessians(problem, w[None])[0]
    direction = np.linalg.svd(0.5 * (hessian + hessian.T))[2][0]
    return np.stack((w + SECANT * direction, w - SECANT * direction))


def _ratio(problem: Problem, ends: FloatArray) -> float:
    jump = np.diff(problem.full_gradient(ends), axis=0)
    return float(np.linalg.norm(jump) / np.linalg.norm(np.diff(ends, axis=0)))


def _upper(claim: str, claimed: float, found: float, points: FloatArray) -> Finding:
    return Finding(claim, claimed, found, points, wrong=not found <= claimed * (1 + ROUNDING))


def _lower(problem: Problem, w: FloatArray) -> Finding:
    found = float(_values(problem, w[None])[0])
    slack = ROUNDING * max(1e-5, abs(problem.f_star)) if math.isfinite(problem.f_star) else 0.0
    return Finding("f_star", problem.f_star, found, w[None], not found >= problem.f_star - slack)


def _gradient_finding(problem: Problem, points: FloatArray) -> Finding:
    """Compare grad f with differences of f, and with the mean of the samples' gradients."""
    worst = Finding("gradient", 0.0, 0.0, points[:1], wrong=False)
    steps = DIFFERENCE * np.eye(points.shape[1])
    for w in points:
        numeric = (_values(problem, w + steps) - _values(problem, w - steps)) / (2 * DIFFERENCE)
        row = np.tile(w, (problem.num_samples, 1))
        mean = problem.gradients(row, np.arange(problem.num_samples)).mean(axis=0)
        claimed = problem.full_gradient(w[None])[0]
        off = float(max(np.abs(claimed - numeric).max(), np.abs(claimed - mean).max()))
        scale = max(1.0, float(np.abs(claimed).max()), abs(float(_values(problem, w[None])[0])))
        # Truncation and rounding of a central difference: about h^2 and eps/h.
        explained = 1e-6 * scale
        if not off - explained <= worst.found - worst.claimed or worst.claimed == 0.0:
            worst = Finding("gradient", explained, off, w[None], wrong=not off <= explained)
    return worst
