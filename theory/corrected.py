"""Statements about delayed gradients that replace the published ones."""

from theory.delayed_bounds import (
    conjecture,
    lemma1_prime,
    theorem2_prime,
    theorem_a,
    theorem_a_young,
    theorem_d,
    theorem_f,
    theorem_m,
    theorem_v,
)
from theory.hypotheses import (
    DETERMINISTIC_STEPS,
    FIXED_DELAYS,
    FULL_GRADIENTS,
    IID,
    MOMENTUM_DELAYS,
    ONCE_DELAYS,
    REPLAYED,
    SECOND_MOMENT,
    SMOOTH,
    STABLE_STEPS,
    VARIANCE,
    VARIANCE_STEPS,
)
from theory.statement import Scope, Statement, Status, constant_steps, harmonic_steps

_HERE = "derived here: see the proof at theory.delayed_bounds"
_TOTAL = "total expectation over i(0), ..., i(T-1), warm-up included"
_AVERAGE = r"\frac{1}{T} \sum_{t<T} G_t \leq "
_START = r"\frac{2\Delta}{\gamma T}"

LEMMA1_PRIME = Statement(
    key="lemma1-prime",
    title="descent in one step, corrected",
    scope=Scope.STEP_IN_TOTAL,
    hypotheses=(SMOOTH, SECOND_MOMENT, IID, FIXED_DELAYS),
    conditioning="total expectation, for every t >= D",
    formula=(
        "E f(w^{t+1}) - E f(w^t) <= -(gamma/2) G_t + gamma^2 L M C, "
        "C = [K + 2 sum_k d_k + gamma L sum_k d_k (d_k + D)]/2; "
        "DDG: [K^2 + gamma L K (K-1) (5K-4)/6]/2"
    ),
    latex=(
        r"\mathbb{E} f(w^{t+1}) - \mathbb{E} f(w^t) \leq -\frac{\gamma}{2} G_t + "
        r"\frac{\gamma^2 L M}{2} \left[ K + 2 \sum_k d_k + \gamma L \sum_k d_k (d_k + D) \right]"
    ),
    source=f"{_HERE}.lemma1_prime",
    status=Status.PROVED,
    note="Any gamma > 0. K^2 and K^3 gamma L where the paper has K^4.",
    step_rule=constant_steps,
    bound=lemma1_prime,
    after_warm_up=True,
)

THEOREM_A = Statement(
    key="theorem-a",
    title="delayed gradients, constant step size",
    scope=Scope.AVERAGE,
    hypotheses=(SMOOTH, SECOND_MOMENT, IID, ONCE_DELAYS),
    conditioning=_TOTAL,
    formula="(1/T) sum_{t<T} G_t <= 2 gap/(gamma T) + gamma L M (1 + gamma L D^2), D = max d_k",
    latex=_AVERAGE + _START + r" + \gamma L M \left(1 + \gamma L D^2\right)",
    source=f"{_HERE}.theorem_a",
    status=Status.PROVED,
    note="Any gamma > 0. The delay costs second order in gamma only.",
    step_rule=constant_steps,
    bound=theorem_a,
)

THEOREM_A_YOUNG = Statement(
    key="theorem-a-young",
    title="Theorem A with the best Young parameter",
    scope=Scope.AVERAGE,
    hypotheses=THEOREM_A.hypotheses,
    conditioning=_TOTAL,
    formula=(
        "(1/T) sum_{t<T} G_t <= "
        "min_{0<a<2} [gap/(gamma T) + (gamma L M/2) (1 + gamma L D^2/a)] / (1 - a/2)"
    ),
    latex=(
        _AVERAGE + r"\min_{0<a<2} \left[ \frac{\Delta}{\gamma T} + \frac{\gamma L M}{2} "
        r"\left(1 + \frac{\gamma L D^2}{a}\right) \right] \left/ \left(1 - \frac{a}{2}\right)"
        r"\right."
    ),
    source=f"{_HERE}.theorem_a_young",
    status=Status.PROVED,
    note="Half of Theorem A where the delay does not matter; never more.",
    step_rule=constant_steps,
    bound=theorem_a_young,
)

THEOREM_V = Statement(
    key="theorem-v",
    title="delayed gradients with bounded variance",
    scope=Scope.AVERAGE,
    hypotheses=(SMOOTH, VARIANCE, IID, ONCE_DELAYS, VARIANCE_STEPS),
    conditioning=_TOTAL,
    formula="(1/T) sum_{t<T} G_t <= 2 gap/(gamma T) + gamma L s^2 + 2 gamma^2 L^2 D s^2",
    latex=_AVERAGE + _START + r" + \gamma L s^2 + 2 \gamma^2 L^2 D s^2",
    source=f"{_HERE}.theorem_v",
    status=Status.PROVED,
    note="No bound on the gradients. At most 2 gap/(gamma T) + 1.5 gamma L s^2.",
    step_rule=constant_steps,
    bound=theorem_v,
)

THEOREM_D = Statement(
    key="theorem-d",
    title="delayed full gradients",
    scope=Scope.AVERAGE,
    hypotheses=(SMOOTH, FULL_GRADIENTS, ONCE_DELAYS, DETERMINISTIC_STEPS),
    conditioning="none: nothing is random",
    formula="(1/T) sum_{t<T} ||grad f(w^t)||^2 <= gap/(gamma T (1 - gamma L (D + 1/2)))",
    latex=(
        r"\frac{1}{T} \sum_{t<T} \|\nabla f(w^t)\|^2 \leq "
        r"\frac{\Delta}{\gamma T \left(1 - \gamma L (D + 1/2)\right)}"
    ),
    source=f"{_HERE}.theorem_d",
    status=Status.PROVED,
    note="The conjecture c-tau is at least as good, and has the exact limit of gamma.",
    step_rule=constant_steps,
    bound=theorem_d,
)

THEOREM2_PRIME = Statement(
    key="theorem2-prime",
    title="delayed gradients, steps that do not increase",
    scope=Scope.AVERAGE,
    hypotheses=(SMOOTH, SECOND_MOMENT, IID, FIXED_DELAYS),
    conditioning=_TOTAL,
    formula=(
        "(1/Gamma_T) sum_{t<T} gamma_t G_t <= [2 gap + M sum_{t<D} gamma_t + "
        "sum_{t<T} gamma_t^2 L M (1 + gamma_t L D^2)]/Gamma_T, gamma_t = gamma_0/(1 + t) here"
    ),
    latex=(
        r"\sum_{t<T} \gamma_t G_t \leq 2\Delta + M \sum_{t<D} \gamma_t + "
        r"\sum_{t<T} \gamma_t^2 L M \left(1 + \gamma_t L D^2\right)"
    ),
    source=f"{_HERE}.theorem2_prime",
    status=Status.PROVED,
    note="Any steps that do not increase; checked with those of the paper.",
    step_rule=harmonic_steps,
    bound=theorem2_prime,
)

THEOREM_F = Statement(
    key="theorem-f",
    title="replayed or current activations (Features Replay), no sufficient direction",
    scope=Scope.AVERAGE,
    hypotheses=(SMOOTH, IID, REPLAYED),
    conditioning=_TOTAL,
    formula="(1/T) sum_{t<T} G_t <= 2 gap/(gamma T) + gamma L M' + gamma^2 D^2 (L^2 + L'^2) M'",
    latex=_AVERAGE + _START + r" + \gamma L M' + \gamma^2 D^2 (L^2 + L'^2) M'",
    source=f"{_HERE}.theorem_f",
    status=Status.PROVED,
    note="Without a sufficient direction: what replay gets wrong is second order in gamma.",
    step_rule=constant_steps,
    bound=theorem_f,
)

THEOREM_M = Statement(
    key="theorem-m",
    title="delayed gradients with momentum",
    scope=Scope.AVERAGE,
    hypotheses=(SMOOTH, SECOND_MOMENT, IID, MOMENTUM_DELAYS),
    conditioning=_TOTAL,
    formula=(
        "(1/T) sum_{t<T} G_t <= 2 gap/(h T) + h L M (1 + h L (D + beta/(1-beta))^2), "
        "h = gamma/(1-beta)"
    ),
    latex=(
        _AVERAGE + r"\frac{2\Delta}{\eta T} + \eta L M \left(1 + \eta L "
        r"\left(D + \frac{\beta}{1-\beta}\right)^2\right),\quad \eta = \frac{\gamma}{1-\beta}"
    ),
    source=f"{_HERE}.theorem_m",
    status=Status.PROVED,
    note=(
        "Any gamma > 0; beta = 0 is Theorem A. The bound is of the right order, the stable steps "
        "are fewer: at delay 1 momentum shrinks gamma L < 1 to gamma L < 1 - beta "
        "(theory.stability.stable_limit)."
    ),
    step_rule=constant_steps,
    bound=theorem_m,
)

C_TAU = Statement(
    key="c-tau",
    title="the exact worst case of delayed full gradients",
    scope=Scope.AVERAGE,
    hypotheses=(SMOOTH, FULL_GRADIENTS, FIXED_DELAYS, STABLE_STEPS),
    conditioning="none: nothing is random",
    formula=(
        "(1/T) sum_{t<T} ||grad f(w^t)||^2 <= gap/(gamma T c_D(gamma L)), "
        "c_D(x) = cos(phi) tan(pi/4 - (2D+1) phi/2), x = 2 sin(phi)"
    ),
    latex=(
        r"\frac{1}{T} \sum_{t<T} \|\nabla f(w^t)\|^2 \leq \frac{\Delta}{\gamma T c_D(\gamma L)},"
        r"\quad c_D(2 \sin\varphi) = \cos\varphi \tan\left(\frac{\pi}{4} - "
        r"\frac{(2D+1)\varphi}{2}\right)"
    ),
    source="conjectured here; semidefinite programs for D <= 4, T <= 40 agree",
    status=Status.CONJECTURE,
    note="Attained by f = L ||w||^2/2 as T grows. Not proved: try to break it (search c-tau).",
    step_rule=constant_steps,
    bound=conjecture,
)
