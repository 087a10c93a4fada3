"""Choosing cuts quickly: all of them at once where they are few, else one move at a time.

Both take the problems of `separable.minimise`, which searches on where they stop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import combinations

import numpy as np

from ddg_sim.separable import TOLERANCE, Cuts, Minimum
from ddg_sim.times import Array

Value = Callable[[tuple[int, ...]], float]


def enumerate_all(problem: Cuts, value_of: Value) -> Minimum:
    """What `separable.minimise` finds, by looking at all cuts at once.

    It takes memory for a few numbers per choice of cuts.

    Args:
        problem: some cuts are within its limits.
        value_of: as in `separable.minimise`.

    >>> from ddg_sim.separable import Row
    >>> problem = Cuts(np.arange(5.0)[None, None, :])  # one cut of four layers, one second each
    >>> problem.add(Row(np.array([[1.0]]), const=0.0, rate=1.0))  # the first stage's seconds
    >>> problem.add(Row(np.array([[-1.0]]), const=4.0, rate=1.0))  # the second stage's
    >>> enumerate_all(problem, problem.level)
    Minimum(cuts=(2,), value=2.0, lower_bound=2.0)
    """
    count = math.comb(problem.size - 2, problem.num_cuts)
    every = list(combinations(range(1, problem.size - 1), problem.num_cuts))
    choices = np.array(every, dtype=np.intp).reshape(count, problem.num_cuts)
    levels = np.full(count, -np.inf)
    known = 0
    while True:
        for row in range(known, len(problem.rows)):
            chosen = problem.tables[row][np.arange(problem.num_cuts), choices].sum(axis=1)
            left = chosen + problem.const[row] - problem.limit[row]
            if problem.rate[row] > 0:
                np.maximum(levels, left / problem.rate[row], out=levels)
            else:
                levels[left > problem.rounding[row]] = np.inf
        known = len(problem.rows)
        least = float(levels.min())
        first = int(np.argmax(levels <= least * (1 + TOLERANCE)))
        cuts = tuple(map(int, choices[first]))
        value = value_of(cuts)
        # Where rounding alone tells value and level apart, no constraint was added.
        if value <= least * (1 + 2 * TOLERANCE) or len(problem.rows) == known:
            return Minimum(cuts, value, min(least, value))


def descend(problem: Cuts, value_of: Value, starts: Iterable[tuple[int, ...]]) -> Minimum:
    """Minimise as `separable.minimise` does, until no single cut can be moved to advantage.

    It begins at each of ``starts`` that is within limits, then at those cuts that the relaxation
    behind the lower bound finds best, as long as the known constraints promise something better.

    Args:
        problem: as in `separable.minimise`.
        value_of: likewise.
        starts: at least one is within the limits.

    Returns:
        The best that was found; it is known to be the least only if `Minimum.exact`.
    """
    tried = {start for start in starts if problem.within_limits(start)}
    best, cuts = min(_downhill(problem, value_of, start) for start in sorted(tried))
    while True:
        below = best * (1 - TOLERANCE)
        if problem.known_bound() >= below or problem.excludes(below):
            return Minimum(cuts, best, below)
        lower = problem.lower_bound()
        promising = [
            (level, point)
            for point in problem.relaxed
            if point not in tried
            and problem.within_limits(point)
            and (level := problem.level(point)) < best * (1 - TOLERANCE)
        ]
        if best - lower <= TOLERANCE * best or not promising:
            return Minimum(cuts, best, min(lower, best))
        point = min(promising)[1]
        tried.add(point)
        best, cuts = min((best, cuts), _downhill(problem, value_of, point))


def _downhill(
    problem: Cuts, value_of: Value, cuts: tuple[int, ...]
) -> tuple[float, tuple[int, ...]]:
    """Move one cut at a time to where the known constraints promise most, while that is better."""
    value = value_of(cuts)
    while problem.num_cuts:
        levels, moves = levels_around(problem, cuts)
        if not levels.min() < value * (1 - TOLERANCE):
            break
        cut, position = moves[int(levels.argmin())]
        moved = (*cuts[:cut], position, *cuts[cut + 1 :])
        known = len(problem.rows)
        found = value_of(moved)
        if found < value:
            value, cuts = found, moved
        elif len(problem.rows) == known:  # rounding: the promise would be made again
            break
    return value, cuts


def levels_around(problem: Cuts, cuts: tuple[int, ...]) -> tuple[Array, list[tuple[int, int]]]:
    """The level for every move of one of the cuts, and the moves: which cut, to which position."""
    bounds = [0, *cuts, problem.size - 1]
    moves = [
        (cut, position)
        for cut in range(problem.num_cuts)
        for position in range(bounds[cut] + 1, bounds[cut + 2])
    ]
    which, where = np.array(moves, dtype=np.intp).T
    moved = problem.tables[:, which, where] - problem.tables[:, which, np.array(cuts)[which]]
    left = moved + (problem.values(cuts) - problem.limit)[:, None]
    rated = problem.rate > 0
    levels = np.asarray((left[rated] / problem.rate[rated, None]).max(axis=0))
    levels[(left > problem.rounding[:, None])[~rated].any(axis=0)] = np.inf
    return levels, moves
