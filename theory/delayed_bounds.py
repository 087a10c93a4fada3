"""Right sides of the statements of `theory.corrected`, each with its proof in the docstring.

Proofs use the virtual iterate v^0 = w^0, v^{t+1} = v^t - gamma grad f_{i(t)}(w^t), which takes all
blocks of a sample at once. v^t and w^t depend on i(0..t-1) only. Their difference e_t = v^t - w^t
is what has been sampled but not applied: block k is -gamma times the sum of at most D of the last D
gradients' blocks, in the warm-up too. By Cauchy-Schwarz, regrouped by sample,
||e_t||^2 <= gamma^2 D sum_{p=1}^{D} ||grad f_{i(t-p)}(w^{t-p})||^2. (With delays that change,
samples that overtake each other make no difference as long as each is applied once, in time.)
"""

import math

import numpy as np
import numpy.typing as npt

from theory.stability import c_tau
from theory.statement import Constants, only_step


def theorem_a(constants: Constants, step_sizes: npt.ArrayLike) -> float:
    """Return 2 gap/(gamma T) + gamma L M (1 + gamma L D^2), for a constant step size.

    Proof. Smoothness at v^t and E[grad f_{i(t)}(w^t) | i(0..t-1)] = grad f(w^t) give
    E f(v^{t+1}) <= E f(v^t) - gamma E<grad f(v^t), grad f(w^t)> + gamma^2 L M / 2. With
    -<a, b> <= -||b||^2/2 + ||a - b||^2/2 the middle term is at most
    -(gamma/2) G_t + (gamma/2) L^2 E||e_t||^2, and E||e_t||^2 <= gamma^2 D^2 M. Sum over t and use
    f(v^T) >= f*.

    Raises ValueError if the step sizes are not all the same.

    >>> one = Constants(L=1.0, M=1.0, gap=1.0, delays=(2, 1, 0))
    >>> theorem_a(one, [0.5, 0.5, 0.5, 0.5])
    2.5
    """
    gamma, iterations = only_step(step_sizes)
    x = gamma * constants.L
    noise = x * constants.M * (1.0 + x * constants.max_delay**2)
    return 2.0 * constants.gap / (gamma * iterations) + noise


def theorem_a_young(constants: Constants, step_sizes: npt.ArrayLike) -> float:
    """Return min_a [gap/(gamma T) + (gamma L M/2)(1 + gamma L D^2/a)] / (1 - a/2), 0 < a < 2.

    Proof. As Theorem A (which is a = 1), but -<a', b> <= -(1 - a/2)||b||^2 + ||a' - b||^2/(2a).
    The right side does not depend on the run, so the best a may be taken: with p + q/a over
    1 - a/2 it solves p a^2/2 + q a = q. Without delay q = 0, a -> 0, and the classical bound
    gap/(gamma T) + gamma L M/2 is left.

    Raises ValueError if the step sizes are not all the same.

    >>> one = Constants(L=1.0, M=1.0, gap=1.0, delays=(0,))
    >>> theorem_a_young(one, [0.5, 0.5, 0.5, 0.5])
    0.75
    """
    gamma, iterations = only_step(step_sizes)
    x = gamma * constants.L
    p = constants.gap / (gamma * iterations) + 0.5 * x * constants.M
    q = 0.5 * (x * constants.max_delay) ** 2 * constants.M
    if q == 0:
        return p
    # The root (sqrt(q^2 + 2 p q) - q)/p in a form that does not cancel.
    a = 2.0 * q / (q + math.sqrt(q * q + 2.0 * p * q))
    return (p + q / a) / (1.0 - 0.5 * a)


def theorem_v(constants: Constants, step_sizes: npt.ArrayLike) -> float:
    """Return 2 gap/(gamma T) + gamma L s^2 + 2 gamma^2 L^2 D s^2, for a constant step size.

    Proof. As Theorem A with E_i||grad f_i||^2 <= ||grad f||^2 + s^2 and
    -<grad f(v), grad f(w)> <= -||grad f(w)||^2 + L ||e_t|| ||grad f(w)||, where e_t = e' + e'' is
    split into the parts of grad f and of the noise. L ||e'|| ||grad f||
    <= (gamma L D/2)||grad f||^2 + L ||e'||^2/(2 gamma D) and sum E||e'_t||^2 <= gamma^2 D^2
    sum G_t; L ||e''|| ||grad f|| <= ||grad f||^2/4 + L^2 ||e''||^2 and E||e''_t||^2
    <= gamma^2 D s^2, for the noise of different samples is orthogonal. What is left,
    1 - gamma L/2 - gamma L D - 1/4, is at least 1/2. The last term is at most gamma L s^2/2.

    Raises ValueError if the step sizes are not all the same.

    >>> one = Constants(L=1.0, M=9.0, gap=1.0, delays=(1, 0), variance=4.0)
    >>> theorem_v(one, [0.125] * 16)
    1.625
    """
    gamma, iterations = only_step(step_sizes)
    x = gamma * constants.L
    noise = x * constants.variance * (1.0 + 2.0 * x * constants.max_delay)
    return 2.0 * constants.gap / (gamma * iterations) + noise


def theorem_d(constants: Constants, step_sizes: npt.ArrayLike) -> float:
    """Return gap/(gamma T (1 - gamma L (D + 1/2))), for a constant step size.

    Proof. With g_t = grad f(w^t), f(v^{t+1}) <= f(v^t) - gamma ||g_t||^2 + gamma L ||e_t|| ||g_t||
    + gamma^2 L ||g_t||^2/2 and ||e_t|| <= gamma sum_{p=1}^{D} ||g_{t-p}||, so the third term is at
    most gamma^2 L sum_p (||g_{t-p}||^2 + ||g_t||^2)/2, and gamma^2 L D sum ||g_t||^2 in all.

    Raises ValueError if the step sizes are not all the same.

    >>> one = Constants(L=1.0, M=9.0, gap=1.0, delays=(1, 0), variance=0.0)
    >>> theorem_d(one, [0.5] * 8)
    1.0
    """
    gamma, iterations = only_step(step_sizes)
    damping = 1.0 - gamma * constants.L * (constants.max_delay + 0.5)
    return constants.gap / (gamma * iterations * damping) if damping > 0 else math.inf


def theorem2_prime(constants: Constants, step_sizes: npt.ArrayLike) -> float:
    """Return (2 gap + M sum_{t<D} gamma_t + sum gamma_t^2 L M (1 + gamma_t L D^2)) / Gamma_T.

    Proof. Block k of sample t moves by gamma_{t+d_k} <= gamma_t (after T: any steps that do not
    increase). So does block k of the virtual iterate here, and Theorem A's proof, block by block,
    gives sum_t sum_k gamma_{t+d_k} E||grad_k f(w^t)||^2 <= 2 gap + sum_t gamma_t^2 L M (1 +
    gamma_t L D^2), because every step in e_t is at most gamma_t. The left side is at least
    sum_t gamma_{t+D} G_t, and sum_t (gamma_t - gamma_{t+D}) G_t <= M sum_{t<D} gamma_t.

    >>> one = Constants(L=1.0, M=1.0, gap=1.0, delays=(1, 0))
    >>> theorem2_prime(one, [1.0])
    5.0
    """
    gammas = np.asarray(step_sizes, dtype=np.float64)
    x = gammas * constants.L
    late = math.fsum(gammas[: constants.max_delay])
    noise = math.fsum(gammas * x * (1.0 + x * constants.max_delay**2))
    return (2.0 * constants.gap + constants.M * (late + noise)) / math.fsum(gammas)


def lemma1_prime(constants: Constants, step_sizes: npt.ArrayLike) -> float:
    """Return gamma^2 L M C, C = [K + 2 sum_k d_k + gamma L sum_k d_k (d_k + D)]/2.

    With DDG's delays C = [K^2 + gamma L K (K-1) (5K-4)/6]/2.

    Proof. For s = t - d_k, b_t = grad_k f(w^t), g = grad_k f_{i(s)}(w^s) and its mean b_s given
    i(0..s-1): -<b_t, g> = -<b_t, b_s> - <b_t, g - b_s>. The first is at most
    -(||b_t||^2 + ||b_s||^2)/2 + ||b_t - b_s||^2/2, with ||b_t - b_s|| <= L ||w^t - w^s||. From s
    to t, block j applies d_k samples' blocks; regrouped, these are parts of d_k + D samples, so
    E||w^t - w^s||^2 <= gamma^2 d_k (d_k + D) M. In the second, b_t may be replaced by its
    difference from grad_k f(u), u = w^s plus what samples before s do until t, which is
    independent of i(s). w^t - u are parts of samples s..t-1, so E||w^t - u||^2
    <= gamma^2 d_k^2 M and |E<b_t, g - b_s>| <= L gamma d_k M. Together with
    (gamma^2 L/2) sum_k E||g||^2 <= gamma^2 L M K/2 from smoothness, this is the claim.

    Raises ValueError if the step sizes are not all the same.

    >>> one = Constants(L=1.0, M=1.0, gap=1.0, delays=(1, 0))
    >>> lemma1_prime(one, [0.5, 0.5])  # (1/4) [4 + 2 6/12]/2
    0.625
    """
    gamma, _ = only_step(step_sizes)
    x = gamma * constants.L
    late = sum(d * (d + constants.max_delay) for d in constants.delays)
    bracket = constants.num_stages + 2 * sum(constants.delays) + x * late
    return 0.5 * gamma * x * constants.M * bracket


def theorem_f(constants: Constants, step_sizes: npt.ArrayLike) -> float:
    """Return 2 gap/(gamma T) + gamma L M' + gamma^2 D^2 (L^2 + L'^2) M', for constant steps.

    Proof. Let v^{t+1} = v^t - gamma u^t. u^q depends on i(0..q) only: the weights of stage j that
    enter it, at most w_j^{q+d_j}, have had no later sample than q - 1. So v^t depends on i(0..t-1)
    and E<grad f(v^t), u^t> = E<a, b> + E<a, r> with a = grad f(v^t), b = grad f(w^t) and
    r = u^t - grad f_{i(t)}(w^t). -<a, b> - <a, r> <= (||a-b||^2 - ||a||^2 - ||b||^2)/2 +
    (||a||^2 + ||r||^2)/2 = -||b||^2/2 + ||a-b||^2/2 + ||r||^2/2. As in Theorem A
    E||a-b||^2 <= L^2 gamma^2 D^2 M'; E||r||^2 <= L'^2 gamma^2 D^2 M', for w_k^{t+p} - w_k^t is
    made of the blocks of p <= d_k of the samples t-d_k..t-1.

    Raises ValueError if the step sizes are not all the same.

    >>> one = Constants(L=1.0, M=1.0, gap=1.0, delays=(1, 0), replay_L=2.0, replay_M=1.0)
    >>> theorem_f(one, [0.5] * 4)
    2.75
    """
    gamma, iterations = only_step(step_sizes)
    x = gamma * constants.L
    late = (gamma * constants.max_delay) ** 2 * (constants.L**2 + constants.replay_L**2)
    return 2.0 * constants.gap / (gamma * iterations) + (x + late) * constants.replay_M


def theorem_m(constants: Constants, step_sizes: npt.ArrayLike) -> float:
    """Return 2 gap/(h T) + h L M (1 + h L (D + beta/(1 - beta))^2), h = gamma/(1 - beta).

    Proof. z^t = w^t + beta/(1 - beta) (w^t - w^{t-1}) moves by -h times the gradients that are
    applied at t, so the virtual iterate v^{t+1} = v^t - h grad f_{i(t)}(w^t) is z^t plus what is
    under way, and block k of v^t - w^t is -h sum_{p>=1} c_p grad_k f_{i(t-p)}(w^{t-p}) with
    c_p = 1 for p <= d_k and beta^{p-d_k} after. The c_p sum to at most D + beta/(1 - beta) =: B
    and are largest for d_k = D, so by Cauchy-Schwarz with weights c_p, E||v^t - w^t||^2
    <= h^2 B^2 M. The rest is Theorem A's proof with h and B in place of gamma and D.

    Raises ValueError if the step sizes are not all the same.

    >>> one = Constants(L=1.0, M=1.0, gap=1.0, delays=(1, 0), momentum=0.5)
    >>> theorem_m(one, [0.25] * 4)  # h = 1/2, B = 2
    2.5
    """
    gamma, iterations = only_step(step_sizes)
    beta = constants.momentum
    h = gamma / (1.0 - beta)
    x, late = h * constants.L, constants.max_delay + beta / (1.0 - beta)
    return 2.0 * constants.gap / (h * iterations) + x * constants.M * (1.0 + x * late**2)


def conjecture(constants: Constants, step_sizes: npt.ArrayLike) -> float:
    """Return gap/(gamma T c_tau(gamma L)) with tau = D, see `theory.stability.c_tau`.

    Not proved. f = L ||w||^2/2 with all stages delayed by D comes arbitrarily close as T grows.

    Raises ValueError if the step sizes are not all the same.

    >>> one = Constants(L=1.0, M=1.0, gap=1.0, delays=(0,), variance=0.0)
    >>> round(conjecture(one, [1.0, 1.0]), 12)
    1.0
    """
    gamma, iterations = only_step(step_sizes)
    damping = float(c_tau(gamma * constants.L, constants.max_delay))
    return constants.gap / (gamma * iterations * damping) if damping else math.inf
