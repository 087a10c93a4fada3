"""Exact answers for delayed gradient steps on quadratics: limits, rates, sums, second moments.

The scalar recursion is w_{t+1} = w_t + beta (w_t - w_{t-1}) - x w_{t-delay}, with x = gamma L and
w_t = 0 for t < 0: nothing is applied before the first gradient has come. Everything takes arrays
and broadcasts. A stage k of a quadratic f(w) = w.A w/2 follows
w_k^{t+1} = w_k^t + beta (w_k^t - w_k^{t-1}) - gamma (A w^{t-d_k})_k.
"""

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq

from theory.protocols import FloatArray

#: Bisections of an interval of length pi until it is below the spacing of 64-bit numbers.
_BISECTIONS = 55
#: Steps between the rates tried in the search for the first unstable one, relative.
_SCAN = 0.01
#: Eigenvalues of A below this multiple of the largest count as zero.
_RANK = 1e-13


def c_tau(x: npt.ArrayLike, tau: npt.ArrayLike) -> FloatArray:
    """Return c_tau(x) = cos(phi) tan(pi/4 - (2 tau + 1) phi/2) with x = 2 sin(phi).

    It falls from 1 at x = 0 to 0 at the stability limit, and is 0 from there on. The squares of
    the recursion add up to 1/(2 x c_tau(x)) (`energy`), its stationary variance follows
    (`stationary_gradient`), and the conjectured worst case of smooth functions is
    (1/T) sum_t ||grad f(w^t)||^2 <= (f(w^0) - f*)/(gamma T c_tau(gamma L)).

    Derived here: by Parseval, the sum is the mean of 1/|e^{i theta} - 1 + x e^{-i tau theta}|^2
    over the circle, which has this closed form. c_0 = 1 - x/2,
    c_1 = (1 - x)(2 + x)/(2 (1 + x)).

    Raises ValueError if an x is negative or a delay is no integer >= 0.

    >>> c_tau([0.5, 0.5, 0.5], [0, 1, 2]).round(6).tolist()
    [0.75, 0.416667, 0.15]
    """
    x, tau = _checked(x, tau)
    phi = np.arcsin(0.5 * np.minimum(x, 2.0))
    angle = 0.25 * np.pi - (tau + 0.5) * phi
    return np.where(angle > 0, np.cos(phi) * np.tan(np.maximum(angle, 0.0)), 0.0)


def stable_limit(delay: npt.ArrayLike, momentum: npt.ArrayLike = 0.0) -> FloatArray:
    """Return the x below which the recursion is stable: it is for 0 < x < limit only.

    2 sin(theta/2) sqrt(1 - 2 beta cos(theta) + beta^2) with theta the root of
    (delay + 1/2) theta + arctan(beta sin(theta)/(1 - beta cos(theta))) = pi/2. Without momentum
    this is 2 sin(pi/(2 (2 delay + 1))); without delay 2 (1 + beta); with delay 1 it is 1 - beta:
    once gradients are late, momentum shrinks the region.

    The same number holds for stages with delays d_k <= delay, on every quadratic with
    0 <= A <= L: gamma L < limit(D, beta) suffices, and for some A it is necessary. Proof. Let z
    be an eigenvalue of the recursion, |z| = 1, z = e^{i theta}, 0 < theta <= pi, u = A w != 0 for
    its vector w. Then w_k = -gamma u_k/g_k with g_k = (z - 1)(z - beta) z^{d_k - 1}, and
    u*w = w*Aw >= |u|^2/L, so some convex combination of the numbers -1/g_k is real and at least
    1/(gamma L). They lie on one circle, at the angles pi/2 - (d_k + 1/2) theta - arctan(...),
    all inside (0, pi/2) while theta is below the root for D: no combination is real. From the
    root on, |1/g_k| <= 1/limit, because |g_k| grows with theta. So no eigenvalue reaches the
    circle before gamma L = limit, and A = L in the most delayed stage reaches it there.

    Source: the scalar case is classical (Levin and May 1976); momentum and stages derived here.
    Raises ValueError if a delay is no integer >= 0 or a momentum is outside [0, 1).

    >>> stable_limit([0, 1, 2]).round(6).tolist(), stable_limit([0, 1], 0.9).round(6).tolist()
    ([2.0, 1.0, 0.618034], [3.8, 0.1])
    """
    _, delay = _checked(0.0, delay)
    beta = _momentum(momentum)
    low, high = np.broadcast_arrays(0.0 * delay * beta, np.pi + 0.0 * delay * beta)
    for _ in range(_BISECTIONS):  # the left side grows with theta, for every beta < 1
        theta = 0.5 * (low + high)
        turned = np.arctan2(beta * np.sin(theta), 1.0 - beta * np.cos(theta))
        stays = (delay + 0.5) * theta + turned < 0.5 * np.pi
        low, high = np.where(stays, theta, low), np.where(stays, high, theta)
    theta = 0.5 * (low + high)
    squared = 1.0 - 2.0 * beta * np.cos(theta) + beta**2
    limit: FloatArray = 2.0 * np.sin(0.5 * theta) * np.sqrt(squared)
    return limit


def fastest(delay: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Return the x with the fastest decay, tau^tau/(tau+1)^(tau+1), and its rate tau/(tau+1).

    The rate is the largest |eigenvalue|: w_t falls like rate^t. At this x two eigenvalues meet.
    Derived here: z^(tau+1) - z^tau + x has a double root where (tau + 1) z = tau.

    >>> x, rate = fastest([0, 1, 2])
    >>> x.round(6).tolist(), rate.round(6).tolist()
    ([1.0, 0.25, 0.148148], [0.0, 0.5, 0.666667])
    """
    _, tau = _checked(0.0, delay)
    rate = tau / (tau + 1.0)
    return rate**tau / (tau + 1.0), rate


def energy(x: npt.ArrayLike, delay: npt.ArrayLike) -> FloatArray:
    """Return sum_{t >= 0} w_t^2 = 1/(2 x c_tau(x)) from w_0 = 1, infinite where unstable.

    >>> energy([0.5, 1.0, 2.0], 0).round(6).tolist()
    [1.333333, 1.0, inf]
    """
    with np.errstate(divide="ignore"):
        return 1.0 / (2.0 * np.asarray(x, dtype=np.float64) * c_tau(x, delay))


def stationary_gradient(
    x: npt.ArrayLike, delay: npt.ArrayLike, variance: npt.ArrayLike
) -> FloatArray:
    """Return the limit of E||grad f(w^t)||^2 = gamma L s^2/(2 c_tau(gamma L)), x = gamma L.

    f = L ||w||^2/2, every gradient with independent noise of E||noise||^2 = s^2 = ``variance``.

    >>> stationary_gradient(0.5, [0, 1], variance=3.0).round(6).tolist()
    [1.0, 1.8]
    """
    x = np.asarray(x, dtype=np.float64)
    return x**2 * np.asarray(variance, dtype=np.float64) * energy(x, delay)


def spectral_radius(
    matrix: npt.ArrayLike,
    delays: npt.ArrayLike,
    gamma: npt.ArrayLike,
    momentum: float = 0.0,
) -> FloatArray:
    """Return the largest |eigenvalue| of the recursion of A w on f(w) = w.A w/2.

    The gradients go to zero like radius^t; directions in which f is flat do not count.

    Args:
        matrix: A, symmetric and positive semi-definite, (dim, dim).
        delays: of each coordinate, (dim,); those of a stage are the same.
        gamma: step sizes, any shape; the answer has it too.
        momentum: beta in [0, 1).

    Raises:
        ValueError: naming the argument, for other shapes or values.

    >>> import numpy as np
    >>> spectral_radius(np.eye(2), [1, 0], [0.25, 1.0]).round(6).tolist()
    [0.75, 1.0]
    """
    return _radius(_gradient_lags(matrix, delays), gamma, momentum)


def quadratic_limit(matrix: npt.ArrayLike, delays: npt.ArrayLike, momentum: float = 0.0) -> float:
    """Return the smallest step size at which f(w) = w.A w/2 becomes unstable.

    Arguments and errors as for `spectral_radius`; infinite if A = 0. The search begins at
    stable_limit(D)/lambda_max(A), which is safe, and goes up by 1 % at a time: an unstable
    interval shorter than that would be missed. The end is then exact up to rounding.

    >>> import numpy as np
    >>> round(quadratic_limit(np.eye(2), [1, 0]), 9)  # the first coordinate's: 1
    1.0
    >>> round(quadratic_limit(np.ones((2, 2)), [1, 0]), 9)  # coupled: not 1/lambda_max = 1/2
    1.0
    """
    lags = _gradient_lags(matrix, delays)
    if not lags.size:
        return np.inf
    largest = float(np.linalg.eigvalsh(lags.sum(axis=0))[-1])
    gamma = float(stable_limit(len(lags) - 1, momentum)) / largest * (1.0 - 1e-9)

    def excess(step: float) -> float:
        return float(_radius(lags, step, momentum)) - 1.0

    while excess(gamma * (1.0 + _SCAN)) <= 0.0:
        gamma *= 1.0 + _SCAN
    return float(brentq(excess, gamma, gamma * (1.0 + _SCAN), xtol=1e-15 * gamma, rtol=1e-14))


def quadratic_mean_squares(
    matrix: npt.ArrayLike,
    delays: npt.ArrayLike,
    start: npt.ArrayLike,
    noise: npt.ArrayLike,
    step_sizes: npt.ArrayLike,
) -> FloatArray:
    """Return G_t = E||A w^t||^2 for t = 0..T-1 by the recursion of second moments.

    grad f_i(w) = A w + xi_i; the same xi_i(s) reaches every coordinate, each after its own delay.
    The state is w^t with the last D gradients, which are linear in the state before and in one
    fresh, independent xi: its second moments S follow S <- F S F^T + E noise E^T.

    Args:
        matrix: A, symmetric (here it need not be semi-definite), (dim, dim).
        delays: of each coordinate, (dim,).
        start: w^0, (dim,).
        noise: the covariance of xi, (dim, dim).
        step_sizes: gamma_t, (..., T).

    Raises:
        ValueError: naming the argument, for other shapes or values.

    >>> quadratic_mean_squares([[1.0]], [0], [1.0], [[4.0]], [0.5, 0.5, 0.5]).tolist()
    [1.0, 1.25, 1.3125]
    """
    a, d = _matrix(matrix, delays)
    w0, cov = np.asarray(start, dtype=np.float64), np.asarray(noise, dtype=np.float64)
    gammas = np.asarray(step_sizes, dtype=np.float64)
    dim, depth = len(a), int(d.max())
    if w0.shape != (dim,):
        raise ValueError(f"start has shape {w0.shape}, the matrix asks for {(dim,)}")
    if cov.shape != a.shape:
        raise ValueError(f"noise has shape {cov.shape}, the matrix asks for {a.shape}")
    # The state: w, then the gradients of 1, 2, ..., D iterations ago.
    size = dim * (depth + 1)
    shift = np.eye(size, k=-dim)
    shift[:dim] = np.eye(dim, size)
    shift[dim : 2 * dim] = np.pad(a, ((0, 0), (0, size - dim)))[: size - dim]
    fresh = np.zeros((size, dim))
    fresh[dim : 2 * dim] = np.eye(dim)[: size - dim]
    # What an update takes from the state, and from the newest sample's noise.
    used, direct = np.zeros((size, size)), np.zeros((size, dim))
    for k, delay in enumerate(d):
        if delay:
            used[k, dim * delay + k] = 1.0
        else:
            used[k, :dim], direct[k, k] = a[k], 1.0
    state = np.concatenate((w0, np.zeros(dim * depth)))
    second = np.broadcast_to(np.outer(state, state), (*gammas.shape[:-1], size, size))
    found = np.empty(gammas.shape)
    for t in range(gammas.shape[-1]):
        found[..., t] = np.trace(a @ second[..., :dim, :dim] @ a, axis1=-2, axis2=-1)
        gamma = gammas[..., t, None, None]
        step, entry = shift - gamma * used, fresh - gamma * direct
        second = step @ second @ _t(step) + entry @ cov @ _t(entry)
    return found


def _gradient_lags(matrix: npt.ArrayLike, delays: npt.ArrayLike) -> FloatArray:
    """Return M_0..M_D, (D + 1, r, r): y = B^T w follows y^{t+1} = y^t - gamma sum_d M_d y^{t-d}.

    A = B B^T with r = rank A columns, and M_d = the sum of b_k^T b_k over the rows with delay d.
    """
    a, d = _matrix(matrix, delays)
    values, vectors = np.linalg.eigh(a)
    if values[0] < -_RANK * max(1.0, abs(values[-1])) * len(a):
        raise ValueError(f"matrix must be positive semi-definite, has eigenvalue {values[0]:.6g}")
    kept = values > _RANK * max(values[-1], 0.0) * len(a)
    rows = vectors[:, kept] * np.sqrt(values[kept])
    return np.stack([rows[d == lag].T @ rows[d == lag] for lag in range(int(d.max()) + 1)])


def _radius(lags: FloatArray, gamma: npt.ArrayLike, momentum: float) -> FloatArray:
    beta = float(_momentum(momentum))
    gammas = np.asarray(gamma, dtype=np.float64)
    size = lags.shape[1]
    if not size:
        return np.zeros(gammas.shape)
    depth = max(len(lags), 2 if beta else 1)
    companion = np.zeros((*gammas.shape, depth * size, depth * size))
    for lag, part in enumerate(lags):
        companion[..., :size, lag * size : (lag + 1) * size] = -gammas[..., None, None] * part
    companion[..., :size, :size] += (1.0 + beta) * np.eye(size)
    if beta:
        companion[..., :size, size : 2 * size] -= beta * np.eye(size)
    companion[..., size:, :-size] = np.eye((depth - 1) * size)
    radius: FloatArray = np.abs(np.linalg.eigvals(companion)).max(axis=-1)
    return radius


def _matrix(matrix: npt.ArrayLike, delays: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    a, d = np.asarray(matrix, dtype=np.float64), np.asarray(delays)
    if a.ndim != 2 or a.shape[0] != a.shape[1] or not a.size or not np.isfinite(a).all():
        raise ValueError(f"matrix must be square and finite, got shape {a.shape}")
    if np.abs(a - a.T).max() > 1e-12 * np.abs(a).max():
        raise ValueError("matrix must be symmetric")
    if d.shape != (len(a),):
        raise ValueError(f"delays has shape {d.shape}, the matrix asks for {(len(a),)}")
    return a, _checked(0.0, d)[1].astype(np.int64)


def _checked(x: npt.ArrayLike, delay: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    x, delay = np.asarray(x, dtype=np.float64), np.asarray(delay, dtype=np.float64)
    if not np.all(x >= 0):
        raise ValueError(f"x must be at least 0, got {x}")
    if not np.all((delay >= 0) & (delay == np.floor(delay)) & np.isfinite(delay)):
        raise ValueError(f"delay must be an integer of at least 0, got {delay}")
    return x, delay


def _momentum(momentum: npt.ArrayLike) -> FloatArray:
    beta = np.asarray(momentum, dtype=np.float64)
    if not np.all((beta >= 0) & (beta < 1)):
        raise ValueError(f"momentum must be in [0, 1), got {beta}")
    return beta


def _t(stack: FloatArray) -> FloatArray:
    return np.swapaxes(stack, -1, -2)
