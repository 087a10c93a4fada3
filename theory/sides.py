"""Both sides of a statement, measured on one input: over all sample paths, or over random ones."""

import math
from dataclasses import dataclass

import numpy as np

from theory.claims import CLAIM_SLACK, ROUNDING, require_claims
from theory.confidence import compare
from theory.motion import Motion
from theory.paths import (
    Expectations,
    Step,
    count_paths,
    draw_paths,
    expectations,
    sampled_averages,
    worst_inner_product,
    worst_step,
)
from theory.protocols import FloatArray, Problem
from theory.statement import Constants, Scope, Statement

#: Random paths along which the problem's claims are held against what is seen.
PROBED_PATHS = 64


@dataclass(frozen=True)
class MonteCarlo:
    """Random sample paths instead of all: their seed, how many at most, and the error level.

    ``alpha`` is the probability of a wrong verdict, half of it for either side. ``always``: also
    where there are few enough paths to run them all.
    """

    alpha: float = 1e-3
    seed: int = 0
    most: int = 32768
    always: bool = False


@dataclass(frozen=True)
class Sides:
    """Both sides as measured; ``paths`` is the number that was run."""

    measured: float
    bound: float
    rounding: float
    paths: int
    step: int | None = None
    interval: tuple[float, float] | None = None


def sampled(
    statement: Statement,
    problem: Problem,
    run: Motion,
    constants: Constants,
    gammas: FloatArray,
    sampling: MonteCarlo,
    failing: bool,
) -> Sides:
    """Return the average along random paths, with confidence limits, and its bound.

    ``failing``: a hypothesis fails, so nothing is run. Raises ValueError if a run contradicts a
    constant of the problem.

    >>> from ddg_sim.methods import ddg
    >>> from theory.bounds import statement_named
    >>> from theory.claims import claimed_constants
    >>> from theory.motion import motion
    >>> from theory.problems import make
    >>> problem, gammas = make("kuramoto", 2), np.full(3, 0.1)
    >>> run = motion(ddg(2), iterations=3)
    >>> statement, constants = statement_named("theorem-a"), claimed_constants(problem, run)
    >>> sides = sampled(statement, problem, run, constants, gammas, MonteCarlo(most=256), False)
    >>> sides.interval[0] < sides.measured < sides.interval[1] < sides.bound
    True
    """
    bound = _bound(statement, constants, gammas)
    if failing:
        return Sides(math.nan, bound, 0.0, paths=0)
    # Their own generator, so that the draws below are as they would be without.
    few = draw_paths(
        np.random.default_rng((sampling.seed, 1)),
        problem.num_samples,
        len(gammas) * run.samples_per_iteration,
        PROBED_PATHS,
    )
    means = expectations(run, problem, gammas, few)
    require_claims(problem, means)
    if not (_finite(means) and math.isfinite(bound)):
        return Sides(math.nan, bound, 0.0, paths=0)
    rng = np.random.default_rng(sampling.seed)
    first = constants.max_delay if statement.after_warm_up else 0

    def draw(count: int) -> FloatArray:
        x = sampled_averages(run, problem, gammas, first, count, rng) / problem.M
        if x.max() > 1 + CLAIM_SLACK:
            raise ValueError(
                f"problem {problem.name!r} is wrong: M = {problem.M:.6g}, but ||grad f||^2 = "
                f"{x.max() * problem.M:.6g} along a run"
            )
        return np.minimum(x, 1.0)

    # All comparisons are with the bound in units of M, moved by the rounding to the safe side.
    found = compare(draw, bound / problem.M, sampling.alpha, sampling.most)
    interval = found.lower * problem.M, found.upper * problem.M
    rounding = ROUNDING * max(found.average * problem.M, bound)
    return Sides(found.average * problem.M, bound, rounding, paths=found.draws, interval=interval)


def given_weights(
    statement: Statement,
    problem: Problem,
    run: Motion,
    constants: Constants,
    gammas: FloatArray,
) -> Sides:
    """Return the sides of the one step, and of its w^t, where left - right is largest.

    Raises ValueError if there are too many paths, or the run contradicts a constant of the problem.

    >>> from ddg_sim.methods import ddg
    >>> from theory.bounds import statement_named
    >>> from theory.claims import claimed_constants
    >>> from theory.motion import motion
    >>> from theory.problems import make
    >>> problem, gammas = make("kuramoto", 2), np.full(3, 0.1)
    >>> run = motion(ddg(2), iterations=3)
    >>> statement, constants = statement_named("lemma1"), claimed_constants(problem, run)
    >>> sides = given_weights(statement, problem, run, constants, gammas)
    >>> sides.step, sides.paths
    (0, 8)
    """
    first = constants.max_delay if statement.after_warm_up else 0
    worst = worst_step(run, problem, gammas, _step_constants(statement, constants, gammas), first)
    paths = count_paths(problem.num_samples, len(gammas), run.samples_per_iteration)
    if worst.left > worst.right:  # is it the statement, or a constant of the problem?
        require_claims(problem, expectations(run, problem, gammas))
    return _stepped(worst, paths)


def inner_product(problem: Problem, run: Motion, gammas: FloatArray, failing: bool) -> Sides:
    """Return E<grad_k f(w^t), g> for g = grad_k f_i(w^s) and grad_k f(w^s), where they differ most.

    ``failing``: a hypothesis fails, so nothing is run. Raises ValueError if there are too many
    paths.

    >>> from ddg_sim.methods import ddg
    >>> from theory.bounds import statement_named
    >>> from theory.claims import claimed_constants
    >>> from theory.motion import motion
    >>> from theory.problems import make
    >>> problem, gammas = make("kuramoto", 2), np.full(3, 0.1)
    >>> run = motion(ddg(2), iterations=3)
    >>> sides = inner_product(problem, run, gammas, failing=False)
    >>> abs(sides.measured - sides.bound) > sides.rounding
    True
    """
    paths = count_paths(problem.num_samples, len(gammas), run.samples_per_iteration)
    if failing:
        return Sides(math.nan, math.nan, 0.0, paths=0)
    return _stepped(worst_inner_product(run, problem, gammas), paths)


def in_total(
    statement: Statement,
    constants: Constants,
    gammas: FloatArray,
    means: Expectations,
    paths: int,
) -> Sides:
    """Return the sides of a statement about expectations over all paths: an average, or one step.

    >>> from ddg_sim.methods import ddg
    >>> from theory.bounds import statement_named
    >>> from theory.claims import claimed_constants
    >>> from theory.motion import motion
    >>> from theory.problems import make
    >>> problem, gammas = make("kuramoto", 2), np.full(3, 0.1)
    >>> run = motion(ddg(2), iterations=3)
    >>> means = expectations(run, problem, gammas)
    >>> statement, constants = statement_named("theorem-a"), claimed_constants(problem, run)
    >>> sides = in_total(statement, constants, gammas, means, paths=8)
    >>> sides.measured < sides.bound
    True
    """
    first = constants.max_delay if statement.after_warm_up else 0
    if not _finite(means):
        return Sides(math.nan, _bound(statement, constants, gammas), 0.0, paths)
    if statement.scope is Scope.AVERAGE:
        bound = _bound(statement, constants, gammas)
        weights = gammas[first:] / gammas[first]
        measured = math.fsum(weights * means.squares[first:]) / math.fsum(weights)
        return Sides(measured, bound, ROUNDING * max(measured, bound), paths)
    lefts = np.diff(means.values)
    rights = _step_constants(statement, constants, gammas) - 0.5 * gammas * means.squares
    t = first + int(np.argmax((lefts - rights)[first:]))
    scale = float(np.abs(means.values).max())
    return _stepped(Step(t, float(lefts[t]), float(rights[t]), scale), paths)


def _step_constants(statement: Statement, constants: Constants, gammas: FloatArray) -> FloatArray:
    """Return the c of every step's right side, (T,)."""
    return np.array([_bound(statement, constants, gammas[: t + 1]) for t in range(len(gammas))])


def _bound(statement: Statement, constants: Constants, gammas: FloatArray) -> float:
    assert statement.bound is not None
    try:
        return statement.bound(constants, gammas)
    except OverflowError:
        return math.inf


def _finite(means: Expectations) -> bool:
    return bool(np.isfinite(means.values).all() and np.isfinite(means.squares).all())


def _stepped(step: Step, paths: int) -> Sides:
    rounding = ROUNDING * max(step.magnitude, abs(step.right))
    return Sides(step.left, step.right, rounding, paths, step=step.t)
