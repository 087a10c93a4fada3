"""Does a statement hold on this problem, schedule and step size? Answered by exact enumeration."""

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from ddg_sim.schedule import Schedule, staleness
from theory.bounds import (
    DDG_DELAYS,
    FIXED_DELAYS,
    SMALL_STEPS,
    STATEMENTS,
    Constants,
    Scope,
    Statement,
    Status,
)
from theory.iterate import snapshot_delays
from theory.paths import count_paths, mean_squared_gradients, worst_step
from theory.protocols import FloatArray, Problem

#: Rounding that is allowed for, relative to the numbers compared: some 4500 units in the last
#: place, for runs of at most a few dozen ticks. An allowance, not an interval enclosure.
ROUNDING = 1e-12


class Verdict(StrEnum):
    """What the enumeration shows about the statement on this one input."""

    VERIFIED = "VERIFIED"
    VIOLATED = "VIOLATED"
    INCONCLUSIVE = "INCONCLUSIVE"


@dataclass(frozen=True)
class Report:
    """A statement's two sides on one input, and the verdict on this input.

    ``measured`` and ``bound`` are the left and right side. For a one-step statement they are
    those of the step ``step`` and the w^t, among all that occur, where left - right is largest:
    E[f(w^{t+1}) | w^t] - f(w^t) and -(gamma_t/2)||grad f(w^t)||^2 + c.

    ``ratio`` is measured/bound, nan where the bound is not positive.
    ``nonvacuous``: bound < M and bound < 2 L gap, below which the bound says more than
    ||grad f||^2 <= M and ||grad f(w^0)||^2 <= 2 L gap do; for a one-step statement: the right
    side promises a decrease.
    ``failing``: the hypotheses that this input does not meet, each with the reason.
    ``status`` is about the statement in general, ``verdict`` about this input only.
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
    ratio: float
    rounding: float
    verdict: Verdict
    reason: str
    nonvacuous: bool
    paths: int
    step: int | None


def check(
    statement: Statement | str,
    problem: Problem,
    schedule: Schedule,
    gamma: float,
    iterations: int,
) -> Report:
    """Compare both sides of a statement, with the expectation over all n^T sample paths.

    Args:
        statement: a statement, or its key in STATEMENTS.
        problem: see `theory.problems.make`; as many blocks as the schedule has stages.
        schedule: the training method.
        gamma: the step size; the first one where the statement is about decreasing steps.
        iterations: the number T of ticks, without a drain.

    Returns:
        The report. VIOLATED only if every hypothesis holds and the left side exceeds the right
        by more than the rounding allowed for; INCONCLUSIVE if a hypothesis fails, or within
        rounding, or where a side is not finite.

    Raises:
        ValueError: naming the argument and its value, if the statement is unknown, ``gamma`` is
            not positive and finite, ``iterations`` is below 1 or means more than 10^7 paths, or
            the schedule cannot be run on the problem.

    >>> from ddg_sim.methods import ddg
    >>> from theory.problems import make
    >>> report = check("theorem-a", make("kuramoto", 2), ddg(2), gamma=0.05, iterations=6)
    >>> print(report.verdict, report.paths, report.measured < report.bound)
    VERIFIED 64 True
    """
    if isinstance(statement, str):
        if statement not in STATEMENTS:
            known = ", ".join(STATEMENTS)
            raise ValueError(f"statement {statement!r} is unknown; known are {known}")
        statement = STATEMENTS[statement]
    paths = count_paths(problem.num_samples, iterations, schedule.samples_per_iteration)
    gammas = statement.step_rule(gamma, iterations)
    constants = Constants(
        L=problem.L,
        M=problem.M,
        gap=float(problem.value(problem.start[None])[0]) - problem.f_star,
        num_stages=len(problem.blocks),
        max_delay=max(staleness(schedule)),
    )
    bound = statement.bound(constants, gammas)
    if statement.scope is Scope.ONE_STEP:
        worst = worst_step(schedule, problem, gammas, bound)
        measured, bound, step = worst.left, worst.right, worst.t
        rounding = ROUNDING * max(worst.magnitude, abs(bound))
        nonvacuous = bound < 0
    else:
        squares = mean_squared_gradients(schedule, problem, gammas)
        measured, step = math.fsum(gammas * squares) / math.fsum(gammas), None
        rounding = ROUNDING * max(measured, bound)
        nonvacuous = bound < min(constants.M, 2.0 * constants.L * constants.gap)
    failing = _failing(statement, constants, schedule, gammas)
    verdict, reason = _judge(failing, measured, bound, rounding)
    if step is not None:
        phase = "warm-up, stages idle" if step < constants.max_delay else "all stages at work"
        reason += f" (worst step t = {step}: {phase})"
    return Report(
        statement=statement.key,
        status=statement.status,
        problem=problem.name,
        method=schedule.method,
        gamma=gamma,
        iterations=iterations,
        hypotheses=statement.hypotheses,
        failing=failing,
        measured=measured,
        bound=bound,
        ratio=measured / bound if bound > 0 else math.nan,
        rounding=rounding,
        verdict=verdict,
        reason=reason,
        nonvacuous=nonvacuous,
        paths=paths,
        step=step,
    )


def _judge(
    failing: tuple[str, ...], measured: float, bound: float, rounding: float
) -> tuple[Verdict, str]:
    if failing:
        return Verdict.INCONCLUSIVE, "hypotheses not met: " + "; ".join(failing)
    if not (math.isfinite(measured) and math.isfinite(bound)):
        return Verdict.INCONCLUSIVE, "a side is not finite"
    if measured <= bound:
        return Verdict.VERIFIED, "measured <= bound on this input"
    if measured <= bound + rounding:
        return Verdict.INCONCLUSIVE, "measured exceeds the bound by less than the rounding error"
    return Verdict.VIOLATED, "every hypothesis holds and measured > bound"


def _failing(
    statement: Statement, constants: Constants, schedule: Schedule, gammas: FloatArray
) -> tuple[str, ...]:
    """Name the hypotheses that fail; smoothness, M and i.i.d. hold by construction."""
    failing = []
    if SMALL_STEPS in statement.hypotheses:
        largest = float(np.max(gammas)) * constants.L
        if largest > 1.0 + ROUNDING:
            failing.append(f"{SMALL_STEPS} (here gamma_0 L = {largest:.6g})")
    for hypothesis in {DDG_DELAYS, FIXED_DELAYS}.intersection(statement.hypotheses):
        try:
            delays = snapshot_delays(schedule)
        except ValueError as deviation:
            failing.append(f"{hypothesis} (here {deviation})")
            continue
        wanted = tuple(range(constants.num_stages - 1, -1, -1))
        if hypothesis == DDG_DELAYS and delays != wanted:
            failing.append(f"{hypothesis} (here d = {delays})")
    return tuple(failing)
