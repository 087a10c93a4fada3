"""How the executor gets its gradients: whole, or propagated through real stages.

Arrays hold one row per group of neighbouring sample paths that agree on everything the array
depends on. All group lengths divide each other, so rows are brought together by repetition.
"""

from dataclasses import dataclass, field
from typing import Protocol, TypeGuard, TypeVar

import numpy as np

from ddg_sim.schedule import Op, OpKind
from theory.protocols import FloatArray, IntArray, LayeredProblem, Problem

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
    return rows if len(rows) >= length else np.repeat(rows, length // len(rows), axis=0)


def align(*arrays: FloatArray) -> list[FloatArray]:
    """Bring all arrays to the number of rows of the longest.

    >>> align(np.array([1.0]), np.array([2.0, 3.0]))
    [array([1., 1.]), array([2., 3.])]
    """
    length = max(map(len, arrays))
    return [spread(rows, length) for rows in arrays]


class Engine(Protocol):
    """How gradients come about; ``w_k`` is the version that the operation reads."""

    def forward(self, op: Op, w_k: FloatArray) -> None:
        """Run a FORWARD or RECOMPUTE operation."""

    def backward(self, op: Op, w_k: FloatArray) -> FloatArray:
        """Run a BACKWARD operation and return the gradient of the stage's weights."""


@dataclass(eq=False)
class Snapshots:
    """Gradients of a problem without stages: whole, at the concatenation of what F read.

    Raises ValueError where an operation reads other weights than the sample's forward pass did.
    """

    problem: Problem
    columns: list[IntArray]
    read: dict[tuple[int, int], tuple[int, FloatArray]] = field(default_factory=dict)
    gradients: dict[int, FloatArray] = field(default_factory=dict)

    def forward(self, op: Op, w_k: FloatArray) -> None:
        """Note which weights the sample meets."""
        if op.kind is OpKind.RECOMPUTE:
            self._require_stashed(op)
        else:
            self.read[op.stage, op.sample] = op.version, w_k

    def backward(self, op: Op, w_k: FloatArray) -> FloatArray:
        """Return the stage's block of the sample's gradient, computed once for all stages."""
        self._require_stashed(op)
        if op.sample not in self.gradients:
            # The last stage comes first: now every stage has read its weights for this sample.
            column = self.columns[op.sample]
            read = (self.read[k, op.sample][1] for k in range(len(self.problem.blocks)))
            w = spread(np.concatenate(align(*read), axis=1), len(column))
            self.gradients[op.sample] = self.problem.gradients(w, spread(column, len(w)))
        del self.read[op.stage, op.sample]
        whole = self.gradients[op.sample] if op.stage else self.gradients.pop(op.sample)
        return whole[:, self.problem.blocks[op.stage]]

    def _require_stashed(self, op: Op) -> None:
        if op.version != self.read[op.stage, op.sample][0]:
            raise ValueError(
                f"schedule: {op} reads other weights than F{op.stage}({op.sample}) did, and "
                f"problem {self.problem.name!r} has no stages that could tell the two apart; "
                "take rotation-chain, or stashed weights"
            )


@dataclass(eq=False)
class Propagation:
    """Gradients of a layered problem: h and delta go from stage to stage, as on devices."""

    problem: LayeredProblem
    columns: list[IntArray]
    kept: dict[tuple[int, int], tuple[FloatArray, FloatArray]] = field(default_factory=dict)
    sent: dict[tuple[OpKind, int, int], FloatArray] = field(default_factory=dict)

    def forward(self, op: Op, w_k: FloatArray) -> None:
        """Run the stage; keep its input and output, and send the output on the first time."""
        if op.kind is OpKind.RECOMPUTE:
            h_in = self.kept[op.stage, op.sample][0]
        elif op.stage == 0:
            h_in = self.problem.inputs(self.columns[op.sample])
        else:
            h_in = self.sent.pop((OpKind.FORWARD, op.stage - 1, op.sample))
        w_k, h_in = align(w_k, h_in)
        h_out = self.problem.forward(op.stage, w_k, h_in)
        self.kept[op.stage, op.sample] = h_in, h_out
        # A replayed output stays where it is: the next stage has long had the first one.
        if op.kind is OpKind.FORWARD and op.stage + 1 < len(self.problem.blocks):
            self.sent[op.kind, op.stage, op.sample] = h_out

    def backward(self, op: Op, w_k: FloatArray) -> FloatArray:
        """Return the stage's gradient from what was kept and from the next stage's delta."""
        h_in, h_out = self.kept.pop((op.stage, op.sample))
        if op.stage + 1 == len(self.problem.blocks):
            sample = spread(self.columns[op.sample], len(h_out))
            delta = self.problem.loss_gradient(h_out, sample)
        else:
            delta = self.sent.pop((OpKind.BACKWARD, op.stage + 1, op.sample))
        gradient, delta = self.problem.backward(op.stage, *align(w_k, h_in, h_out, delta))
        if op.stage:
            self.sent[OpKind.BACKWARD, op.stage, op.sample] = delta
        return gradient


def is_layered(problem: Problem) -> TypeGuard[LayeredProblem]:
    """Whether the problem has real stages to propagate through.

    >>> from theory.problems import make
    >>> is_layered(make("kuramoto", 2)), is_layered(make("rotation-chain", 2))
    (False, True)
    """
    return all(hasattr(problem, part) for part in ("inputs", "forward", "backward"))


def engine_for(problem: Problem, paths: IntArray) -> Engine:
    """Return the way to get this problem's gradients along ``paths`` (P, samples).

    >>> from theory.problems import make
    >>> type(engine_for(make("kuramoto", 2), np.zeros((1, 1), dtype=np.int64))).__name__
    'Snapshots'
    """
    draws = columns(paths)
    return Propagation(problem, draws) if is_layered(problem) else Snapshots(problem, draws)
