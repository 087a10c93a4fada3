"""Arrays with one row per group of neighbouring sample paths that agree on all that matters.

All group lengths divide each other, so rows are brought together by repetition.
"""

from typing import TypeVar

import numpy as np

from theory.protocols import FloatArray, IntArray

Rows = TypeVar("Rows", FloatArray, IntArray)


def columns(paths: IntArray) -> list[IntArray]:
    """Return, per sample, the paths' draws with one entry per group of paths that agree so far.

    Groups are equally long runs of neighbours, so that rows of one group length are turned into
    those of another by repetition: the lengths are gcds of growing sets and divide each other.

    >>> columns(np.array([[0, 0], [0, 1], [1, 0], [1, 1]]))
    [array([0, 1]), array([0, 1, 0, 1])]
    """
    draws, group = [], len(paths)
    for column in paths.T:
        group = int(np.gcd.reduce(np.flatnonzero(np.diff(column)) + 1, initial=group))
        draws.append(column[::group])
    return draws


def spread(rows: Rows, length: int) -> Rows:
    """Repeat every row in place until there are at least ``length``, a multiple of the rows.

    >>> spread(np.array([1.0, 2.0]), 4)
    array([1., 1., 2., 2.])
    """
    if len(rows) >= length:
        return rows
    # A column's numbers for all paths lie together, as in what problems return: operations on
    # two memory orders at once take several times as long.
    return np.repeat(rows.T, length // len(rows), axis=-1).T


def align(*arrays: FloatArray) -> list[FloatArray]:
    """Bring all arrays to the number of rows of the longest.

    >>> align(np.array([1.0]), np.array([2.0, 3.0]))
    [array([1., 1.]), array([2., 3.])]
    """
    length = max(map(len, arrays))
    return [spread(rows, length) for rows in arrays]
