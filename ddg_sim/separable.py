"""Choosing cut positions under constraints that are sums over the cuts, exactly.

Where stage k holds layers c_k .. c_{k+1}-1, the seconds of every cycle of a schedule, and the bytes
of every device, are sums of functions of one cut each: with prefix sums P, a stage costs
P[c_{k+1}] - P[c_k]. `Cuts` finds, among all increasing cuts, those that keep every such sum below
its bound: dynamic programming from the last cut to the first over partial sums that no other
dominates (multi-objective shortest paths; Martins 1984).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog

from ddg_sim.labels import LabelSearch, TooManyLabelsError, least_before
from ddg_sim.times import Array

#: Values that agree to this relative difference count as equal.
TOLERANCE = 1e-9
#: Most rounds of looking for better weights of the constraints.
ROUNDS = 50
#: Once value and bound are as close as this, ask outright whether anything is better.
NEAR = 1e-3
#: Once they are as close as this, no partial choices count as one that differ at all.
FINE = 1e-5
#: First solved with cuts at multiples of these positions only.
STRIDES = (32, 8)


@dataclass(frozen=True, slots=True)
class Row:
    """``const + whole · totals + Σ_k coefficients[k] · basis[k, :, c_k] <= rate * level + limit``.

    ``coefficients`` has shape (K-1, number of basis functions), ``whole`` one of each.
    """

    coefficients: Array
    const: float
    rate: float
    limit: float = 0.0
    whole: Array = field(default_factory=lambda: np.zeros(1))


class Cuts:
    """Increasing cut positions 1 <= c_1 < … < c_{K-1} < L under separable constraints.

    Args:
        basis: shape (K-1, basis functions, L+1): their values per cut and position.
        totals: shape (basis functions,): their values for the whole network.
        rows: the first constraints.
        points: `relaxed` of a similar problem, for a start.
        weights: `weights` of similar problems with the same first constraints, likewise.

    >>> problem = Cuts(np.arange(5.0)[None, None, :])  # one cut of four layers, one second each
    >>> problem.add(Row(np.array([[1.0]]), const=0.0, rate=1.0))  # the first stage's seconds
    >>> problem.add(Row(np.array([[-1.0]]), const=4.0, rate=1.0))  # the second stage's
    >>> problem.earliest(1.9) is None, problem.earliest(2.0), problem.earliest(3.0)
    (True, (2,), (1,))
    """

    def __init__(
        self,
        basis: Array,
        totals: Array | float = 0.0,
        rows: Sequence[Row] = (),
        points: Iterable[tuple[int, ...]] = (),
        weights: Sequence[Array] = (),
    ) -> None:
        self.basis, self.totals = basis, np.broadcast_to(totals, basis.shape[1:2])
        self.num_cuts, _, self.size = basis.shape
        position = np.arange(self.size)
        first = np.arange(1, self.num_cuts + 1)[:, None]
        self._room = (position >= first) & (position < self.size - self.num_cuts - 1 + first)
        self.stride = 1  # only multiples of it are looked at
        self.rows: list[Row] = []
        self.tables = np.zeros((0, self.num_cuts, self.size))
        self.const, self.rate, self.limit = np.zeros(0), np.zeros(0), np.zeros(0)
        self.rounding = np.zeros(0)
        self._points = list(points)
        self._known = list(weights)
        self._weights = np.zeros((0, 0))
        if rows:
            self._extend(rows)

    @property
    def possible(self) -> npt.NDArray[np.bool_]:
        """Which positions each cut may have, shape (K-1, L+1)."""
        return np.asarray(self._room & (np.arange(self.size) % self.stride == 0))

    def add(self, row: Row) -> None:
        """Add a constraint."""
        self._extend([row])

    def _extend(self, rows: Sequence[Row]) -> None:
        coefficients = np.array([row.coefficients for row in rows])  # (rows, cuts, functions)
        tables = np.matmul(coefficients.swapaxes(0, 1), self.basis).swapaxes(0, 1)
        const = np.array([row.const + float((row.whole * self.totals).sum()) for row in rows])
        limit = np.array([row.limit for row in rows])
        size = np.abs(const) + np.abs(limit)
        size += np.abs(tables).max(axis=2, initial=0.0).sum(axis=1)
        self.rows.extend(rows)
        self.tables = np.concatenate([self.tables, tables])
        self.const = np.append(self.const, const)
        self.rate = np.append(self.rate, [row.rate for row in rows])
        self.limit = np.append(self.limit, limit)
        self.rounding = np.append(self.rounding, 1e-12 * size)

    def values(self, cuts: tuple[int, ...]) -> Array:
        """Per constraint its left side."""
        chosen = self.tables[:, np.arange(self.num_cuts), list(cuts)].sum(axis=1)
        return np.asarray(chosen + self.const)

    def level(self, cuts: tuple[int, ...]) -> float:
        """The least level at which these cuts keep every constraint that has a rate."""
        rated = self.rate > 0
        return float(np.max(((self.values(cuts) - self.limit)[rated]) / self.rate[rated]))

    def within_limits(self, cuts: tuple[int, ...]) -> bool:
        """Whether the cuts keep the constraints that no level can loosen."""
        kept = self.values(cuts) <= self.limit + self.rounding
        return bool((kept | (self.rate > 0)).all())

    def excludes(self, level: float) -> bool:
        """Whether single constraints on their own rule out all cuts at this level."""
        slack = self.rate * level + self.limit - self.const + self.rounding
        return self.num_cuts > 0 and _propagate(self.tables, slack, self.possible) is None

    @property
    def relaxed(self) -> list[tuple[int, ...]]:
        """Cuts that `lower_bound` came across, within limits or not."""
        return list(self._points)

    @property
    def weights(self) -> list[Array]:
        """Those of the constraints that gave lower bounds, each of shape (constraints,)."""
        return [*self._known, *self._weights[:1]]

    def known_bound(self) -> float:
        """A lower bound as `lower_bound` gives it, but only with the `weights` that are known."""
        return max(map(self._bound, self.weights), default=-math.inf)

    def _bound(self, weights: Array) -> float:
        count = len(weights)
        table = np.tensordot(weights, self.tables[:count], 1)
        left = float(weights @ (self.const - self.limit)[:count])
        return (_least_cuts(table, self.possible)[1] + left) / float(weights @ self.rate[:count])

    def lower_bound(self) -> float:
        """A level below which no cuts keep all constraints that have a rate.

        Whoever keeps them keeps any weighted mean of them, and the least value of a mean is found
        cut by cut. The weights are those of the best such bound (Lagrangian dual, by Kelley's
        cutting planes); with them, constraints that follow from all together help the search.
        """
        rated = np.flatnonzero(self.rate > 0)
        tables = self.tables[rated] / self.rate[rated, None, None]
        const = (self.const - self.limit)[rated] / self.rate[rated]
        weights = np.full(len(rated), 1 / len(rated))
        if self.weights:
            known = max(self.weights, key=self._bound)
            weights = np.pad(known, (0, len(self.rows) - len(known)))[rated] * self.rate[rated]
            weights /= weights.sum()
        best, best_weights = -math.inf, weights
        for _ in range(ROUNDS):
            cuts, least = _least_cuts(np.tensordot(weights, tables, 1), self.possible)
            least += float(weights @ const)
            if least > best:
                best, best_weights = least, weights
            if cuts not in self._points:
                self._points.append(cuts)
            points = np.array(self._points, dtype=int).reshape(len(self._points), self.num_cuts)
            values = tables[:, np.arange(self.num_cuts), points].sum(axis=2) + const[:, None]
            # Maximise θ under θ <= Σ weights · values of every point, weights >= 0, Σ weights = 1.
            solved = linprog(
                np.append(np.zeros(len(rated)), -1.0),
                A_ub=np.column_stack([-values.T, np.ones(len(points))]),
                b_ub=np.zeros(len(points)),
                A_eq=np.append(np.ones(len(rated)), 0.0)[None],
                b_eq=[1.0],
                bounds=[(0, None)] * len(rated) + [(None, None)],
            )
            if not solved.success or -solved.fun <= best * (1 + 1e-6):
                break
            weights = np.maximum(solved.x[:-1], 0.0)
            weights /= weights.sum()
        mixed = np.concatenate([best_weights[None], (best_weights + np.eye(len(rated))) / 2])
        self._weights = np.zeros((len(mixed), len(self.rows)))
        self._weights[:, rated] = mixed / self.rate[rated]
        return best

    def earliest(self, level: float, coarseness: float = 0.0) -> tuple[int, ...] | None:
        """The lexicographically first cuts that keep every constraint at this level, if any.

        With a ``coarseness`` partial choices that differ by less than that count as one: what is
        found keeps every constraint all the same, but need not be the first, and None says only
        that nothing does at ``level - coarseness * (K-1)``.

        Raises:
            TooManyLabelsError: if that takes more than `MOST_PAIRS` comparisons.
        """
        slack = self.rate * level + self.limit - self.const + self.rounding
        if self.num_cuts == 0:
            return () if (slack >= 0).all() else None
        weights = np.pad(self._weights, ((0, 0), (0, len(self.rows) - self._weights.shape[1])))
        tables = np.concatenate([self.tables, np.tensordot(weights, self.tables, 1)])
        slack = np.concatenate([slack, weights @ slack])
        allowed = _propagate(tables, slack, self.possible)
        if allowed is None:
            return None
        most = np.where(allowed, tables, -np.inf).max(axis=2).sum(axis=1)
        binding = np.flatnonzero(most > slack)
        own = binding[binding < len(self.rows)]
        if not len(own):  # every choice will do
            return _walk_freely(allowed)
        keys = np.array([self.rows[row].coefficients for row in own]) + 0.0
        search = LabelSearch(tables[binding], slack[binding], keys, allowed)
        return search.earliest(coarseness * self.rate[own], self.rounding[own])


def _propagate(
    tables: Array, slack: Array, allowed: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_] | None:
    """Positions that each constraint on its own leaves possible; None if a cut has none."""
    while True:
        masked = np.where(allowed, tables, np.inf)
        before = least_before(masked)[:, :-1]
        after = least_before(masked[:, ::-1, ::-1])[:, :-1][:, ::-1, ::-1]
        keeps = allowed & (before + masked + after <= slack[:, None, None]).all(axis=0)
        if not keeps.any(axis=1).all():
            return None
        if keeps.sum() == allowed.sum():
            return np.asarray(keeps)
        allowed = keeps


def _least_cuts(table: Array, possible: npt.NDArray[np.bool_]) -> tuple[tuple[int, ...], float]:
    """Cuts with the least sum of a table's entries, and that sum."""
    masked = np.where(possible, table, np.inf)
    least = least_before(masked[None])[0]
    cuts: list[int] = []
    end = table.shape[1]
    for cut in reversed(range(len(table))):
        end = int(np.argmin((least[cut] + masked[cut])[:end]))
        cuts.insert(0, end)
    return tuple(cuts), float(least[-1, -1])


def _walk_freely(allowed: npt.NDArray[np.bool_]) -> tuple[int, ...]:
    cuts: list[int] = []
    for positions in allowed:
        cuts.append(next(int(c) for c in np.flatnonzero(positions) if not cuts or c > cuts[-1]))
    return tuple(cuts)


@dataclass(frozen=True, slots=True)
class Minimum:
    """Cuts and their value; no cuts have less than ``lower_bound``."""

    cuts: tuple[int, ...]
    value: float
    lower_bound: float

    @property
    def exact(self) -> bool:
        """Whether value and bound agree, to a few `TOLERANCE`."""
        return self.value <= self.lower_bound * (1 + 5 * TOLERANCE)


def minimise(
    problem: Cuts,
    value_of: Callable[[tuple[int, ...]], float],
    start: tuple[int, ...],
    enough: float = TOLERANCE,
) -> Minimum:
    """Minimise a value of which the problem's constraints know lower bounds.

    The level at which no cuts are left is a lower bound. ``value_of`` may add the constraint that
    shows why cuts are worse than the level they were found at, and is asked again (cutting planes).

    Args:
        problem: its constraints must hold for all cuts at their own value.
        value_of: the value of some cuts; if it is above the level that the problem's constraints
            allow, it adds a constraint that says so.
        start: any cuts that are within limits.
        enough: relative gap to the lower bound with which to be content.

    Returns:
        The least value and, of cuts that attain it, the lexicographically first. Where that would
        take too long, the best that was found, with a lower bound that is less than its value.
    """
    cuts, best = start, value_of(start)
    for stride in STRIDES:  # few positions first: the search is slow where bounds are loose
        if problem.size >= 4 * stride * (problem.num_cuts + 1):
            problem.stride = stride
            cuts, best, _ = _descend(problem, value_of, cuts, best, NEAR)
    problem.stride = 1
    cuts, best, lower = _descend(problem, value_of, cuts, best, enough)
    if enough > TOLERANCE:
        return Minimum(cuts, best, min(lower, best))
    with contextlib.suppress(TooManyLabelsError):
        known = -1
        while len(problem.rows) > known:  # of equally good cuts, the first
            known = len(problem.rows)
            found = problem.earliest(best * (1 + TOLERANCE))
            if found is not None and (value := value_of(found)) <= best * (1 + 2 * TOLERANCE):
                cuts, best = found, value
                break
    return Minimum(cuts, best, min(lower, best))


def _descend(
    problem: Cuts,
    value_of: Callable[[tuple[int, ...]], float],
    cuts: tuple[int, ...],
    best: float,
    enough: float,
) -> tuple[tuple[int, ...], float, float]:
    """Better cuts, their value, and its lower bound; closer than ``enough`` if time allows."""
    lower = level = problem.lower_bound()
    coarseness = 0.0
    while best - lower > 2 * enough * best:
        known = len(problem.rows)
        found = None
        try:
            found = problem.earliest(level, coarseness)
        except TooManyLabelsError:
            if level > lower:
                coarseness = max(4 * coarseness, (level - lower) / 16 / problem.num_cuts)
                if coarseness * problem.num_cuts < level - lower:
                    continue
                break  # not even roughly
        if found is None:
            lower = max(lower, level - coarseness * problem.num_cuts)
        elif (value := value_of(found)) < best:
            best, cuts = value, found
        elif len(problem.rows) == known:
            break  # within rounding of the level: nothing is to be learnt from asking again
        if len(problem.rows) > known:
            lower = max(lower, problem.lower_bound())
        ask_outright = found is None and best - lower < NEAR * best
        level = best * (1 - enough) if ask_outright else (lower + best) / 2
        fine = best - lower < FINE * best or problem.num_cuts == 0
        coarseness = 0.0 if fine else (level - lower) / 4 / problem.num_cuts
    return cuts, best, lower
