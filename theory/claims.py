"""The constants that a right side needs, and whether a run contradicts what its problem claims."""

import math
from dataclasses import replace

from theory.motion import Motion
from theory.paths import Expectations
from theory.protocols import Problem
from theory.statement import Constants

#: Rounding that is allowed for, relative to the numbers compared: some 4500 units in the last
#: place, for runs of at most a few dozen ticks. An allowance, not an interval enclosure.
ROUNDING = 1e-12
#: By how much a run may exceed a constant of its problem before the problem is called wrong.
CLAIM_SLACK = 1e-6


def claimed_constants(problem: Problem, run: Motion) -> Constants:
    """Return what the problem claims of itself, with the gap at its start and the motion's delays.

    Raises ValueError if f(w^0) is not finite, or below the problem's f_star.

    >>> from ddg_sim.methods import ddg
    >>> from theory.motion import motion
    >>> from theory.problems import opposed_cosines
    >>> found = claimed_constants(opposed_cosines(), motion(ddg(2), iterations=3))
    >>> round(found.L, 12), round(found.M, 12), round(found.gap, 12), found.max_delay
    (2.0, 10.0, 1.0, 1)
    """
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


def require_claims(problem: Problem, means: Expectations) -> None:
    """Raise ValueError where the run itself contradicts what the problem says about f.

    >>> from dataclasses import replace
    >>> from ddg_sim.methods import ddg
    >>> from theory.motion import motion
    >>> from theory.paths import expectations
    >>> from theory.problems import opposed_cosines
    >>> problem = opposed_cosines()
    >>> means = expectations(motion(ddg(2), iterations=2), problem, [0.1, 0.1])
    >>> require_claims(problem, replace(means, lowest=-1.0))
    Traceback (most recent call last):
    ValueError: problem 'opposed-cosines' is wrong: f_star = 0, but f = -1 at a point of the run
    """
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


def with_direction(constants: Constants, means: Expectations) -> Constants:
    """Add the sufficient-direction constant and the second moment of the applied direction.

    sigma is the least E<grad f(w^t), g^t>/G_t of the run, the moment its largest E||g^t||^2.

    >>> from ddg_sim.methods import bp
    >>> from theory.motion import motion
    >>> from theory.paths import expectations
    >>> from theory.problems import one_sided_cosine
    >>> run = motion(bp(2), iterations=2)
    >>> means = expectations(run, one_sided_cosine(), [0.1, 0.1])
    >>> found = with_direction(claimed_constants(one_sided_cosine(), run), means)
    >>> round(found.sigma, 6), round(found.direction, 6)
    (1.0, 1.0)
    """
    # Leaving out G_t below that changes the theorem's sum by less than the rounding allowed for.
    some = means.squares > ROUNDING**2 * means.squares.max()
    sigma = (means.aligned[some] / means.squares[some]).min() if some.any() else math.nan
    return replace(constants, sigma=float(sigma), direction=float(means.moved.max()))


def _require_lower_bound(problem: Problem, value: float) -> None:
    if value < problem.f_star - CLAIM_SLACK * max(1.0, abs(problem.f_star)):
        raise ValueError(
            f"problem {problem.name!r} is wrong: f_star = {problem.f_star:.6g}, but f = "
            f"{value:.6g} at a point of the run"
        )
