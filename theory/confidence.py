"""Is a mean above or below a number? Decided by betting, at a level that holds at any time.

X_1, X_2, ... in [0, 1] are independent with mean mu. Whoever bets against mu <= m starts with 1
and has W_t = prod_i (1 + lambda_i (X_i - m)), where lambda_i >= 0 depends on the past only. If
mu <= m this is a supermartingale, so it ever reaches 1/level with probability at most the level
(Ville). The m that are not refuted by time t form the lower confidence sequence; the upper one is
the lower one of 1 - X. Both may be looked at after every draw.

Source: Waudby-Smith and Ramdas, JRSS B 2024; bets by their predictable plug-in (empirical
Bernstein), truncated.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from theory.protocols import FloatArray

#: A bet never risks more than this part of the capital.
LARGEST_BET = 0.75
#: Draws before the first look, doubled from look to look (it is valid to look at any time).
FIRST_DRAWS = 256
_BISECTIONS = 50


@dataclass(frozen=True)
class Evidence:
    """What ``draws`` draws say: lower < mean <= upper, each but for probability alpha/2.

    ``average`` is that of the draws. The limits hold for all times at once.
    """

    average: float
    lower: float
    upper: float
    draws: int


def bets(x: FloatArray, level: float) -> FloatArray:
    """Return lambda_1..lambda_t before truncation, shape (t,); entry i depends on x[:i] only.

    sqrt(2 ln(1/level) / (s_i^2 i ln(1 + i))), s_i^2 the variance of the draws so far.

    >>> bets(np.array([0.5, 0.0]), level=0.05).round(3).tolist()
    [5.88, 4.671]
    """
    count = np.arange(1, len(x) + 1)
    mean = (0.5 + np.cumsum(x)) / (count + 1)
    variance = (0.25 + np.cumsum((x - mean) ** 2)) / (count + 1)
    known = np.concatenate(([0.25], variance[:-1]))
    bet: FloatArray = np.sqrt(2.0 * math.log(1.0 / level) / (known * count * np.log1p(count)))
    return bet


def log_capital(x: FloatArray, bet: FloatArray, m: float) -> FloatArray:
    """Return ln W_1..ln W_t of the bets against "the mean is at most m", shape (t,).

    It falls with m, so the m that are not refuted form an interval.

    >>> log_capital(np.array([1.0, 0.0]), np.array([0.5, 9.0]), m=0.5).round(3).tolist()
    [0.223, -1.163]
    """
    risk = np.minimum(bet, LARGEST_BET / m) if m > 0 else bet
    result: FloatArray = np.cumsum(np.log1p(risk * (x - m)))
    return result


def refuted(x: FloatArray, m: float, level: float) -> bool:
    """Whether "the mean of x is at most m" was refuted at any time, at that level.

    >>> refuted(np.ones(40), m=0.5, level=1e-3), refuted(np.zeros(40), m=0.5, level=1e-3)
    (True, False)
    """
    if m < 0:
        return True
    return bool(log_capital(x, bets(x, level), m).max() >= math.log(1.0 / level))


def lower_limit(x: FloatArray, level: float) -> float:
    """Return the largest m in [0, 1] (by bisection, rounded down) that is refuted; 0 if none.

    >>> round(lower_limit(np.ones(100), level=1e-3), 3)
    0.913
    """
    bet, wanted = bets(x, level), math.log(1.0 / level)
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        if log_capital(x, bet, middle).max() >= wanted:
            low = middle
        else:
            high = middle
    return low


def compare(draw: Callable[[int], FloatArray], bound: float, alpha: float, most: int) -> Evidence:
    """Draw until the mean is known to be below or above ``bound``, or ``most`` draws are spent.

    Args:
        draw: returns that many new independent draws in [0, 1].
        bound: what the mean is compared with.
        alpha: the probability of any mistake, half of it for either side, whenever it stops.
        most: the largest number of draws.

    Returns:
        The evidence; upper < bound or lower > bound decide.

    Raises:
        ValueError: if alpha is not between 0 and 1, ``most`` below 1, or a draw outside [0, 1].

    >>> rng = np.random.default_rng(0)
    >>> compare(lambda count: rng.uniform(0, 0.2, count), bound=0.5, alpha=1e-3, most=4096).draws
    256
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
    if most < 1:
        raise ValueError(f"the number of paths must be at least 1, got {most}")
    x = np.empty(0)
    while True:
        x = np.concatenate((x, draw(min(max(FIRST_DRAWS, len(x)), most - len(x)))))
        if not (x.min() >= 0 and x.max() <= 1):
            raise ValueError(f"draws must lie in [0, 1], got {x.min()} to {x.max()}")
        below = refuted(1.0 - x, 1.0 - bound, 0.5 * alpha)
        above = bound <= 1 and refuted(x, bound, 0.5 * alpha)
        if below or above or len(x) == most:
            lower, upper = lower_limit(x, 0.5 * alpha), 1.0 - lower_limit(1.0 - x, 0.5 * alpha)
            return Evidence(float(x.mean()), lower, upper, len(x))
