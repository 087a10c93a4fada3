"""The convergence statements as objects: hypotheses, constants, source, status, right side.

Notation: f = (1/n) sum_i f_i >= f*; gap = f(w^0) - f*; G_t = E||grad f(w^t)||^2; stages
k = 1..K with delays d_k, D = max d_k (DDG: d_k = K - k); gamma_t the step size of tick t.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from theory.protocols import FloatArray


class Status(StrEnum):
    """What is known about a statement."""

    PAPER_CLAIM = "paper claim"
    PROVED = "proved"
    REFUTED = "refuted as stated"
    CONJECTURE = "conjecture"


class Scope(StrEnum):
    """What the left side is."""

    #: E f(w^{t+1}) - f(w^t), for every step t.
    ONE_STEP = "one step"
    #: sum_t gamma_t G_t / sum_t gamma_t over t < T.
    AVERAGE = "average"


@dataclass(frozen=True)
class Constants:
    """What a bound is made of: L, M, the gap f(w^0) - f*, K and D."""

    L: float
    M: float
    gap: float
    num_stages: int
    max_delay: int


@dataclass(frozen=True)
class Statement:
    """A statement about delayed gradients, exactly as it can be checked.

    ``bound(constants, step_sizes)`` is the right side. For a one-step statement it is the part c
    that does not depend on w^t: the right side at step t is -(gamma_t/2)||grad f(w^t)||^2 + c,
    with c at the last of the ``step_sizes`` (T,), which reach from step 0 to the end of the run.
    """

    key: str
    title: str
    scope: Scope
    hypotheses: tuple[str, ...]
    conditioning: str
    formula: str
    source: str
    status: Status
    note: str
    step_rule: Callable[[float, int], FloatArray]
    bound: Callable[[Constants, npt.ArrayLike], float]


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


def delay_constant(num_stages: int, M: float, sigma: float) -> float:
    """Return the paper's M_K = K M + sigma K^4 M.

    >>> delay_constant(2, M=10.0, sigma=1.0)
    180.0
    """
    return num_stages * M + sigma * num_stages**4 * M


def lemma1(constants: Constants, step_sizes: npt.ArrayLike) -> float:
    """Return gamma_t^2 L M_K for the last step t, with sigma = max_t gamma_{max(0,t-K+1)}/gamma_t.

    >>> one = Constants(L=1.0, M=1.0, gap=1.0, num_stages=2, max_delay=1)
    >>> round(lemma1(one, [0.01, 0.01]), 12)
    0.0018
    """
    gammas = np.asarray(step_sizes, dtype=np.float64)
    ticks = np.arange(len(gammas))
    earlier = gammas[np.maximum(0, ticks - constants.num_stages + 1)]
    m_k = delay_constant(constants.num_stages, constants.M, float(np.max(earlier / gammas)))
    return float(gammas[-1] ** 2 * constants.L * m_k)


def theorem1(constants: Constants, step_sizes: npt.ArrayLike) -> float:
    """Return 2 gap/(gamma T) + 2 gamma L M_K with sigma = 1, for a constant step size.

    Weaker than Theorem A where gamma L <= 1: 1 + gamma L (K-1)^2 <= 2 (K + K^4).

    Raises ValueError if the step sizes are not all the same.

    >>> one = Constants(L=1.0, M=1.0, gap=1.0, num_stages=1, max_delay=0)
    >>> theorem1(one, [0.5, 0.5, 0.5, 0.5])
    3.0
    """
    gamma, iterations = _only_step(step_sizes)
    m_k = delay_constant(constants.num_stages, constants.M, sigma=1.0)
    return 2.0 * constants.gap / (gamma * iterations) + 2.0 * gamma * constants.L * m_k


def theorem2(constants: Constants, step_sizes: npt.ArrayLike) -> float:
    """Return (2 gap + sum_t 2 gamma_t^2 L M_K) / Gamma_T, Gamma_T = sum_t gamma_t, sigma = K.

    >>> one = Constants(L=1.0, M=1.0, gap=1.0, num_stages=1, max_delay=0)
    >>> theorem2(one, [1.0])
    6.0
    """
    gammas = np.asarray(step_sizes, dtype=np.float64)
    m_k = delay_constant(constants.num_stages, constants.M, sigma=float(constants.num_stages))
    noise = 2.0 * constants.L * m_k * math.fsum(gammas**2)
    return (2.0 * constants.gap + noise) / math.fsum(gammas)


def theorem_a(constants: Constants, step_sizes: npt.ArrayLike) -> float:
    """Return 2 gap/(gamma T) + gamma L M (1 + gamma L D^2), for a constant step size.

    Proof. Let v^0 = w^0, v^{t+1} = v^t - gamma grad f_{i(t)}(w^t): all blocks of a sample at once.
    v^t depends on i(0..t-1) only, and so does w^t, hence smoothness at v^t gives
    E f(v^{t+1}) <= E f(v^t) - gamma E<grad f(v^t), grad f(w^t)> + gamma^2 L M / 2. With
    -<a, b> <= -||b||^2/2 + ||a - b||^2/2 the middle term is at most
    -(gamma/2) G_t + (gamma/2) L^2 E||e_t||^2 for e_t = v^t - w^t. Block k of e_t is
    -gamma sum_{p=1}^{min(d_k,t)} grad_k f_{i(t-p)}(w^{t-p}), so by Cauchy-Schwarz
    E||e_t||^2 <= gamma^2 D sum_{p=1}^{D} E||grad f_{i(t-p)}(w^{t-p})||^2 <= gamma^2 D^2 M, in the
    warm-up too. Sum over t and use f(v^T) >= f*.

    Raises ValueError if the step sizes are not all the same.

    >>> one = Constants(L=1.0, M=1.0, gap=1.0, num_stages=3, max_delay=2)
    >>> theorem_a(one, [0.5, 0.5, 0.5, 0.5])
    2.5
    """
    gamma, iterations = _only_step(step_sizes)
    x = gamma * constants.L
    noise = x * constants.M * (1.0 + x * constants.max_delay**2)
    return 2.0 * constants.gap / (gamma * iterations) + noise


def _require_steps(gamma: float, iterations: int) -> None:
    if not (math.isfinite(gamma) and gamma > 0):
        raise ValueError(f"gamma must be positive and finite, got {gamma}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")


def _only_step(step_sizes: npt.ArrayLike) -> tuple[float, int]:
    gammas = np.asarray(step_sizes, dtype=np.float64)
    if not np.all(gammas == gammas[0]):
        raise ValueError(f"step_sizes must all be the same for this statement, got {gammas}")
    return float(gammas[0]), len(gammas)


SMOOTH = "||grad f(x) - grad f(y)|| <= L ||x - y|| for all x, y"
SECOND_MOMENT = "(1/n) sum_i ||grad f_i(w)||^2 <= M for all w"
IID = "i(0), i(1), ... independent, uniform on the n samples"
DDG_DELAYS = (
    "w_k^{t+1} = w_k^t - gamma_t grad_k f_{i(t-d_k)}(w^{t-d_k}), d_k = K - k, idle if t < d_k"
)
FIXED_DELAYS = (
    "w_k^{t+1} = w_k^t - gamma grad_k f_{i(t-d_k)}(w^{t-d_k}), d_k fixed, idle if t < d_k"
)
SMALL_STEPS = "gamma_t L <= 1 for every t"

_PAPER = "Huo, Gu, Yang, Huang, ICML 2018 (arXiv 1804.10574), statement from memory"
_TOTAL = "total expectation over i(0), ..., i(T-1), warm-up included"

LEMMA1 = Statement(
    key="lemma1",
    title="DDG, descent in one step",
    scope=Scope.ONE_STEP,
    hypotheses=(SMOOTH, SECOND_MOMENT, IID, DDG_DELAYS, SMALL_STEPS),
    conditioning="expectation given w^t, for every t >= 0, warm-up included",
    formula=(
        "E[f(w^{t+1}) | w^t] - f(w^t) <= -(gamma_t/2) ||grad f(w^t)||^2 + gamma_t^2 L M_K, "
        "M_K = K M + sigma K^4 M, sigma = max_t gamma_{max(0,t-K+1)}/gamma_t"
    ),
    source=f"{_PAPER}: Lemma 1",
    status=Status.REFUTED,
    note=(
        "False given w^t: stage k's update at t uses sample i(t-K+k), which w^t already depends "
        "on through the stages that applied it earlier. False in the warm-up (t < K-1) even in "
        "total expectation: idle stages do not descend. True, and very slack, in total "
        "expectation for t >= K-1 and gamma L <= 1. See theory.counterexamples."
    ),
    step_rule=constant_steps,
    bound=lemma1,
)

THEOREM1 = Statement(
    key="theorem1",
    title="DDG, constant step size",
    scope=Scope.AVERAGE,
    hypotheses=(SMOOTH, SECOND_MOMENT, IID, DDG_DELAYS, SMALL_STEPS),
    conditioning=_TOTAL,
    formula="(1/T) sum_{t<T} G_t <= 2 gap/(gamma T) + 2 gamma L M_K, M_K = K M + K^4 M",
    source=f"{_PAPER}: Theorem 1",
    status=Status.PAPER_CLAIM,
    note=(
        "True in total expectation: Theorem A implies it for gamma L <= 1. Vacuous (bound >= M) "
        "unless gamma L < 1/(2 (K + K^4)). The paper's proof goes through Lemma 1, which is false."
    ),
    step_rule=constant_steps,
    bound=theorem1,
)

THEOREM2 = Statement(
    key="theorem2",
    title="DDG, gamma_t = gamma_0/(1 + t)",
    scope=Scope.AVERAGE,
    hypotheses=(SMOOTH, SECOND_MOMENT, IID, DDG_DELAYS, SMALL_STEPS),
    conditioning=_TOTAL,
    formula=(
        "(1/Gamma_T) sum_{t<T} gamma_t G_t <= (2 gap + sum_{t<T} 2 gamma_t^2 L M_K)/Gamma_T, "
        "Gamma_T = sum_{t<T} gamma_t, M_K = K M + K^5 M (sigma = K)"
    ),
    source=f"{_PAPER}: Theorem 2",
    status=Status.PAPER_CLAIM,
    note=(
        "True in total expectation, by its slack. Vacuous unless gamma L is tiny. The paper's "
        "proof goes through Lemma 1, which is false."
    ),
    step_rule=harmonic_steps,
    bound=theorem2,
)

THEOREM_A = Statement(
    key="theorem-a",
    title="fixed delays, constant step size",
    scope=Scope.AVERAGE,
    hypotheses=(SMOOTH, SECOND_MOMENT, IID, FIXED_DELAYS),
    conditioning=_TOTAL,
    formula="(1/T) sum_{t<T} G_t <= 2 gap/(gamma T) + gamma L M (1 + gamma L D^2), D = max d_k",
    source="derived here: see the proof at theory.bounds.theorem_a",
    status=Status.PROVED,
    note="Any gamma > 0 and any fixed delays. The delay costs second order in gamma only.",
    step_rule=constant_steps,
    bound=theorem_a,
)

STATEMENTS: dict[str, Statement] = {
    statement.key: statement for statement in (LEMMA1, THEOREM1, THEOREM2, THEOREM_A)
}
