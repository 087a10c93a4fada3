"""Does a statement hold on this problem, motion and step size? By enumeration, or by betting."""

import math
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from ddg_sim.schedule import Schedule
from theory.bounds import statement_named
from theory.confidence import compare
from theory.hypotheses import SUFFICIENT_DIRECTION
from theory.motion import Motion, motion
from theory.paths import (
    MAX_PATHS,
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
from theory.statement import Constants, Scope, Statement, Status

#: Rounding that is allowed for, relative to the numbers compared: some 4500 units in the last
#: place, for runs of at most a few dozen ticks. An allowance, not an interval enclosure.
ROUNDING = 1e-12
#: Beyond, a run would take minutes, and the rounding allowed for would be too little.
MAX_ITERATIONS = 10_000
#: Random paths along which the problem's claims are held against what is seen.
PROBED_PATHS = 64
#: By how much a run may exceed a constant of its problem before the problem is called wrong.
CLAIM_SLACK = 1e-6


class Verdict(StrEnum):
    """What is known about the statement on this one input."""

    VERIFIED = "VERIFIED"
    VIOLATED = "VIOLATED"
    INCONCLUSIVE = "INCONCLUSIVE"
    NOT_APPLICABLE = "NOT APPLICABLE"


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
class Report:
    """A statement's two sides on one input, and the verdict on this input.

    ``measured`` and ``bound`` are the left and right side. For a statement about steps they are
    those of the step ``step`` (and of the w^t, if given) where left - right is largest.

    ``tightness`` is measured/bound, nan where the bound is not positive.
    ``nonvacuous``: bound < M and bound < 2 L gap, below which the bound says more than
    ||grad f||^2 <= M and ||grad f(w^0)||^2 <= 2 L gap do; for a one-step statement: the right
    side promises a decrease.
    ``failing``: the hypotheses that this input does not meet, each with the reason.
    ``status`` is about the statement in general, ``verdict`` about this input only.
    ``sampling`` is None where all paths were run; else ``interval`` holds the confidence limits of
    the left side, and ``paths`` is the number of random paths.
    """

    statement: str
    status: Status
    problem: str
    method: str
    gamma: float
    iterations: int
    hypotheses: tuple[str, ...]
    failing: tuple[str, ...]
    measured: float
    bound: float
    tightness: float
    rounding: float
    verdict: Verdict
    reason: str
    nonvacuous: bool
    paths: int
    step: int | None
    sampling: MonteCarlo | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class _Sides:
    """Both sides as measured; ``paths`` is the number that was run."""

    measured: float
    bound: float
    rounding: float
    paths: int
    step: int | None = None
    interval: tuple[float, float] | None = None


# Steps far too large overflow on purpose: the verdict is INCONCLUSIVE then.
@np.errstate(over="ignore", invalid="ignore")
def check(
    statement: Statement | str,
    problem: Problem,
    source: Schedule | npt.ArrayLike,
    gamma: float,
    iterations: int,
    momentum: float = 0.0,
    monte_carlo: MonteCarlo = MonteCarlo(),
) -> Report:
    """Compare both sides of a statement, with the expectation over sample paths.

    Args:
        statement: a statement, or its key in STATEMENTS.
        problem: see `theory.problems.make`; as many blocks as there are stages.
        source: how the weights move: a training method, or delays in ticks, (K,) or (T, K).
        gamma: the step size; the first one where the statement is about decreasing steps.
        iterations: the number T of ticks, without a drain, up to MAX_ITERATIONS.
        momentum: beta in [0, 1), for motions with fixed delays.
        monte_carlo: how to draw random paths for averages, beyond 10^7 paths or always.

    Returns:
        The report. NOT APPLICABLE if a hypothesis fails. VIOLATED only if every hypothesis holds
        and the left side exceeds the right by more than the rounding allowed for (random paths:
        if its lower confidence sequence does). INCONCLUSIVE within rounding, where a side is not
        finite, or where random paths do not tell.

    Raises:
        ValueError: in one line, if an argument is wrong, if there are too many paths for a
            statement that needs all of them, if the motion cannot be run on the problem, or if
            the run contradicts a constant that the problem claims.

    >>> from ddg_sim.methods import ddg
    >>> from theory.problems import make
    >>> problem = make("kuramoto", 2)
    >>> report = check("theorem-a", problem, ddg(2), gamma=0.05, iterations=6)
    >>> print(report.verdict, report.paths, report.measured < report.bound)
    VERIFIED 64 True
    >>> print(check("theorem-a", problem, [3, 1], gamma=0.05, iterations=40).verdict)
    VERIFIED
    """
    if isinstance(statement, str):
        statement = statement_named(statement)
    if iterations > MAX_ITERATIONS:
        raise ValueError(f"iterations must be at most {MAX_ITERATIONS}, got {iterations}")
    gammas = statement.step_rule(gamma, iterations)
    run = motion(source, iterations, momentum, stages=len(problem.blocks))
    constants = _constants(problem, run)
    if statement.after_warm_up and constants.max_delay >= iterations:
        raise ValueError(
            f"iterations = {iterations} ends in the warm-up, and {statement.key} is about what "
            f"follows: take more than {constants.max_delay}"
        )
    failing = _failing(statement, run, constants, gammas)
    sampling = _sampling(statement, problem, run, iterations, monte_carlo)
    if sampling is not None:
        sides = _sampled(statement, problem, run, constants, gammas, sampling, bool(failing))
    elif statement.scope is Scope.STEP_GIVEN_WEIGHTS:
        sides = _given_weights(statement, problem, run, constants, gammas)
    elif statement.scope is Scope.INNER_PRODUCT:
        sides = _inner_product(problem, run, gammas, bool(failing))
    else:
        means = expectations(run, problem, gammas)
        _require_claims(problem, means)
        constants = _with_direction(constants, means)
        failing = _failing(statement, run, constants, gammas)
        paths = count_paths(problem.num_samples, iterations, run.samples_per_iteration)
        sides = _in_total(statement, constants, gammas, means, paths)
    verdict, reason = _judge(statement, failing, sides)
    if sides.step is not None:
        phase = "warm-up, stages idle" if sides.step < constants.max_delay else "all stages at work"
        reason += f" (worst step t = {sides.step}: {phase})"
    return Report(
        statement=statement.key,
        status=statement.status,
        problem=problem.name,
        method=run.name,
        gamma=gamma,
        iterations=iterations,
        hypotheses=tuple(map(str, statement.hypotheses)),
        failing=failing,
        measured=sides.measured,
        bound=sides.bound,
        tightness=sides.measured / sides.bound if sides.bound > 0 else math.nan,
        rounding=sides.rounding,
        verdict=verdict,
        reason=reason,
        nonvacuous=_nonvacuous(statement, constants, sides.bound),
        paths=sides.paths,
        step=sides.step,
        sampling=sampling,
        interval=sides.interval,
    )


def _constants(problem: Problem, run: Motion) -> Constants:
    value = float(problem.value(problem.start[None])[0])
    if not math.isfinite(value):
        raise ValueError(f"problem {problem.name!r}: f(w^0) = {value} is not finite")
    _require_lower_bound(problem, value)
    try:  # delayed, but at the weights of the forward pass: nothing differs from grad f_i
        _ = run.fixed_delays
        replay = 0.0, problem.M
    except ValueError:
        replay = getattr(problem, "replay_L", math.nan), getattr(problem, "replay_M", math.nan)
    return Constants(
        L=problem.L,
        M=problem.M,
        gap=value - problem.f_star,
        delays=run.longest,
        variance=problem.variance,
        momentum=run.momentum,
        replay_L=replay[0],
        replay_M=replay[1],
    )


def _require_lower_bound(problem: Problem, value: float) -> None:
    if value < problem.f_star - CLAIM_SLACK * max(1.0, abs(problem.f_star)):
        raise ValueError(
            f"problem {problem.name!r} is wrong: f_star = {problem.f_star:.6g}, but f = "
            f"{value:.6g} at a point of the run"
        )


def _require_claims(problem: Problem, means: Expectations) -> None:
    """Stop where the run itself contradicts what the problem says about f."""
    if math.isfinite(means.lowest):
        _require_lower_bound(problem, means.lowest)
    for name, claimed, seen, what in (
        ("L", problem.L, means.steepest, "||grad f(x) - grad f(y)||/||x - y||"),
        ("M", problem.M, float(means.moments.max()), "E||grad f_i(w^t)||^2"),
        ("variance", problem.variance, float(means.spreads.max()), "E||grad f_i - grad f||^2"),
    ):
        if math.isfinite(seen) and seen > claimed * (1 + CLAIM_SLACK) + ROUNDING:
            raise ValueError(
                f"problem {problem.name!r} is wrong: {name} = {claimed:.6g}, but {what} = "
                f"{seen:.6g} along the run"
            )


def _failing(
    statement: Statement, run: Motion, constants: Constants, gammas: FloatArray
) -> tuple[str, ...]:
    found = (
        (hypothesis, hypothesis.deviation(run, constants, gammas))
        for hypothesis in statement.hypotheses
    )
    return tuple(f"{hypothesis} (here {reason})" for hypothesis, reason in found if reason)


def _sampling(
    statement: Statement,
    problem: Problem,
    run: Motion,
    iterations: int,
    wanted: MonteCarlo,
) -> MonteCarlo | None:
    """How to draw paths, or None if all of them are run."""
    per_iteration = problem.num_samples**run.samples_per_iteration
    few = iterations * math.log(per_iteration) <= math.log(MAX_PATHS) + ROUNDING
    if few and not wanted.always:
        return None
    measures = SUFFICIENT_DIRECTION in statement.hypotheses
    possible = statement.scope is Scope.AVERAGE and not measures
    if possible and 0 < problem.M < math.inf:
        return wanted
    if not wanted.always:
        count_paths(problem.num_samples, iterations, run.samples_per_iteration)  # says what fits
    reason = f"{statement.key} is not about one bounded average"
    if measures:
        reason = f"{statement.key} has constants that are measured over all paths"
    elif possible:
        reason = f"M = {problem.M:g}"
    raise ValueError(f"monte_carlo: random paths prove nothing here, because {reason}")


def _with_direction(constants: Constants, means: Expectations) -> Constants:
    """Add the sufficient-direction constant and the second moment of the applied direction."""
    # Leaving out G_t below that changes the theorem's sum by less than the rounding allowed for.
    some = means.squares > ROUNDING**2 * means.squares.max()
    sigma = (means.aligned[some] / means.squares[some]).min() if some.any() else math.nan
    return replace(constants, sigma=float(sigma), direction=float(means.moved.max()))


def _sampled(
    statement: Statement,
    problem: Problem,
    run: Motion,
    constants: Constants,
    gammas: FloatArray,
    sampling: MonteCarlo,
    failing: bool,
) -> _Sides:
    bound = _bound(statement, constants, gammas)
    if failing:
        return _Sides(math.nan, bound, 0.0, paths=0)
    # Their own generator, so that the draws below are as they would be without.
    few = draw_paths(
        np.random.default_rng((sampling.seed, 1)),
        problem.num_samples,
        len(gammas) * run.samples_per_iteration,
        PROBED_PATHS,
    )
    means = expectations(run, problem, gammas, few)
    _require_claims(problem, means)
    if not (_finite(means) and math.isfinite(bound)):
        return _Sides(math.nan, bound, 0.0, paths=0)
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
    return _Sides(found.average * problem.M, bound, rounding, paths=found.draws, interval=interval)


def _given_weights(
    statement: Statement,
    problem: Problem,
    run: Motion,
    constants: Constants,
    gammas: FloatArray,
) -> _Sides:
    first = constants.max_delay if statement.after_warm_up else 0
    worst = worst_step(run, problem, gammas, _step_constants(statement, constants, gammas), first)
    paths = count_paths(problem.num_samples, len(gammas), run.samples_per_iteration)
    if worst.left > worst.right:  # is it the statement, or a constant of the problem?
        _require_claims(problem, expectations(run, problem, gammas))
    return _stepped(worst, paths)


def _inner_product(problem: Problem, run: Motion, gammas: FloatArray, failing: bool) -> _Sides:
    paths = count_paths(problem.num_samples, len(gammas), run.samples_per_iteration)
    if failing:
        return _Sides(math.nan, math.nan, 0.0, paths=0)
    return _stepped(worst_inner_product(run, problem, gammas), paths)


def _in_total(
    statement: Statement,
    constants: Constants,
    gammas: FloatArray,
    means: Expectations,
    paths: int,
) -> _Sides:
    first = constants.max_delay if statement.after_warm_up else 0
    if not _finite(means):
        return _Sides(math.nan, _bound(statement, constants, gammas), 0.0, paths)
    if statement.scope is Scope.AVERAGE:
        bound = _bound(statement, constants, gammas)
        weights = gammas[first:] / gammas[first]
        measured = math.fsum(weights * means.squares[first:]) / math.fsum(weights)
        return _Sides(measured, bound, ROUNDING * max(measured, bound), paths)
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


def _stepped(step: Step, paths: int) -> _Sides:
    rounding = ROUNDING * max(step.magnitude, abs(step.right))
    return _Sides(step.left, step.right, rounding, paths, step=step.t)


def _judge(statement: Statement, failing: tuple[str, ...], sides: _Sides) -> tuple[Verdict, str]:
    measured, bound, rounding = sides.measured, sides.bound, sides.rounding
    if failing:
        return Verdict.NOT_APPLICABLE, "hypotheses not met: " + "; ".join(failing)
    if not (math.isfinite(measured) and math.isfinite(bound)):
        return Verdict.INCONCLUSIVE, "f, its gradient or a side is not finite"
    if sides.interval is not None:
        lower, upper = sides.interval
        if upper < bound - rounding:
            return Verdict.VERIFIED, "the upper confidence sequence is below the bound"
        if lower > bound + rounding:
            return Verdict.VIOLATED, "every hypothesis holds; the lower confidence sequence > bound"
        return Verdict.INCONCLUSIVE, "the bound lies between the confidence sequences"
    if statement.scope is Scope.INNER_PRODUCT:
        if abs(measured - bound) <= rounding:
            return Verdict.VERIFIED, "the two sides are equal on this input, up to rounding"
        return Verdict.VIOLATED, "every hypothesis holds and the two sides differ"
    if measured <= bound:
        return Verdict.VERIFIED, "measured <= bound on this input"
    if measured <= bound + rounding:
        return Verdict.INCONCLUSIVE, "measured exceeds the bound by less than the rounding error"
    return Verdict.VIOLATED, "every hypothesis holds and measured > bound"


def _nonvacuous(statement: Statement, constants: Constants, bound: float) -> bool:
    if statement.scope is Scope.AVERAGE:
        return bound < min(constants.M, 2.0 * constants.L * constants.gap)
    return statement.scope is Scope.INNER_PRODUCT or bound < 0
