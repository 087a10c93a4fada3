"""What a convergence statement is: hypotheses that can be checked, two sides, source, status.

Notation: f = (1/n) sum_i f_i >= f*; gap = f(w^0) - f*; G_t = E||grad f(w^t)||^2; stages
k = 1..K with delays d_k, D = max d_k (DDG: d_k = K - k); gamma_t the step size of tick t.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from theory.motion import Motion
from theory.protocols import FloatArray


class Status(StrEnum):
    """What is known about a statement."""

    PAPER_CLAIM = "paper claim"
    PROVED = "proved"
    REFUTED = "refuted as stated"
    CONJECTURE = "conjecture"


class Scope(StrEnum):
    """What the left side is."""

    #: E[f(w^{t+1}) | w^t] - f(w^t), for every step t and every w^t.
    STEP_GIVEN_WEIGHTS = "one step, given w^t"
    #: E f(w^{t+1}) - E f(w^t), for every step t.
    STEP_IN_TOTAL = "one step, in total expectation"
    #: sum_t gamma_t G_t / sum_t gamma_t.
    AVERAGE = "average"
    #: E<grad_k f(w^t), grad_k f_{i(t-d_k)}(w^{t-d_k})>, for every t >= d_k and every stage.
    INNER_PRODUCT = "inner product"


@dataclass(frozen=True)
class Constants:
    """What a bound is made of.

    ``delays``: of each stage, the longest where they change. ``replay_L`` and ``replay_M``:
    the L' and M' of `theory.hypotheses.REPLAYED`.
    ``sigma`` and ``direction``: what Features Replay's theorem assumes, as measured along the run:
    E<grad f(w^t), g^t> >= sigma G_t and E||g^t||^2 <= direction, w^{t+1} = w^t - gamma_t g^t.
    What a problem or a run does not have is nan.
    """

    L: float
    M: float
    gap: float
    delays: tuple[int, ...]
    variance: float = math.nan
    momentum: float = 0.0
    replay_L: float = math.nan
    replay_M: float = math.nan
    sigma: float = math.nan
    direction: float = math.nan

    @property
    def num_stages(self) -> int:
        """K."""
        return len(self.delays)

    @property
    def max_delay(self) -> int:
        """D."""
        return max(self.delays)


@dataclass(frozen=True)
class Hypothesis:
    """A condition, and ``deviation``: what of an input does not meet it, or None.

    Its arguments are how the weights move, the constants and the step sizes (T,).
    """

    text: str
    deviation: Callable[[Motion, Constants, FloatArray], str | None]

    def __str__(self) -> str:
        return self.text


Bound = Callable[[Constants, npt.ArrayLike], float]


@dataclass(frozen=True)
class Statement:
    """A statement about delayed gradients, exactly as it can be checked.

    ``bound(constants, step_sizes)`` is the right side. For a one-step statement it is the part c
    that does not depend on w^t: the right side at step t is -(gamma_t/2)||grad f(w^t)||^2 + c,
    with c at the last of the ``step_sizes`` (t + 1,), which reach from step 0 to step t. It is None
    for INNER_PRODUCT, whose right side E<grad_k f(w^t), grad_k f(w^{t-d_k})> is claimed to equal
    the left.

    ``after_warm_up``: the statement is about t >= D only. ``formula`` is for a terminal, ``latex``
    the same for a page (without dollar signs). The proof is in the docstring of ``bound``.
    """

    key: str
    title: str
    scope: Scope
    hypotheses: tuple[Hypothesis, ...]
    conditioning: str
    formula: str
    latex: str
    source: str
    status: Status
    note: str
    step_rule: Callable[[float, int], FloatArray]
    bound: Bound | None
    after_warm_up: bool = False


def constant_steps(gamma: float, iterations: int) -> FloatArray:
    """Return gamma_t = gamma for t < iterations, shape (iterations,).

    Raises ValueError if gamma is not positive and finite, or iterations is below 1.

    >>> constant_steps(0.5, 2)
    array([0.5, 0.5])
    """
    _require_steps(gamma, iterations)
    return np.full(iterations, float(gamma))


def harmonic_steps(gamma: float, iterations: int) -> FloatArray:
    """Return gamma_t = gamma / (1 + t) for t < iterations, shape (iterations,).

    Raises ValueError if gamma is not positive and finite, or iterations is below 1.

    >>> harmonic_steps(0.5, 2)
    array([0.5 , 0.25])
    """
    _require_steps(gamma, iterations)
    return gamma / (1.0 + np.arange(iterations, dtype=np.float64))


def only_step(step_sizes: npt.ArrayLike) -> tuple[float, int]:
    """Return (gamma, T) of constant step sizes.

    Raises ValueError if the step sizes are not all the same.

    >>> only_step([0.5, 0.5])
    (0.5, 2)
    """
    gammas = np.asarray(step_sizes, dtype=np.float64)
    if not np.all(gammas == gammas[0]):
        raise ValueError(f"step_sizes must all be the same for this statement, got {gammas}")
    return float(gammas[0]), len(gammas)


def _require_steps(gamma: float, iterations: int) -> None:
    if not (math.isfinite(gamma) and gamma > 0):
        raise ValueError(f"gamma must be positive and finite, got {gamma}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
