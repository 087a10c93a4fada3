"""Published statements, quoted from memory, with what is known about them."""

import math

import numpy as np
import numpy.typing as npt

from theory.hypotheses import (
    DDG_DELAYS,
    IID,
    LIAN_STEPS,
    SECOND_MOMENT,
    SMALL_STEPS,
    SMOOTH,
    SUFFICIENT_DIRECTION,
    UNIFORM_DELAYS,
    VARIANCE,
)
from theory.statement import (
    Constants,
    Scope,
    Statement,
    Status,
    constant_steps,
    harmonic_steps,
    only_step,
)


def delay_constant(num_stages: int, M: float, sigma: float) -> float:
    """Return the DDG paper's M_K = K M + sigma K^4 M.

    >>> delay_constant(2, M=10.0, sigma=1.0)
    180.0
    """
    return num_stages * M + sigma * num_stages**4 * M


def lemma1(constants: Constants, step_sizes: npt.ArrayLike) -> float:
    """Return gamma_t^2 L M_K for the last step t, with sigma = max_t gamma_{max(0,t-K+1)}/gamma_t.

    >>> one = Constants(L=1.0, M=1.0, gap=1.0, delays=(1, 0))
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

    >>> one = Constants(L=1.0, M=1.0, gap=1.0, delays=(0,))
    >>> theorem1(one, [0.5, 0.5, 0.5, 0.5])
    3.0
    """
    gamma, iterations = only_step(step_sizes)
    m_k = delay_constant(constants.num_stages, constants.M, sigma=1.0)
    return 2.0 * constants.gap / (gamma * iterations) + 2.0 * gamma * constants.L * m_k


def theorem2(constants: Constants, step_sizes: npt.ArrayLike) -> float:
    """Return (2 gap + sum_t 2 gamma_t^2 L M_K) / Gamma_T, Gamma_T = sum_t gamma_t, sigma = K.

    Proof, for x = gamma_0 L <= 1 and H = 1 + 1/2 + ... + 1/D (derived here; the paper's goes
    through Lemma 1). If x K^5 >= H, Theorem 2' implies it: M sum_{t<D} gamma_t = M gamma_0 H
    <= L M K^5 gamma_0^2, and 1 + x D^2 <= K^2. Else x H <= H^2/K^5 <= 1/32. With the Young
    parameter 1/2 the proof of Theorem 2' gives sum_t gamma_{t+D} G_t <= (4/3) (gap + N), where
    N = sum_t gamma_t^2 L M (1/2 + x D^2), and E f(v^t) - f* <= gap + N for its virtual iterate;
    so G_t <= 4 L (gap + N) + 2 gamma_t^2 L^2 D^2 M, and what is missing,
    sum_t (gamma_t - gamma_{t+D}) G_t, is at most 4 x H (gap + N) + 2 x D^2 H L M gamma_0^2. In
    all the gap comes at most 4/3 + 1/8 < 2 times, and the rest is below 2 L M K^5 sum gamma_t^2.

    >>> one = Constants(L=1.0, M=1.0, gap=1.0, delays=(0,))
    >>> theorem2(one, [1.0])
    6.0
    """
    gammas = np.asarray(step_sizes, dtype=np.float64)
    m_k = delay_constant(constants.num_stages, constants.M, sigma=float(constants.num_stages))
    noise = 2.0 * constants.L * m_k * math.fsum(gammas**2)
    return (2.0 * constants.gap + noise) / math.fsum(gammas)


def corollary(constants: Constants, step_sizes: npt.ArrayLike) -> float:
    """Return (2 gap + (pi^2/3) gamma_0^2 L M_K) / (gamma_0 ln(1 + T)), sigma = K.

    From Theorem 2 with sum_t gamma_t^2 <= gamma_0^2 pi^2/6 and Gamma_T >= gamma_0 ln(1 + T).

    >>> import math
    >>> one = Constants(L=1.0, M=1.0, gap=1.0, delays=(0,))
    >>> round(corollary(one, [1.0]) * math.log(2) - 2 * math.pi**2 / 3, 12)
    2.0
    """
    gammas = np.asarray(step_sizes, dtype=np.float64)
    m_k = delay_constant(constants.num_stages, constants.M, sigma=float(constants.num_stages))
    noise = math.pi**2 / 3.0 * float(gammas[0]) ** 2 * constants.L * m_k
    return (2.0 * constants.gap + noise) / (float(gammas[0]) * math.log1p(len(gammas)))


def features_replay(constants: Constants, step_sizes: npt.ArrayLike) -> float:
    """Return gap/(sigma gamma T) + gamma L M_g/(2 sigma), for a constant step size.

    Proof. f(w^{t+1}) <= f(w^t) - gamma <grad f(w^t), g^t> + gamma^2 L ||g^t||^2/2 by smoothness.
    Take expectations, use both parts of the hypothesis, sum over t and divide.

    Raises ValueError if the step sizes are not all the same.

    >>> one = Constants(L=1.0, M=1.0, gap=1.0, delays=(0,), sigma=0.5, direction=2.0)
    >>> features_replay(one, [0.5, 0.5])
    3.0
    """
    gamma, iterations = only_step(step_sizes)
    if constants.sigma <= 0:  # the hypothesis fails: nothing follows
        return math.inf
    noise = 0.5 * gamma * constants.L * constants.direction
    return (constants.gap / (gamma * iterations) + noise) / constants.sigma


def lian(constants: Constants, step_sizes: npt.ArrayLike) -> float:
    """Return 2 gap/(gamma N) + gamma L s^2 + 2 gamma^2 L^2 D s^2 for the N = T - D updates.

    Proof. The sample that is applied at t has not been applied before, so it is independent of
    w^t, and E<grad f(w^t), g> = E<grad f(w^t), grad f(w^{t-D})>, half of the two squares less the
    square of their difference. That one is at most L^2 E||w^t - w^{t-D}||^2
    <= 2 gamma^2 L^2 (D s^2 + D sum of the D squares ||grad f(w^{r-D})||^2 before). The squares
    that the summed right side has come with -gamma/2 + gamma^2 L/2 + gamma^3 L^2 D^2 <= 0.

    Raises ValueError if the step sizes are not all the same.

    >>> one = Constants(L=1.0, M=1.0, gap=1.0, delays=(1, 1), variance=1.0)
    >>> lian(one, [0.5, 0.5, 0.5])
    3.0
    """
    gamma, iterations = only_step(step_sizes)
    x = gamma * constants.L
    noise = x * constants.variance * (1.0 + 2.0 * x * constants.max_delay)
    return 2.0 * constants.gap / (gamma * (iterations - constants.max_delay)) + noise


_DDG = "Huo, Gu, Yang, Huang, ICML 2018 (arXiv 1804.10574), statement from memory"
_FR = "Huo, Gu, Huang, NeurIPS 2018 (arXiv 1807.04511), statement from memory"
_LIAN = "Lian, Huang, Li, Liu, NeurIPS 2015 (arXiv 1506.08272), statement from memory"
_TOTAL = "total expectation over i(0), ..., i(T-1), warm-up included"
_PAPER = (SMOOTH, SECOND_MOMENT, IID, DDG_DELAYS, SMALL_STEPS)
_M_K = r"M_K = KM + \sigma K^4 M"
_DESCENT = (
    r"\mathbb{E}[f(w^{t+1}) \mid w^t] - f(w^t) \leq "
    r"-\frac{\gamma_t}{2} \|\nabla f(w^t)\|^2 + \gamma_t^2 L M_K,\quad " + _M_K
)

LEMMA1 = Statement(
    key="lemma1",
    title="DDG, descent in one step",
    scope=Scope.STEP_GIVEN_WEIGHTS,
    hypotheses=_PAPER,
    conditioning="expectation given w^t, for every t >= 0, warm-up included",
    formula=(
        "E[f(w^{t+1}) | w^t] - f(w^t) <= -(gamma_t/2) ||grad f(w^t)||^2 + gamma_t^2 L M_K, "
        "M_K = K M + sigma K^4 M, sigma = max_t gamma_{max(0,t-K+1)}/gamma_t"
    ),
    latex=_DESCENT,
    source=f"{_DDG}: Lemma 1",
    status=Status.REFUTED,
    note=(
        "False given w^t: stage k's update at t uses sample i(t-K+k), which w^t already depends "
        "on through the stages that applied it earlier. False in the warm-up (t < K-1) even in "
        "total expectation: idle stages do not descend. True, and very slack, in total "
        "expectation for t >= K-1 and gamma L <= 1 (Lemma 1' implies it). See "
        "theory.counterexamples."
    ),
    step_rule=constant_steps,
    bound=lemma1,
)

LEMMA1_STEADY = Statement(
    key="lemma1-steady",
    title="DDG, descent in one step once all stages work",
    scope=Scope.STEP_GIVEN_WEIGHTS,
    hypotheses=_PAPER,
    conditioning="expectation given w^t, for every t >= K-1",
    formula=LEMMA1.formula + ", t >= K-1",
    latex=_DESCENT + r",\quad t \geq K-1",
    source=f"{_DDG}: Lemma 1, without the warm-up",
    status=Status.REFUTED,
    note="What is left of Lemma 1 without the warm-up. Still false given w^t, for the same reason.",
    step_rule=constant_steps,
    bound=lemma1,
    after_warm_up=True,
)

INDEPENDENCE = Statement(
    key="independence",
    title="the independence step in the proof of Lemma 1",
    scope=Scope.INNER_PRODUCT,
    hypotheses=(IID, DDG_DELAYS),
    conditioning="total expectation, for every stage k and every t >= d_k",
    formula=(
        "E<grad_k f(w^t), grad_k f_{i(t-d_k)}(w^{t-d_k})> = E<grad_k f(w^t), grad_k f(w^{t-d_k})>"
    ),
    latex=(
        r"\mathbb{E}\langle \nabla_k f(w^t), \nabla_k f_{i(t-d_k)}(w^{t-d_k}) \rangle = "
        r"\mathbb{E}\langle \nabla_k f(w^t), \nabla_k f(w^{t-d_k}) \rangle"
    ),
    source=f"{_DDG}: proof of Lemma 1",
    status=Status.REFUTED,
    note="False: w^t depends on i(t-d_k), which the stages behind k have already applied.",
    step_rule=constant_steps,
    bound=None,
)

THEOREM1 = Statement(
    key="theorem1",
    title="DDG, constant step size",
    scope=Scope.AVERAGE,
    hypotheses=_PAPER,
    conditioning=_TOTAL,
    formula="(1/T) sum_{t<T} G_t <= 2 gap/(gamma T) + 2 gamma L M_K, M_K = K M + K^4 M",
    latex=(
        r"\frac{1}{T} \sum_{t<T} G_t \leq \frac{2\Delta}{\gamma T} + 2 \gamma L M_K,"
        r"\quad M_K = KM + K^4 M"
    ),
    source=f"{_DDG}: Theorem 1",
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
    hypotheses=_PAPER,
    conditioning=_TOTAL,
    formula=(
        "(1/Gamma_T) sum_{t<T} gamma_t G_t <= (2 gap + sum_{t<T} 2 gamma_t^2 L M_K)/Gamma_T, "
        "Gamma_T = sum_{t<T} gamma_t, M_K = K M + K^5 M (sigma = K)"
    ),
    latex=(
        r"\frac{1}{\Gamma_T} \sum_{t<T} \gamma_t G_t \leq \frac{2\Delta}{\Gamma_T} + "
        r"\frac{1}{\Gamma_T} \sum_{t<T} 2 \gamma_t^2 L M_K,\quad M_K = KM + K^5 M"
    ),
    source=f"{_DDG}: Theorem 2",
    status=Status.PAPER_CLAIM,
    note=(
        "True in total expectation (proof at theory.published.theorem2). Vacuous unless gamma L "
        "is tiny. The paper's proof goes through Lemma 1, which is false."
    ),
    step_rule=harmonic_steps,
    bound=theorem2,
)

COROLLARY = Statement(
    key="corollary",
    title="DDG, decreasing steps: the weighted average goes to 0",
    scope=Scope.AVERAGE,
    hypotheses=_PAPER,
    conditioning=_TOTAL,
    formula=(
        "(1/Gamma_T) sum_{t<T} gamma_t G_t <= (2 gap + (pi^2/3) gamma_0^2 L M_K)"
        "/(gamma_0 ln(1 + T)), gamma_t = gamma_0/(1 + t), M_K = K M + K^5 M"
    ),
    latex=(
        r"\frac{1}{\Gamma_T} \sum_{t<T} \gamma_t G_t \leq "
        r"\frac{2\Delta + (\pi^2/3) \gamma_0^2 L M_K}{\gamma_0 \ln(1+T)} \rightarrow 0"
    ),
    source=f"{_DDG}: corollary of Theorem 2; the paper has the limit, the constants are from here",
    status=Status.PAPER_CLAIM,
    note="Follows from Theorem 2, and is weaker. At 1/ln T it says little about any run.",
    step_rule=harmonic_steps,
    bound=corollary,
)

FEATURES_REPLAY = Statement(
    key="features-replay",
    title="Features Replay, constant step size",
    scope=Scope.AVERAGE,
    hypotheses=(SMOOTH, IID, SUFFICIENT_DIRECTION),
    conditioning="total expectation over i(0), ..., i(T-1); sigma and M_g of this very run",
    formula="(1/T) sum_{t<T} G_t <= gap/(sigma gamma T) + gamma L M_g/(2 sigma)",
    latex=(
        r"\frac{1}{T} \sum_{t<T} G_t \leq \frac{\Delta}{\sigma \gamma T} + "
        r"\frac{\gamma L M_g}{2\sigma}"
    ),
    source=f"{_FR}: Theorem 1",
    status=Status.PAPER_CLAIM,
    note=(
        "True whenever its hypothesis is, for any method at all. What is in doubt is the "
        "hypothesis: no sigma > 0 follows from smoothness, and one step in the wrong direction "
        "on average ends it. So sigma is measured: the smallest E<grad f(w^t), g^t>/G_t."
    ),
    step_rule=constant_steps,
    bound=features_replay,
)

LIAN = Statement(
    key="lian",
    title="one delay for all stages, constant step size",
    scope=Scope.AVERAGE,
    hypotheses=(SMOOTH, VARIANCE, IID, UNIFORM_DELAYS, LIAN_STEPS),
    conditioning="total expectation; t counts from D, where the updates begin",
    formula=(
        "(1/N) sum_{D<=t<T} G_t <= 2 gap/(gamma N) + gamma L s^2 + 2 gamma^2 L^2 D s^2, N = T - D"
    ),
    latex=(
        r"\frac{1}{N} \sum_{t=D}^{T-1} G_t \leq \frac{2\Delta}{\gamma N} + \gamma L s^2 + "
        r"2 \gamma^2 L^2 D s^2,\quad N = T - D"
    ),
    source=f"{_LIAN}: Theorem 1 for one sample per update and a constant delay",
    status=Status.PROVED,
    note=(
        "Asynchronous SGD, the statement that DDG's theory descends from. It needs that a sample "
        "reaches all stages at once: with DDG's delays its first step is the independence that "
        "fails."
    ),
    step_rule=constant_steps,
    bound=lian,
    after_warm_up=True,
)
