"""Looking for a function that breaks the conjectured worst case of delayed gradients.

The conjecture: (1/T) sum_t ||grad f(w^t)||^2 <= (f(w^0) - f*)/(gamma T c_tau(gamma L)) for every
L-smooth f, every choice of stages with fixed delays of at most tau, and every gamma L below the
stability limit. A trial chooses delays, gamma and T; the largest delay goes round, half of the
trials are random, half change the best one with that largest delay a little. Only the set of delays
counts: stages with the same delay are one.
"""

from dataclasses import dataclass

import numpy as np

from theory.delays import delayed
from theory.links import COSINE, GEMAN_MCCLURE
from theory.ridge import RidgeSum
from theory.stability import c_tau, stable_limit
from theory.worst_case import available, violation, worst_case

#: Of the right side: what the solver's accuracy may add to the measured value.
ACCURACY = 1e-5


@dataclass(frozen=True)
class Trial:
    """Delays, gamma L, T, and measured/conjectured for the worst function known there (L = 1)."""

    ratio: float
    delays: tuple[int, ...]
    gamma: float
    iterations: int


@dataclass(frozen=True)
class Search:
    """The trials that came closest, one per largest delay.

    ``broken``: one exceeds the bound by more than the accuracy of the numbers. ``method`` says
    over which functions each trial is the worst case.
    """

    closest: tuple[Trial, ...]
    broken: bool
    trials: int
    method: str


def search_conjecture(
    max_delay: int, iterations: int = 8, trials: int = 40, seed: int = 0
) -> Search:
    """Search for a violation of the conjecture.

    With the extra `worst-cases`, each trial is the exact maximum over all L-smooth functions (a
    semidefinite program); without it, one random sum of cosines or of Geman-McClure losses.

    Args:
        max_delay: the largest tau.
        iterations: the largest T.
        trials: how many combinations of delays, gamma and T.
        seed: of the draws.

    Raises:
        ValueError: naming the argument, if it is out of range.

    >>> found = search_conjecture(max_delay=1, iterations=3, trials=4)
    >>> found.broken, [0.0 < trial.ratio < 1.0 + ACCURACY for trial in found.closest]
    (False, [True, True])
    """
    for name, value, least in (
        ("max_delay", max_delay, 0),
        ("iterations", iterations, 1),
        ("trials", trials, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    rng = np.random.default_rng(seed)
    exact = available()
    closest: dict[int, Trial] = {}
    for count in range(trials):
        tau = count % (max_delay + 1)
        best = closest.get(tau)
        if best is None or rng.random() < 0.5:
            delays = {delay for delay in range(tau) if rng.random() < 0.5}
            share, length = rng.uniform(0.02, 0.98), int(rng.integers(1, iterations + 1))
        else:  # add or take away one delay, another step size, and now and then another T
            delays = {*best.delays} ^ {int(rng.integers(0, tau + 1))}
            share = best.gamma / float(stable_limit(tau)) + rng.normal(0.0, 0.1)
            share = min(max(share, 0.02), 0.98)
            length = int(np.clip(best.iterations + rng.integers(-1, 3), 1, iterations))
        chosen = tuple(sorted(delays | {tau}, reverse=True))
        gamma = float(share * stable_limit(tau))
        measured = _worst(chosen, gamma, length) if exact else _random(chosen, gamma, length, rng)
        ratio = measured * gamma * length * float(c_tau(gamma, tau))
        if best is None or ratio > best.ratio:
            closest[tau] = Trial(ratio, chosen, gamma, length)
    return Search(
        closest=tuple(closest[tau] for tau in sorted(closest)),
        broken=any(each.ratio > 1.0 + (ACCURACY if exact else 1e-12) for each in closest.values()),
        trials=trials,
        method="all smooth functions (semidefinite programs)"
        if exact
        else "random functions, one a trial",
    )


def _worst(delays: tuple[int, ...], gamma: float, iterations: int) -> float:
    found = worst_case(delays, gamma, iterations)
    # A value counts as far as points, gradients and values really fit together.
    return found.value if violation(found) <= ACCURACY else 0.0


def _random(
    delays: tuple[int, ...], gamma: float, iterations: int, rng: np.random.Generator
) -> float:
    """(1/T) sum ||grad f||^2/(f(w^0) - f*) of a random function, scaled to L = 1."""
    dim, edges = 2 * len(delays), int(rng.integers(1, 6))
    rows = rng.standard_normal((edges, dim))
    problem = RidgeSum(
        name="random",
        link=(COSINE, GEMAN_MCCLURE)[int(rng.integers(2))],
        rows=rows,
        offsets=rows @ rng.standard_normal(dim),
        coefficients=rng.uniform(0.1, 1.0, (1, edges)),
        start=np.zeros(dim),
        blocks=tuple(slice(2 * k, 2 * k + 2) for k in range(len(delays))),
    )
    steps = np.full(iterations, gamma / problem.L)
    draws = np.zeros((1, iterations), dtype=np.int64)
    # A delay of T or more means that nothing is applied at all.
    run = delayed(problem, np.minimum(delays, iterations), draws, steps)
    squares = float(np.sum(problem.full_gradient(run.w[:-1, 0]) ** 2)) / iterations
    return squares / (problem.L * float(problem.value(np.zeros((1, dim)))[0]))
