"""The first cuts below given bounds, by dynamic programming over partial sums.

From the last cut to the first, over partial choices that no other dominates (multi-objective
shortest paths; Martins 1984).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ddg_sim.times import Array

#: Pairs of partial choices that one search may compare: a few seconds.
MOST_PAIRS = 20_000_000


class TooManyLabelsError(Exception):
    """More undominated partial choices than `MOST_PAIRS` allows for: it would take too long."""


class LabelSearch:
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
        self.least = least_before(np.where(allowed, tables, np.inf))
        self.most = -least_before(np.where(allowed, -tables, np.inf))
        self.pairs = 0

    def earliest(self, coarse: Array, rounding: Array) -> tuple[int, ...] | None:
        """The first cuts within all bounds, see `separable.Cuts.earliest`; None if there are none.

        Args:
            coarse: per constraint of ``keys``, by how much labels must differ to count as two.
            rounding: likewise, what of their slack is there for rounding only.

        Raises:
            TooManyLabelsError: if it takes more than `MOST_PAIRS` comparisons.
        """
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


def least_before(tables: Array) -> Array:
    """Per row, number of cuts k and position c: the least sum of k increasing cuts before c.

    >>> least_before(np.array([[[5.0, 3.0, 4.0]]]))[0, 1]  # one cut
    array([inf,  5.,  3.])
    """
    rows, cuts, size = tables.shape
    least = np.full((rows, cuts + 1, size), np.inf)
    least[:, 0] = 0.0
    for cut in range(cuts):
        reached = np.minimum.accumulate(least[:, cut] + tables[:, cut], axis=1)
        least[:, cut + 1, 1:] = reached[:, :-1]
    return least
