"""Does a statement hold on this problem, motion and step size? By enumeration, or by betting."""

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from ddg_sim.schedule import Schedule
from theory.bounds import statement_named
from theory.claims import ROUNDING, claimed_constants, require_claims, with_direction
from theory.hypotheses import SUFFICIENT_DIRECTION
from theory.motion import Motion, motion
from theory.paths import MAX_PATHS, count_paths, expectations
from theory.protocols import FloatArray, Problem
from theory.sides import MonteCarlo, Sides, given_weights, in_total, inner_product, sampled
from theory.statement import Constants, Scope, Statement, Status

__all__ = ["MAX_ITERATIONS", "MonteCarlo", "Report", "Verdict", "check"]

#: Beyond, a run would take minutes, and the rounding allowed for would be too little.
MAX_ITERATIONS = 10_000
_USUAL = MonteCarlo()


class Verdict(StrEnum):
    """What is known about the statement on this one input."""

    VERIFIED = "VERIFIED"
    VIOLATED = "VIOLATED"
    INCONCLUSIVE = "INCONCLUSIVE"
    NOT_APPLICABLE = "NOT APPLICABLE"


@dataclass(frozen=True)
class Report:
    """A statement's two sides on one input, and the verdict on this input.

    ``measured`` and ``bound`` are the left and right side. For a statement about steps they are
    those of the step ``step`` (and of the w^t, if given) where left - right is largest.

    ``tightness`` is measured/bound, nan where the bound is not positive or a hypothesis fails.
    ``nonvacuous``: every hypothesis holds, and bound < M and bound < 2 L gap, below which the
    bound says more than ||grad f||^2 <= M and ||grad f(w^0)||^2 <= 2 L gap do; for a one-step
    statement: the right side promises a decrease.
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


# Steps far too large overflow on purpose: the verdict is INCONCLUSIVE then.
@np.errstate(over="ignore", invalid="ignore")
def check(
    statement: Statement | str,
    problem: Problem,
    source: Schedule | npt.ArrayLike,
    gamma: float,
    iterations: int,
    momentum: float = 0.0,
    monte_carlo: MonteCarlo = _USUAL,
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
    constants = claimed_constants(problem, run)
    if statement.after_warm_up and constants.max_delay >= iterations:
        raise ValueError(
            f"iterations = {iterations} ends in the warm-up, and {statement.key} is about what "
            f"follows: take more than {constants.max_delay}"
        )
    failing = _failing(statement, run, constants, gammas)
    sampling = _sampling(statement, problem, run, iterations, monte_carlo)
    if sampling is not None:
        sides = sampled(statement, problem, run, constants, gammas, sampling, bool(failing))
    elif statement.scope is Scope.STEP_GIVEN_WEIGHTS:
        sides = given_weights(statement, problem, run, constants, gammas)
    elif statement.scope is Scope.INNER_PRODUCT:
        sides = inner_product(problem, run, gammas, bool(failing))
    else:
        means = expectations(run, problem, gammas)
        require_claims(problem, means)
        constants = with_direction(constants, means)
        failing = _failing(statement, run, constants, gammas)
        paths = count_paths(problem.num_samples, iterations, run.samples_per_iteration)
        sides = in_total(statement, constants, gammas, means, paths)
    verdict, reason = _judge(statement, failing, sides)
    holds = verdict is not Verdict.NOT_APPLICABLE  # else the right side bounds nothing
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
        tightness=sides.measured / sides.bound if holds and sides.bound > 0 else math.nan,
        rounding=sides.rounding,
        verdict=verdict,
        reason=reason,
        nonvacuous=holds and _nonvacuous(statement, constants, sides.bound),
        paths=sides.paths,
        step=sides.step,
        sampling=sampling,
        interval=sides.interval,
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


def _judge(statement: Statement, failing: tuple[str, ...], sides: Sides) -> tuple[Verdict, str]:
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
