"""The hypotheses of the statements, each with a test of whether an input meets it."""

import math
from collections.abc import Callable

import numpy as np

from theory.motion import Motion
from theory.protocols import FloatArray
from theory.stability import stable_limit
from theory.statement import Constants, Hypothesis

#: Relative slack of comparisons between constants that were computed with rounding.
SLACK = 1e-12


def _holds(motion: Motion, constants: Constants, gammas: FloatArray) -> str | None:
    return None  # by construction of every problem, or of the paths that are run


def _finite(name: str, attribute: str) -> Callable[[Motion, Constants, FloatArray], str | None]:
    def deviation(motion: Motion, constants: Constants, gammas: FloatArray) -> str | None:
        value = getattr(constants, attribute)
        return None if math.isfinite(value) else f"{name} = {value}"

    return deviation


def _form(attribute: str) -> Callable[[Motion, Constants, FloatArray], str | None]:
    """Ask the motion for its form, without momentum."""

    def deviation(motion: Motion, constants: Constants, gammas: FloatArray) -> str | None:
        if motion.momentum:
            return f"momentum {motion.momentum:g}"
        return _raised(motion, attribute)

    return deviation


def _raised(motion: Motion, attribute: str) -> str | None:
    try:
        getattr(motion, attribute)
    except ValueError as error:
        return str(error)
    return None


def _ddg_delays(motion: Motion, constants: Constants, gammas: FloatArray) -> str | None:
    reason = _form("fixed_delays")(motion, constants, gammas)
    wanted = tuple(range(constants.num_stages - 1, -1, -1))
    if reason is None and motion.fixed_delays != wanted:
        return f"d = {motion.fixed_delays}"
    return reason


def _uniform_delays(motion: Motion, constants: Constants, gammas: FloatArray) -> str | None:
    reason = _form("fixed_delays")(motion, constants, gammas)
    if reason is None and len(set(motion.fixed_delays)) > 1:
        return f"d = {motion.fixed_delays}"
    return reason


def _momentum_delays(motion: Motion, constants: Constants, gammas: FloatArray) -> str | None:
    return _raised(motion, "fixed_delays")


def _small_steps(motion: Motion, constants: Constants, gammas: FloatArray) -> str | None:
    largest = _largest(constants, gammas)
    return None if largest <= 1.0 + SLACK else f"gamma_0 L = {largest:.6g}"


def _variance_steps(motion: Motion, constants: Constants, gammas: FloatArray) -> str | None:
    largest, limit = _largest(constants, gammas), 0.5 / (2 * constants.max_delay + 1)
    return None if largest <= limit * (1 + SLACK) else f"gamma L = {largest:.6g} > {limit:.6g}"


def _deterministic_steps(motion: Motion, constants: Constants, gammas: FloatArray) -> str | None:
    largest, limit = _largest(constants, gammas), 2.0 / (2 * constants.max_delay + 1)
    return None if largest < limit * (1 - SLACK) else f"gamma L = {largest:.6g}, not < {limit:.6g}"


def _stable_steps(motion: Motion, constants: Constants, gammas: FloatArray) -> str | None:
    largest, limit = _largest(constants, gammas), float(stable_limit(constants.max_delay))
    return None if largest < limit * (1 - SLACK) else f"gamma L = {largest:.6g}, not < {limit:.6g}"


def _lian_steps(motion: Motion, constants: Constants, gammas: FloatArray) -> str | None:
    x = _largest(constants, gammas)
    found = x + 2.0 * (x * constants.max_delay) ** 2
    return None if found <= 1.0 + SLACK else f"{found:.6g} > 1"


def _full_gradients(motion: Motion, constants: Constants, gammas: FloatArray) -> str | None:
    return None if constants.variance == 0 else f"s^2 = {constants.variance:.6g}"


def _sufficient(motion: Motion, constants: Constants, gammas: FloatArray) -> str | None:
    if motion.momentum:
        return f"momentum {motion.momentum:g}"
    # nan: nothing has been measured yet, or there was no gradient to measure it against.
    return f"measured sigma = {constants.sigma:.6g}" if constants.sigma <= 0 else None


def _largest(constants: Constants, gammas: FloatArray) -> float:
    return float(np.max(gammas)) * constants.L


SMOOTH = Hypothesis("||grad f(x) - grad f(y)|| <= L ||x - y|| for all x, y", _finite("L", "L"))
SECOND_MOMENT = Hypothesis("(1/n) sum_i ||grad f_i(w)||^2 <= M for all w", _finite("M", "M"))
VARIANCE = Hypothesis(
    "(1/n) sum_i ||grad f_i(w) - grad f(w)||^2 <= s^2 for all w", _finite("s^2", "variance")
)
IID = Hypothesis("i(0), i(1), ... independent, uniform on the n samples", _holds)
FULL_GRADIENTS = Hypothesis("f_i = f: the gradients are full", _full_gradients)
DDG_DELAYS = Hypothesis(
    "w_k^{t+1} = w_k^t - gamma_t grad_k f_{i(t-d_k)}(w^{t-d_k}), d_k = K - k, idle if t < d_k",
    _ddg_delays,
)
FIXED_DELAYS = Hypothesis(
    "w_k^{t+1} = w_k^t - gamma_t grad_k f_{i(t-d_k)}(w^{t-d_k}), d_k fixed, idle if t < d_k",
    _form("fixed_delays"),
)
UNIFORM_DELAYS = Hypothesis(
    "w^{t+1} = w^t - gamma grad f_{i(t-D)}(w^{t-D}), the same D for all stages, idle if t < D",
    _uniform_delays,
)
ONCE_DELAYS = Hypothesis(
    "w_k^{t+1} = w_k^t - gamma grad_k f_{i(s)}(w^s) or w_k^t: every stage applies every sample s "
    "once, at a tick from s to s + D (fixed delays d_k, for one)",
    _form("once_delays"),
)
MOMENTUM_DELAYS = Hypothesis(
    "v_k^{t+1} = beta v_k^t + grad_k f_{i(t-d_k)}(w^{t-d_k}), w_k^{t+1} = w_k^t - gamma v_k^{t+1}, "
    "0 <= beta < 1, d_k fixed, idle if t < d_k",
    _momentum_delays,
)
REPLAYED = Hypothesis(
    "w_k^{t+1} = w_k^t - gamma u_k^{t-d_k}, d_k fixed, idle if t < d_k; u_k^q depends on i(0..q), "
    "E||u^q||^2 <= M' and "
    "||u^q - grad f_{i(q)}(w^q)||^2 <= L'^2 sum_k max_{p<=d_k} ||w_k^{q+p} - w_k^q||^2",
    lambda motion, constants, gammas: (
        _form("replayed_delays")(motion, constants, gammas)
        or _finite("the problem's L'", "replay_L")(motion, constants, gammas)
        or _finite("M'", "replay_M")(motion, constants, gammas)
    ),
)
SMALL_STEPS = Hypothesis("gamma_t L <= 1 for every t", _small_steps)
VARIANCE_STEPS = Hypothesis("gamma L <= 1/(2 (2D + 1))", _variance_steps)
DETERMINISTIC_STEPS = Hypothesis("gamma L < 2/(2D + 1)", _deterministic_steps)
STABLE_STEPS = Hypothesis("gamma L < 2 sin(pi/(2 (2D + 1)))", _stable_steps)
LIAN_STEPS = Hypothesis("gamma L + 2 (gamma L D)^2 <= 1", _lian_steps)
SUFFICIENT_DIRECTION = Hypothesis(
    "E<grad f(w^t), g^t> >= sigma G_t and E||g^t||^2 <= M_g for every t, g^t = "
    "(w^t - w^{t+1})/gamma, sigma > 0 (both measured along the run, not assumed)",
    _sufficient,
)
