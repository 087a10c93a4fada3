"""Where the one-step claim of the DDG paper fails, to the digits; and a search for such places.

The three that are written down run the real schedule ``ddg(2)`` on problems that meet Assumptions
1 and 2 with the stated L and M, and with gamma L <= 1.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ddg_sim.methods import ddg
from ddg_sim.schedule import Schedule
from theory.bounds import statement_named
from theory.check import Report, Verdict, check
from theory.iterate import iterate
from theory.links import COSINE
from theory.paths import sample_paths
from theory.problems import one_sided_cosine, opposed_cosines
from theory.protocols import Problem
from theory.published import lemma1
from theory.ridge import RidgeSum
from theory.statement import Constants, constant_steps
from theory.sweep import momentum_for, motion_for


@dataclass(frozen=True)
class Sides:
    """The two sides of a claim; ``left <= right`` (or, where it says so, equality) is claimed."""

    left: float
    right: float


def dependent_sample() -> Sides:
    """Return both sides of Lemma 1 at t = 1, given i(0) = 2: left > right (counterexample a).

    f_i(w) = c_i (1 - cos(w_1 + w_2)), c = (3, -1), w^0 = (pi/2, 0), K = 2, gamma = 10^-3. Stage 1
    applies sample i(0) at t = 1, but w^1 already tells which one that was.

    >>> sides = dependent_sample()
    >>> print(f"{sides.left:.1e} {sides.right:.2e}")
    -1.5e-09 -6.40e-04
    """
    # i(0) = 2 is sample 1, counted from 0: the last two of the four paths.
    return _descent(opposed_cosines(), gamma=1e-3, t=1, paths=slice(2, 4))


def dependent_sample_total() -> Sides:
    """Return both sides of the same step in total expectation: here left <= right.

    >>> sides = dependent_sample_total()
    >>> print(f"{sides.left:.1e} {sides.right:.2e}")
    -2.0e-03 -6.40e-04
    """
    return _descent(opposed_cosines(), gamma=1e-3, t=1, paths=slice(0, 4))


def idle_stage() -> Sides:
    """Return both sides of Lemma 1 at t = 0, in the warm-up: left > right (counterexample b).

    f(w) = 1 - cos(w_1), one sample, w_1 = pi/2, K = 2, gamma = 0.01. Stage 1 idles at t = 0.

    >>> sides = idle_stage()
    >>> print(f"{sides.left:.1e} {sides.right:.1e}")
    0.0e+00 -3.2e-03
    """
    return _descent(one_sided_cosine(), gamma=0.01, t=0, paths=slice(0, 1))


def independence_step() -> Sides:
    """Return the step of Lemma 1's proof that takes i(0) and w^1 for independent (c).

    Claimed: E<grad_1 f(w^1), grad_1 f_{i(0)}(w^0)> = E<grad_1 f(w^1), grad_1 f(w^0)>, in total
    expectation. Same f_i as (a), w^0 = (pi/4, 0), gamma = 0.1. ``left`` is true, ``right`` claimed.

    >>> sides = independence_step()
    >>> print(f"{sides.left:.4f} {sides.right:.4f}")
    0.3082 0.4588
    """
    problem = opposed_cosines(start=(0.25 * np.pi, 0.0))
    paths = sample_paths(problem.num_samples, 1, 0, 2)
    w = iterate(ddg(2), problem, paths, [0.1]).w
    block = problem.blocks[0]
    now = problem.full_gradient(w[1])[:, block]
    true = now * problem.gradients(w[0], paths[:, 0])[:, block]
    claimed = now * problem.full_gradient(w[0])[:, block]
    return Sides(float(true.sum(axis=1).mean()), float(claimed.sum(axis=1).mean()))


@dataclass(frozen=True)
class Found:
    """A violation, the input that has it, and how many inputs were tried up to it."""

    report: Report
    problem: RidgeSum
    source: Schedule | tuple[int, ...]
    momentum: float
    tried: int


def search(statement: str, most: int = 2000) -> Found | int:
    """Look for a violation of a statement on small problems, the simplest first.

    Tried are f_i(w) = c_i (1 - cos(a . w)) of two stages with one weight each, a of ones and zeros,
    one sample or two with small whole c_i of mean >= 0, starts at multiples of pi/4, gamma L from
    10^-3 to 1 and 1 to 4 ticks, all paths enumerated: every step and every history is looked at.

    Args:
        statement: its key.
        most: how many inputs to try.

    Returns:
        The first violation, or the number of inputs tried without one.

    Raises:
        ValueError: if the statement is unknown or ``most`` is below 1.

    >>> found = search("lemma1")
    >>> found.report.verdict.value, found.report.step, found.problem.num_samples
    ('VIOLATED', 0, 1)
    >>> search("theorem-a", most=50)
    50
    """
    if most < 1:
        raise ValueError(f"the number of inputs must be at least 1, got {most}")
    known = statement_named(statement)
    source, momentum = motion_for(statement, 2), momentum_for(statement)
    late = 1 if known.after_warm_up else 0  # of two stages one waits for one tick
    tried = 0
    for problem, x, iterations in itertools.islice(_candidates(), most):
        tried += 1
        if iterations <= late:
            continue
        report = check(known, problem, source, x / problem.L, iterations, momentum)
        if report.verdict is Verdict.VIOLATED:
            return Found(report, problem, source, momentum, tried)
    return tried


def _candidates() -> Iterator[tuple[RidgeSum, float, int]]:
    """Yield (problem, gamma L, iterations), few samples and ticks first."""
    one: list[tuple[int, ...]] = [(1,)]
    two: list[tuple[int, ...]] = [
        (c, d) for c, d in itertools.product(range(4), range(-2, 3)) if d <= c and c + d > 0
    ]
    for iterations, coefficients in itertools.product(range(1, 5), one + two):
        for row, start in itertools.product(((1, 0), (1, 1)), (2, 1)):
            problem = RidgeSum(
                f"cosines {','.join(map(str, coefficients))}",
                COSINE,
                rows=np.array([row], dtype=np.float64),
                offsets=np.zeros(1),
                coefficients=np.array(coefficients, dtype=np.float64)[:, None],
                start=np.array([0.25 * np.pi * start, 0.0]),
                blocks=(slice(0, 1), slice(1, 2)),
            )
            for x in (0.1, 1e-2, 1e-3, 0.5, 1.0):
                yield problem, x, iterations


def _descent(problem: Problem, gamma: float, t: int, paths: slice) -> Sides:
    """Return the sides of Lemma 1 at step t, averaged over those of the n^(t+1) paths."""
    n = problem.num_samples
    gammas = constant_steps(gamma, t + 1)
    w = iterate(ddg(2), problem, sample_paths(n, t + 1, 0, n ** (t + 1))[paths], gammas).w
    gap = float(problem.value(problem.start[None])[0]) - problem.f_star
    noise = lemma1(Constants(problem.L, problem.M, gap, delays=(1, 0)), gammas)
    squares = np.sum(problem.full_gradient(w[t]) ** 2, axis=1)
    return Sides(
        left=float(np.mean(problem.value(w[t + 1]) - problem.value(w[t]))),
        right=noise - 0.5 * gamma * float(squares.mean()),
    )
