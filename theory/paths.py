"""Exact expectations: every sample path is run, in batches, with equal weight."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ddg_sim.schedule import Schedule
from theory.motion import Motion
from theory.protocols import FloatArray, IntArray, Problem
from theory.rows import spread

MAX_PATHS = 10_000_000
#: The weights (64-bit numbers) of one version on one batch; a run holds about ten times as many.
BATCH_NUMBERS = 2**20
#: Weights whose projections follow each other this closely are taken for the same weights.
SAME_WEIGHTS = 1e-11
#: Steps below this multiple of the weights tell nothing about Lipschitz constants.
SHORTEST_STEP = 1e-6


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


@dataclass(frozen=True, eq=False)
class Expectations:
    """Means over all sample paths, tick by tick, and what the run says about the constants.

    ``values`` (T+1,): E f(w^t). Of shape (T,): ``squares`` G_t = E||grad f(w^t)||^2; ``aligned``
    E<grad f(w^t), g^t> and ``moved`` E||g^t||^2 for g^t = (w^t - w^{t+1})/gamma_t; ``moments``
    E (1/n) sum_i ||grad f_i(w^t)||^2 and ``spreads``, the same of grad f_i - grad f.
    ``lowest``: the least f(w^t) on any path. ``steepest``: the largest ||grad f(x) - grad f(y)|| /
    ||x - y|| between a step's two ends.
    """

    values: FloatArray
    squares: FloatArray
    aligned: FloatArray
    moved: FloatArray
    moments: FloatArray
    spreads: FloatArray
    lowest: float
    steepest: float


def expectations(
    motion: Motion,
    problem: Problem,
    step_sizes: npt.ArrayLike,
    paths: IntArray | None = None,
) -> Expectations:
    """Return the means over all n^(T m) sample paths, exactly up to rounding.

    With ``paths`` (P, T m) those over these paths only.

    Raises ValueError if there are too many paths, or as `Motion.run` does.

    >>> from ddg_sim.methods import bp
    >>> from theory.motion import motion
    >>> from theory.problems import one_sided_cosine
    >>> found = expectations(motion(bp(2), 2), one_sided_cosine(), [0.1, 0.1])
    >>> found.squares.round(6).tolist(), found.aligned.round(6).tolist()
    ([1.0, 0.990033], [1.0, 0.990033])
    """
    gammas = np.asarray(step_sizes, dtype=np.float64)
    if paths is None:
        total = count_paths(problem.num_samples, len(gammas), motion.samples_per_iteration)
        batches = _batches(motion, problem, len(gammas))
    else:
        total, batches = len(paths), iter((paths,))
    sums = np.zeros((6, len(gammas) + 1))
    lowest, steepest = math.inf, 0.0
    for batch in batches:
        run = motion.run(problem, batch, gammas)
        before = None
        for tick, w in enumerate(run.distinct):
            share = len(batch) / len(w) / total
            values, slope = problem.value(w), problem.full_gradient(w)
            lowest = min(lowest, float(values.min()))
            sums[0, tick] += share * values.sum()
            sums[1, tick] += share * np.sum(slope**2)
            if before is not None:
                earlier, earlier_slope = (spread(rows, len(w)) for rows in before)
                step = earlier - w
                length = np.linalg.norm(step, axis=1)
                scaled = step / gammas[tick - 1]
                sums[2, tick - 1] += share * np.sum(scaled * earlier_slope)
                sums[3, tick - 1] += share * np.sum(scaled**2)
                # Below that length rounding would be divided by next to nothing.
                far = length > SHORTEST_STEP * (1.0 + np.abs(w).max(initial=0.0))
                turned = np.linalg.norm(earlier_slope - slope, axis=1)[far] / length[far]
                steepest = max(steepest, float(turned.max(initial=0.0)))
            if tick < len(gammas):
                for i in range(problem.num_samples):
                    gradient = problem.gradients(w, np.full(len(w), i, dtype=np.int64))
                    mean = share / problem.num_samples
                    sums[4, tick] += mean * np.sum(gradient**2)
                    sums[5, tick] += mean * np.sum((gradient - slope) ** 2)
            before = w, slope
    squares, aligned, moved, moments, spreads = sums[1:, :-1]
    return Expectations(
        sums[0], squares, aligned, moved, moments, spreads, lowest=lowest, steepest=steepest
    )


def draw_paths(rng: np.random.Generator, num_samples: int, length: int, count: int) -> IntArray:
    """Return ``count`` sample paths, independent and uniform on all, (count, length).

    >>> draw_paths(np.random.default_rng(0), 2, 3, 2)
    array([[1, 1, 1],
           [0, 0, 0]])
    """
    return rng.integers(0, num_samples, (count, length), dtype=np.int64)


def sampled_averages(
    motion: Motion,
    problem: Problem,
    step_sizes: npt.ArrayLike,
    first: int,
    count: int,
    rng: np.random.Generator,
) -> FloatArray:
    """Return sum_t gamma_t ||grad f(w^t)||^2 / sum_t gamma_t over first <= t < T, (count,).

    Each is that of one path drawn at random, so its expectation is the average of the G_t.

    >>> from ddg_sim.methods import bp
    >>> from theory.motion import motion
    >>> from theory.problems import one_sided_cosine
    >>> run, rng = motion(bp(2), iterations=2), np.random.default_rng(0)
    >>> sampled_averages(run, one_sided_cosine(), [0.1, 0.1], 0, 3, rng).round(6)  # one sample
    array([0.995017, 0.995017, 0.995017])
    """
    gammas = np.asarray(step_sizes, dtype=np.float64)
    shares = gammas / gammas[first]  # the first is the largest, so that no sum overflows
    shares /= math.fsum(shares[first:])
    length = len(gammas) * motion.samples_per_iteration
    size = max(1, BATCH_NUMBERS // (len(gammas) * len(problem.start)))
    found: list[FloatArray] = []
    for start in range(0, count, size):
        part = min(size, count - start)
        run = motion.run(problem, draw_paths(rng, problem.num_samples, length, part), gammas)
        total = np.zeros(part)
        for tick in range(first, len(gammas)):
            squares = np.sum(problem.full_gradient(run.distinct[tick]) ** 2, axis=1)
            total += shares[tick] * spread(squares, part)
        found.append(total)
    return np.concatenate(found)


def mean_squared_gradients(
    schedule: Schedule, problem: Problem, step_sizes: npt.ArrayLike
) -> FloatArray:
    """Return G_t = E||grad f(w^t)||^2 for t = 0..T-1, shape (T,), see `expectations`.

    Raises ValueError if there are too many paths, or as `theory.iterate.iterate` does.

    >>> from ddg_sim.methods import bp
    >>> from theory.problems import one_sided_cosine
    >>> [round(float(g), 6) for g in mean_squared_gradients(bp(2), one_sided_cosine(), [0.1, 0.1])]
    [1.0, 0.990033]
    """
    return expectations(Motion(schedule, None), problem, step_sizes).squares


def worst_inner_product(motion: Motion, problem: Problem, step_sizes: npt.ArrayLike) -> Step:
    """Return the t and stage k where E<grad_k f(w^t), grad_k f_i(w^s) - grad_k f(w^s)> is largest.

    s = t - d_k >= 0, i = i(s). ``left`` has grad f_i, ``right`` grad f: equal if i(s) and w^t were
    independent. Over all sample paths.

    Raises ValueError if there are too many paths, or the motion has no fixed delays.

    >>> from ddg_sim.methods import ddg
    >>> from theory.motion import motion
    >>> from theory.problems import opposed_cosines
    >>> start = opposed_cosines((0.25 * np.pi, 0.0))
    >>> worst = worst_inner_product(motion(ddg(2), iterations=2), start, [0.1, 0.1])
    >>> worst.t, round(worst.left, 4), round(worst.right, 4)  # they are not independent
    (1, 0.3082, 0.4588)
    """
    gammas = np.asarray(step_sizes, dtype=np.float64)
    ticks = range(len(gammas))
    total = count_paths(problem.num_samples, len(gammas), motion.samples_per_iteration)
    delays = motion.fixed_delays
    sums = np.zeros((2, len(delays), len(gammas)))
    for paths in _batches(motion, problem, len(gammas)):
        run = motion.run(problem, paths, gammas)
        full = [problem.full_gradient(run.at(t)) for t in ticks]
        for s in ticks:
            gradient = problem.gradients(run.at(s), paths[:, s])
            for k, (delay, block) in enumerate(zip(delays, problem.blocks, strict=True)):
                if s + delay < len(gammas):
                    now = full[s + delay][:, block]
                    sums[0, k, s + delay] += np.sum(now * gradient[:, block]) / total
                    sums[1, k, s + delay] += np.sum(now * full[s][:, block]) / total
    k, t = divmod(int(np.argmax(np.abs(sums[0] - sums[1]))), len(gammas))
    left, right = map(float, sums[:, k, t])
    return Step(t, left, right, float(np.abs(sums).max()))


def worst_step(
    motion: Motion,
    problem: Problem,
    step_sizes: npt.ArrayLike,
    constant: npt.ArrayLike,
    first: int = 0,
) -> Step:
    """Return the step first <= t < T and the w^t that exceed the one-step right side most.

    The condition is the value of w^t: the left side averages over the sample that is drawn next
    and over all histories that lead to the same w^t. Histories are told apart by one generic
    linear function of w^t, up to SAME_WEIGHTS. Confusing two values would only average two
    inequalities that the statement claims separately, so it can hide a violation, not invent one.

    ``constant`` is the c of the right side -(gamma_t/2)||grad f(w^t)||^2 + c, for every t (T,) or
    one for all.
    From the first step on at which a number is not finite, nothing is compared: the sides are nan.
    Raises ValueError if there are too many paths, or as `Motion.run` does.

    >>> from ddg_sim.methods import ddg
    >>> from theory.motion import motion
    >>> from theory.problems import one_sided_cosine
    >>> run = motion(ddg(2), iterations=2)
    >>> worst = worst_step(run, one_sided_cosine(), [0.01, 0.01], constant=0.0018)
    >>> worst.t, worst.left, round(worst.right, 12)
    (0, 0.0, -0.0032)
    """
    gammas = np.asarray(step_sizes, dtype=np.float64)
    count_paths(problem.num_samples, len(gammas), motion.samples_per_iteration)
    direction = np.random.default_rng(0).uniform(1.0, 2.0, len(problem.start))
    siblings = problem.num_samples**motion.samples_per_iteration
    worst = Step(0, -math.inf, math.inf, 0.0)
    constants = np.broadcast_to(np.asarray(constant, dtype=np.float64), gammas.shape)
    for t in range(first, len(gammas)):
        # Per history i(0..t-1): a projection of w^t, left side, right side, largest |f|.
        parts: list[FloatArray] = []
        for paths in _batches(motion, problem, t + 1):
            run = motion.until(t + 1).run(problem, paths, gammas[: t + 1])
            # The siblings i(t) = 0..n-1 follow each other and share w^t.
            before = run.at(t)[::siblings]
            after = problem.value(run.at(t + 1)).reshape(-1, siblings)
            now = problem.value(before)
            slope = np.sum(problem.full_gradient(before) ** 2, axis=1)
            left = after.mean(axis=1) - now
            right = constants[t] - 0.5 * gammas[t] * slope
            scale = np.maximum(np.abs(now), np.abs(after).max(axis=1))
            parts.append(np.stack((before @ direction, left, right, scale)))
        table = np.concatenate(parts, axis=1)
        if not np.isfinite(table).all():
            return Step(t, math.nan, math.nan, math.nan)
        worst = max(worst, _worst_group(t, table), key=_excess)
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


def _batches(motion: Motion, problem: Problem, iterations: int) -> Iterator[IntArray]:
    """Yield all paths of that many iterations in order.

    A batch is all continuations of one beginning, for `iterate` computes shared beginnings once.
    Of one iteration's samples it always holds all choices.
    """
    total = count_paths(problem.num_samples, iterations, motion.samples_per_iteration)
    length = iterations * motion.samples_per_iteration
    per_iteration = problem.num_samples**motion.samples_per_iteration
    size = per_iteration
    while size < total and size * per_iteration * len(problem.start) <= BATCH_NUMBERS:
        size *= per_iteration
    for start in range(0, total, size):
        yield sample_paths(problem.num_samples, length, start, start + size)
