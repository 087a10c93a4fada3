"""Exact expectations: every sample path is run, in batches, with equal weight."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ddg_sim.schedule import Schedule
from theory.iterate import iterate
from theory.protocols import FloatArray, IntArray, Problem

MAX_PATHS = 10_000_000
#: The weights (64-bit numbers) of one version on one batch; a run holds about ten times as many.
BATCH_NUMBERS = 2**20
#: Weights whose projections follow each other this closely are taken for the same weights.
SAME_WEIGHTS = 1e-11


@dataclass(frozen=True)
class Step:
    """One step given w^t: E[f(w^{t+1}) | w^t] - f(w^t) against -(gamma_t/2)||grad f||^2 + c.

    ``magnitude`` is the largest value of f that went into ``left``: the scale of its rounding.
    """

    t: int
    left: float
    right: float
    magnitude: float


def count_paths(num_samples: int, iterations: int, samples_per_iteration: int = 1) -> int:
    """Return the number n^(T m) of sample paths.

    Raises ValueError, naming the largest number of iterations that fits, beyond MAX_PATHS paths.

    >>> count_paths(2, 8)
    256
    >>> count_paths(2, 24)
    Traceback (most recent call last):
    ValueError: iterations = 24 means 2^24 sample paths, more than 10000000; at most 23 fit
    """
    per_iteration = num_samples**samples_per_iteration
    if per_iteration == 1:
        return 1
    fits = 0
    while per_iteration ** (fits + 1) <= MAX_PATHS:
        fits += 1
    if iterations > fits:
        raise ValueError(
            f"iterations = {iterations} means {per_iteration}^{iterations} sample paths, more than "
            f"{MAX_PATHS}; at most {fits} fit"
        )
    found: int = per_iteration**iterations
    return found


def sample_paths(num_samples: int, length: int, start: int, stop: int) -> IntArray:
    """Return the paths with numbers start..stop-1 in lexicographic order, (stop-start, length).

    >>> sample_paths(2, 3, 3, 5)
    array([[0, 1, 1],
           [1, 0, 0]])
    """
    numbers = np.arange(start, stop, dtype=np.int64)[:, None]
    place = num_samples ** np.arange(length - 1, -1, -1, dtype=np.int64)
    digits: IntArray = numbers // place % num_samples
    return digits


def mean_squared_gradients(
    schedule: Schedule, problem: Problem, step_sizes: npt.ArrayLike
) -> FloatArray:
    """Return G_t = E||grad f(w^t)||^2 for t = 0..T-1, shape (T,), exactly up to rounding.

    Raises ValueError if there are too many paths, or as `theory.iterate.iterate` does.

    >>> from ddg_sim.methods import bp
    >>> from theory.problems import one_sided_cosine
    >>> [round(float(g), 6) for g in mean_squared_gradients(bp(2), one_sided_cosine(), [0.1, 0.1])]
    [1.0, 0.990033]
    """
    gammas = np.asarray(step_sizes, dtype=np.float64)
    sums: list[list[float]] = [[] for _ in gammas]
    total = count_paths(problem.num_samples, len(gammas), schedule.samples_per_iteration)
    for paths in _batches(schedule, problem, len(gammas)):
        run = iterate(schedule, problem, paths, gammas)
        for tick, weights in enumerate(run.distinct[:-1]):
            squares = float(np.sum(problem.full_gradient(weights) ** 2))
            sums[tick].append(squares * (len(paths) / len(weights)))
    return np.array([math.fsum(parts) / total for parts in sums])


def worst_step(
    schedule: Schedule, problem: Problem, step_sizes: npt.ArrayLike, constant: float
) -> Step:
    """Return the step t < T and the w^t that exceed the one-step right side most.

    The condition is the value of w^t: the left side averages over the sample that is drawn next
    and over all histories that lead to the same w^t. Histories are told apart by one generic
    linear function of w^t, up to SAME_WEIGHTS. Confusing two values would only average two
    inequalities that the statement claims separately, so it can hide a violation, not invent one.

    ``constant`` is the c of the right side -(gamma_t/2)||grad f(w^t)||^2 + c.
    Raises ValueError if there are too many paths, or as `theory.iterate.iterate` does.

    >>> from ddg_sim.methods import ddg
    >>> from theory.problems import one_sided_cosine
    >>> worst = worst_step(ddg(2), one_sided_cosine(), [0.01, 0.01], constant=0.0018)
    >>> worst.t, worst.left, round(worst.right, 12)
    (0, 0.0, -0.0032)
    """
    gammas = np.asarray(step_sizes, dtype=np.float64)
    count_paths(problem.num_samples, len(gammas), schedule.samples_per_iteration)
    direction = np.random.default_rng(0).uniform(1.0, 2.0, len(problem.start))
    siblings = problem.num_samples**schedule.samples_per_iteration
    worst = Step(0, -math.inf, math.inf, 0.0)
    for t in range(len(gammas)):
        # Per history i(0..t-1): a projection of w^t, left side, right side, largest |f|.
        parts: list[FloatArray] = []
        for paths in _batches(schedule, problem, t + 1):
            run = iterate(schedule, problem, paths, gammas[: t + 1])
            # The siblings i(t) = 0..n-1 follow each other and share w^t.
            before = run.at(t)[::siblings]
            after = problem.value(run.at(t + 1)).reshape(-1, siblings)
            now = problem.value(before)
            slope = np.sum(problem.full_gradient(before) ** 2, axis=1)
            left = after.mean(axis=1) - now
            right = constant - 0.5 * gammas[t] * slope
            scale = np.maximum(np.abs(now), np.abs(after).max(axis=1))
            parts.append(np.stack((before @ direction, left, right, scale)))
        worst = max(worst, _worst_group(t, np.concatenate(parts, axis=1)), key=_excess)
    return worst


def _excess(step: Step) -> float:
    return step.left - step.right


def _worst_group(t: int, table: FloatArray) -> Step:
    """Average the histories with the same w^t; the columns of ``table`` are the histories."""
    projection, left, right, scale = table[:, np.argsort(table[0], kind="stable")]
    first = np.flatnonzero(np.diff(projection, prepend=-np.inf) > SAME_WEIGHTS)
    size = np.diff(first, append=len(projection))
    lefts = np.add.reduceat(left, first) / size
    rights = np.add.reduceat(right, first) / size
    worst = int(np.argmax(lefts - rights))
    return Step(t, float(lefts[worst]), float(rights[worst]), float(scale.max()))


def _batches(schedule: Schedule, problem: Problem, iterations: int) -> Iterator[IntArray]:
    """Yield all paths of that many iterations in order.

    A batch is all continuations of one beginning, for `iterate` computes shared beginnings once.
    Of one iteration's samples it always holds all choices.
    """
    total = count_paths(problem.num_samples, iterations, schedule.samples_per_iteration)
    length = iterations * schedule.samples_per_iteration
    per_iteration = problem.num_samples**schedule.samples_per_iteration
    size = per_iteration
    while size < total and size * per_iteration * len(problem.start) <= BATCH_NUMBERS:
        size *= per_iteration
    for start in range(0, total, size):
        yield sample_paths(problem.num_samples, length, start, start + size)
