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
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog

Array = npt.NDArray[np.float64]

#: Values that agree to this relative difference count as equal.
TOLERANCE = 1e-9
#: Most rounds of looking for better weights of the constraints.
ROUNDS = 50
#: Once value and bound are as close as this, ask outright whether anything is better.
NEAR = 1e-3
#: Pairs of partial choices that one search may compare: a few seconds.
MOST_PAIRS = 20_000_000
#: Once they are as close as this, no partial choices count as one that differ at all.
FINE = 1e-5
#: First solved with cuts at multiples of these positions only.
STRIDES = (32, 8)


class TooManyLabelsError(Exception):
    """More undominated partial choices than `MOST_PAIRS` allows for: it would take too long."""


@dataclass(frozen=True, slots=True)
class Row:
    """A constraint: ``const + Σ_k coefficients[k] · basis[k, :, c_k] <= rate * level + limit``.

    ``coefficients`` has shape (K-1, number of basis functions).
    """

    coefficients: Array
    const: float
    rate: float
    limit: float = 0.0


class Cuts:
    """Increasing cut positions 1 <= c_1 < … < c_{K-1} < L under separable constraints.

    Args:
        basis: shape (K-1, basis functions, L+1): their values per cut and position.

    >>> problem = Cuts(np.arange(5.0)[None, None, :])  # one cut of four layers, one second each
    >>> problem.add(Row(np.array([[1.0]]), const=0.0, rate=1.0))  # the first stage's seconds
    >>> problem.add(Row(np.array([[-1.0]]), const=4.0, rate=1.0))  # the second stage's
    >>> problem.earliest(1.9) is None, problem.earliest(2.0), problem.earliest(3.0)
    (True, (2,), (1,))
    """

    def __init__(self, basis: Array) -> None:
        self.basis = basis
        self.num_cuts, _, self.size = basis.shape
        position = np.arange(self.size)
        first = np.arange(1, self.num_cuts + 1)[:, None]
        self._room = (position >= first) & (position < self.size - self.num_cuts - 1 + first)
        self.stride = 1  # only multiples of it are looked at
        self.rows: list[Row] = []
        self.tables = np.zeros((0, self.num_cuts, self.size))
        self.const, self.rate, self.limit = np.zeros(0), np.zeros(0), np.zeros(0)
        self.rounding = np.zeros(0)
        self._points: list[tuple[int, ...]] = []
        self._weights = np.zeros((0, 0))

    @property
    def possible(self) -> npt.NDArray[np.bool_]:
        """Which positions each cut may have, shape (K-1, L+1)."""
        return np.asarray(self._room & (np.arange(self.size) % self.stride == 0))

    def add(self, row: Row) -> None:
        """Add a constraint."""
        table = np.einsum("kn,knc->kc", row.coefficients, self.basis)
        size = abs(row.const) + abs(row.limit) + np.abs(table).max(axis=1, initial=0.0).sum()
        self.rows.append(row)
        self.tables = np.concatenate([self.tables, table[None]])
        self.const = np.append(self.const, row.const)
        self.rate = np.append(self.rate, row.rate)
        self.limit = np.append(self.limit, row.limit)
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
        search = _Search(tables[binding], slack[binding], keys, allowed)
        return search.earliest(coarseness * self.rate[own], self.rounding[own])


def _propagate(
    tables: Array, slack: Array, allowed: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_] | None:
    """Positions that each constraint on its own leaves possible; None if a cut has none."""
    while True:
        masked = np.where(allowed, tables, np.inf)
        before = _least_before(masked)[:, :-1]
        after = _least_before(masked[:, ::-1, ::-1])[:, :-1][:, ::-1, ::-1]
        keeps = allowed & (before + masked + after <= slack[:, None, None]).all(axis=0)
        if not keeps.any(axis=1).all():
            return None
        if keeps.sum() == allowed.sum():
            return np.asarray(keeps)
        allowed = keeps


def _least_cuts(table: Array, possible: npt.NDArray[np.bool_]) -> tuple[tuple[int, ...], float]:
    """Cuts with the least sum of a table's entries, and that sum."""
    masked = np.where(possible, table, np.inf)
    least = _least_before(masked[None])[0]
    cuts: list[int] = []
    end = table.shape[1]
    for cut in reversed(range(len(table))):
        end = int(np.argmin((least[cut] + masked[cut])[:end]))
        cuts.insert(0, end)
    return tuple(cuts), float(least[-1, -1])


def _least_before(tables: Array) -> Array:
    """Per row, number of cuts k and position c: the least sum of k increasing cuts before c."""
    rows, cuts, size = tables.shape
    least = np.full((rows, cuts + 1, size), np.inf)
    least[:, 0] = 0.0
    for cut in range(cuts):
        reached = np.minimum.accumulate(least[:, cut] + tables[:, cut], axis=1)
        least[:, cut + 1, 1:] = reached[:, :-1]
    return least


def _walk_freely(allowed: npt.NDArray[np.bool_]) -> tuple[int, ...]:
    cuts: list[int] = []
    for positions in allowed:
        cuts.append(next(int(c) for c in np.flatnonzero(positions) if not cuts or c > cuts[-1]))
    return tuple(cuts)


class _Search:
    """One run of the dynamic program, over the constraints that can bind at all.

    A label of (cut k, position c) is a choice of the cuts from k on, with c_k = c. It holds, per
    group of constraints that agree on the cuts before k, the largest sum of any of them minus its
    bound: those before k add the same to all of a group, so the others cannot bind first. What
    cannot bind any more, whatever the cuts before k, is -inf: labels must not differ in it.

    Args:
        tables: constraints, cuts, positions.
        slack: bounds.
        keys: of the first constraints, what tells their tables apart, per cut. The other
            constraints follow from these: they prune labels, but need not be compared.
        allowed: cuts, positions.
    """

    def __init__(
        self,
        tables: Array,
        slack: Array,
        keys: Array,
        allowed: npt.NDArray[np.bool_],
    ) -> None:
        self.tables, self.start, self.keys, self.allowed = tables, -slack, keys, allowed
        self.least = _least_before(np.where(allowed, tables, np.inf))
        self.most = -_least_before(np.where(allowed, -tables, np.inf))
        self.pairs = 0

    def earliest(self, coarse: Array, rounding: Array) -> tuple[int, ...] | None:
        labels: list[dict[int, Array]] = []
        _, cuts, size = self.tables.shape
        groups = self._groups(cuts)
        values = np.full(groups.max() + 1, -np.inf)
        np.maximum.at(values, groups, self.start)
        after = {size: values[None]}
        for cut in reversed(range(cuts)):
            after, groups = self._extend(cut, after, groups, coarse)
            if not after:
                return None
            labels.append(after)
        return self._walk(labels[::-1], rounding)

    def _groups(self, cut: int) -> npt.NDArray[np.intp]:
        """Per constraint the number of its group: those that agree on the cuts before this one."""
        numbers: dict[bytes, int] = {}
        found = [numbers.setdefault(key[:cut].tobytes(), len(numbers)) for key in self.keys]
        implied = len(self.tables) - len(found)
        return np.array([*found, *range(len(numbers), len(numbers) + implied)])

    def _extend(
        self, cut: int, after: dict[int, Array], finer: npt.NDArray[np.intp], coarse: Array
    ) -> tuple[dict[int, Array], npt.NDArray[np.intp]]:
        """Labels of this cut from those of the next one."""
        groups = self._groups(cut)
        member = np.unique(finer, return_index=True)[1]  # a constraint of each finer group
        representative = np.unique(groups, return_index=True)[1]
        order = np.argsort(groups[member], kind="stable")
        starts = np.searchsorted(groups[member][order], np.arange(len(representative)))
        shifts = self.tables[member, cut]  # (finer groups, positions)
        least, most = self.least[representative, cut], self.most[representative, cut]
        found: dict[int, Array] = {}
        front = np.zeros((0, len(member)))
        compared = len(member) - (len(self.tables) - len(self.keys))
        near = np.full(compared, np.inf)
        np.minimum.at(near, finer[: len(coarse)], coarse)
        waiting = sorted(after)  # positions of the next cut, the largest last
        for position in np.flatnonzero(self.allowed[cut])[::-1]:
            while waiting and waiting[-1] > position:
                labels = after[waiting.pop()]
                self.pairs += len(labels) * (len(front) + len(labels))
                if self.pairs > MOST_PAIRS:
                    raise TooManyLabelsError
                front = _undominated(front, labels, near)
            merged = np.maximum.reduceat((front + shifts[:, position])[:, order], starts, axis=1)
            tightness = (merged + least[:, position]).max(axis=1)
            kept = merged[tightness <= 0]
            if len(kept):
                kept[kept + most[:, position] <= 0] = -np.inf
                found[int(position)] = kept
        return found, groups

    def _walk(self, labels: list[dict[int, Array]], rounding: Array) -> tuple[int, ...]:
        """From the first cut on, the earliest position that some label completes."""
        cuts: list[int] = []
        count = len(self.keys)
        so_far = np.zeros(count)
        for cut, at in enumerate(labels):
            groups, members = np.unique(self._groups(cut)[:count], return_index=True)
            spent = so_far[members] - rounding[members]
            position = next(
                position
                for position in sorted(at)
                if (not cuts or position > cuts[-1])
                and (at[position][:, groups] + spent <= 0).all(axis=1).any()
            )
            cuts.append(position)
            so_far = so_far + self.tables[:count, cut, position]
        return tuple(cuts)


def _undominated(front: Array, labels: Array, near: Array) -> Array:
    """The labels, old and new, that no other is at most equal to in all compared columns.

    A new one must be better than any old one by more than ``near`` somewhere; an old one leaves
    only for one that is no worse, so that differences do not add up.
    """
    compared = len(near)

    def dominates(some: Array, others: Array) -> npt.NDArray[np.bool_]:
        return np.asarray((some[:, None, :compared] <= others[None, :, :compared]).all(axis=2))

    loosened = labels.copy()
    loosened[:, :compared] += near
    labels = labels[~dominates(front, loosened).any(axis=0)]
    among = dominates(labels, labels)
    among &= ~among.T | np.tri(len(labels), k=-1, dtype=bool).T  # of equal ones the first stays
    labels = labels[~among.any(axis=0)]
    return np.concatenate([front[~dominates(labels, front).any(axis=0)], labels])


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
    problem: Cuts, value_of: Callable[[tuple[int, ...]], float], start: tuple[int, ...]
) -> Minimum:
    """Minimise a value of which the problem's constraints know lower bounds.

    The level at which no cuts are left is a lower bound. ``value_of`` may add the constraint that
    shows why cuts are worse than the level they were found at, and is asked again (cutting planes).

    Args:
        problem: its constraints must hold for all cuts at their own value.
        value_of: the value of some cuts; if it is above the level that the problem's constraints
            allow, it adds a constraint that says so.
        start: any cuts that are within limits.

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
    cuts, best, lower = _descend(problem, value_of, cuts, best, TOLERANCE)
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
