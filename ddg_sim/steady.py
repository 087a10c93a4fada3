"""The steady state of a run: its period, exactly where it repeats itself, robustly where it cannot.

A deterministic run is a linear recursion in max-plus algebra, so after finitely many iterations it
repeats itself: everything in iteration t happens a constant later than in iteration t - c (Baccelli
et al. 1992, theorem 3.109). Finding that regime gives the period to rounding. A measured run never
repeats itself; its period is a robust slope.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Start times count as repeated if they differ by less than this fraction of the latest one.
TOLERANCE = 1e-11
#: Longer measured runs are thinned evenly to this many completion times.
MOST_POINTS = 400
#: The pairs whose slopes count lie between this fraction of the run, and twice it, apart.
REACH = 1 / 8


@dataclass(frozen=True, slots=True)
class Regime:
    """A run repeats itself every ``iterations`` iterations, which take ``seconds``."""

    iterations: int
    seconds: float

    @property
    def period(self) -> float:
        """Seconds per iteration.

        >>> Regime(iterations=3, seconds=6.0).period
        2.0
        """
        return self.seconds / self.iterations


def find_regime(starts: NDArray[np.float64], window: int) -> Regime | None:
    """The smallest regime that the last ``window`` iterations of a deterministic run are in.

    Args:
        starts: start times in seconds, a row per iteration and a column per event, without
            warm-up and drain.
        window: iterations that determine all that follow.

    >>> find_regime(np.array([[0.0], [5.0], [7.0], [8.0], [10.0], [11.0], [13.0]]), window=2)
    Regime(iterations=2, seconds=3.0)
    >>> find_regime(np.array([[0.0], [1.0], [4.0], [9.0]]), window=2) is None
    True
    """
    rows = len(starts)
    if rows <= window or not starts.size:
        return None
    last = starts[rows - window :]
    tolerance = TOLERANCE * float(np.abs(last).max())
    for shift in range(1, rows - window + 1):
        later = last - starts[rows - window - shift : rows - shift]
        if float(np.ptp(later)) <= tolerance:
            return Regime(shift, float(np.median(later)))
    return None


def robust_period(completed: NDArray[np.float64]) -> float | None:
    """Seconds per iteration from the completion times of consecutive iterations; None for one.

    The median of the slopes between pairs of iterations, as Theil and Sen's, but only of pairs
    that are an eighth to a quarter of the run apart. A pause of the machine delays all iterations
    after it: over all pairs two pauses would spoil two slopes out of three, over these, one out of
    three, which the median survives. Shorter pairs would not average over runs whose iterations
    differ in turn. So this is the typical period; rare pauses are in the makespan only.

    >>> robust_period(np.array([1.0, 3.0, 5.0, 7.0, 19.0, 21.0, 23.0, 25.0, 27.0]))
    2.0
    """
    if len(completed) < 2:
        return None
    chosen = np.unique(np.linspace(0, len(completed) - 1, MOST_POINTS).round().astype(int))
    times, shortest = completed[chosen], max(1, round(len(chosen) * REACH))
    slopes = [
        (times[apart:] - times[:-apart]) / (chosen[apart:] - chosen[:-apart])
        for apart in range(shortest, min(2 * shortest, len(chosen) - 1) + 1)
    ]
    return float(np.median(np.concatenate(slopes)))
