"""What the executor and the checks ask of a problem; nothing here computes anything.

Every array carries a leading batch axis: row p belongs to sample path p. A problem's weights are
one vector of length ``dim``, cut into one contiguous block per stage. Any memory order will do;
`theory.delays` keeps the paths next to each other in memory (Fortran order).
"""

from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]


class Problem(Protocol):
    """A finite sum f = (1/n) sum_i f_i with global, proved constants.

    ``L``: ||grad f(x) - grad f(y)|| <= L ||x - y|| for all x, y.
    ``M``: (1/n) sum_i ||grad f_i(w)||^2 <= M for all w (a supremum over w); inf if unbounded.
    ``variance``: (1/n) sum_i ||grad f_i(w) - grad f(w)||^2 <= variance for all w; inf likewise.
    ``f_star``: f(w) >= f_star for all w.
    """

    @property
    def name(self) -> str:
        """The name that reports print."""

    @property
    def blocks(self) -> tuple[slice, ...]:
        """The slice of the weight vector that each stage owns, first stage first."""

    @property
    def num_samples(self) -> int:
        """The number n of samples; each is drawn with probability 1/n."""

    @property
    def start(self) -> FloatArray:
        """The initial weights w^0, shape (dim,)."""

    @property
    def L(self) -> float:
        """Lipschitz constant of grad f."""

    @property
    def M(self) -> float:
        """Bound on the mean squared norm of a sample's gradient; inf where there is none."""

    @property
    def variance(self) -> float:
        """Bound on the mean squared distance of a sample's gradient from grad f; or inf."""

    @property
    def f_star(self) -> float:
        """A lower bound of f."""

    def value(self, w: FloatArray) -> FloatArray:
        """Return f(w), shape (P,), for w of shape (P, dim)."""

    def gradients(self, w: FloatArray, sample: IntArray) -> FloatArray:
        """Return row p = grad f_{sample[p]}(w[p]), shape (P, dim)."""

    def full_gradient(self, w: FloatArray) -> FloatArray:
        """Return grad f, shape (P, dim)."""


class LayeredProblem(Problem, Protocol):
    """A problem that is a real chain of stages, so that stale activations can be executed.

    On such a problem stashed weights, current weights and replay give different gradients.
    """

    def inputs(self, sample: IntArray) -> FloatArray:
        """Return what the first stage receives, shape (P, width)."""

    def forward(self, stage: int, w_k: FloatArray, h: FloatArray) -> FloatArray:
        """Return the stage's output for weights w_k (P, block) and input h (P, width)."""

    def backward(
        self, stage: int, w_k: FloatArray, h_in: FloatArray, h_out: FloatArray, delta: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Return (gradient of w_k, delta for the stage before) from delta = d loss / d h_out."""

    def loss_gradient(self, h: FloatArray, sample: IntArray) -> FloatArray:
        """Return d loss / d h at the last stage's output h, shape (P, width)."""


class ReversibleProblem(LayeredProblem, Protocol):
    """A chain whose stages can give their input back, as methods without stored activations ask."""

    def inverse(self, stage: int, w_k: FloatArray, h: FloatArray) -> FloatArray:
        """Return the stage's input, shape (P, width), for weights w_k (P, block) and output h."""
