"""Problems whose L, M, variance and f* are proved and hold globally, by name.

``make(name, num_stages, num_samples, seed)`` builds one. The same arguments give the same problem.
Two weights a stage and rows a_i of length 1, unless a family says otherwise; all start at 0.
"""

from collections.abc import Callable

import numpy as np

from theory.chain import Chain, Layer
from theory.links import (
    CAUCHY,
    COSINE,
    GEMAN_MCCLURE,
    LOG_LOSS,
    SIGMOID,
    TANH_NEURON,
    WELSCH,
    Link,
)
from theory.protocols import FloatArray, Problem
from theory.quadratic import NoisyQuadratic
from theory.reversible import Coupling
from theory.ridge import RidgeSum
from theory.rotation import Rotation
from theory.total import Sum

__all__ = [
    "PROBLEMS",
    "cauchy",
    "geman_mcclure",
    "kuramoto",
    "logistic",
    "make",
    "noisy_quadratic",
    "one_sided_cosine",
    "opposed_cosines",
    "reversible_chain",
    "rotation_chain",
    "sigmoid",
    "tanh_neuron",
    "welsch",
]


#: All samples' terms: matrices of that many rows and columns take 0.5 GB.
MAX_TERMS = 8192


def make(name: str, num_stages: int, num_samples: int = 2, seed: int = 0) -> Problem:
    """Return the named problem with ``num_stages`` blocks and ``num_samples`` samples.

    Raises ValueError if the name is unknown (the message lists the names), if ``num_stages`` or
    ``num_samples`` is below 1, or if there would be more than MAX_TERMS terms.

    >>> make("kuramoto", num_stages=2).name
    'kuramoto'
    >>> make("lasso", num_stages=2)
    Traceback (most recent call last):
    ValueError: problem 'lasso' is unknown; known are cauchy, geman-mcclure, kuramoto, ...
    """
    if name not in PROBLEMS:
        raise ValueError(f"problem {name!r} is unknown; known are {', '.join(sorted(PROBLEMS))}")
    for argument, count in (("num_stages", num_stages), ("num_samples", num_samples)):
        if count < 1:
            raise ValueError(f"{argument} must be at least 1, got {count}")
    terms = max(4, num_stages)  # of a sample, at most: Kuramoto's
    if num_samples * terms > MAX_TERMS:
        raise ValueError(
            f"num_samples must be at most {MAX_TERMS // terms} with {num_stages} stages, for "
            f"problems hold matrices of as many rows and columns as terms; got {num_samples}"
        )
    return PROBLEMS[name](num_stages, num_samples, seed)


def geman_mcclure(num_stages: int, num_samples: int = 2, seed: int = 0) -> RidgeSum:
    """Return robust regression: f_i = r_i^2 / (1 + r_i^2), r_i = a_i . w - b_i.

    b = A w* for a planted w*. Constants (derived here, see RidgeSum and `theory.links`):
    L = 2 lambda_max(A^T A / n) <= 2, attained at w*; M = 27/64, attained if n <= dim; f* = 0,
    attained at w*; variance attained for n = 2.

    >>> problem = geman_mcclure(num_stages=2)
    >>> problem.start.shape, round(problem.M, 12) == 27 / 64
    ((4,), True)
    """
    return _robust(GEMAN_MCCLURE, num_stages, num_samples, seed)


def welsch(num_stages: int, num_samples: int = 2, seed: int = 0) -> RidgeSum:
    """Return robust regression: f_i = 1 - exp(-r_i^2/2), r_i = a_i . w - b_i, b = A w*.

    Derived here: L = lambda_max(A^T A / n), attained at w*; M = 1/e, attained if n <= dim; f* = 0,
    attained at w*.

    >>> round(welsch(num_stages=2).M * np.e, 12)
    1.0
    """
    return _robust(WELSCH, num_stages, num_samples, seed)


def cauchy(num_stages: int, num_samples: int = 2, seed: int = 0) -> RidgeSum:
    """Return robust regression: f_i = log(1 + r_i^2)/2, r_i = a_i . w - b_i, b = A w*.

    Derived here: L = lambda_max(A^T A / n), attained at w*; M = 1/4, attained if n <= dim; f* = 0,
    attained at w*.

    >>> round(cauchy(num_stages=2).M, 12)
    0.25
    """
    return _robust(CAUCHY, num_stages, num_samples, seed)


def sigmoid(num_stages: int, num_samples: int = 2, seed: int = 0) -> RidgeSum:
    """Return classification: f_i = 1/(1 + exp(y_i a_i . w)), y_i = sign(a_i . w*).

    Derived here: L = lambda_max(A^T A / n)/(6 sqrt 3), attained if n <= dim; M = 1/16, attained at
    the start; f* = 0 is the infimum, approached along w*.

    >>> round(sigmoid(num_stages=2).M, 12)
    0.0625
    """
    rows, planted = _data(num_stages, num_samples, seed)
    return _ridge(SIGMOID, num_stages, rows * np.sign(rows @ planted)[:, None], np.zeros(len(rows)))


def logistic(num_stages: int, num_samples: int = 2, seed: int = 0) -> Sum:
    """Return f_i = log(1 + exp(-y_i a_i . w)) + mu sum_j w_j^2/(1 + w_j^2), mu = 1/10.

    Logistic regression with a non-convex regulariser. Derived here (see Sum):
    L = lambda_max(A^T A / n)/4 + 2 mu, attained at the start; M = (1 + mu (3 sqrt 3/8) sqrt dim)^2,
    the regulariser adding nothing to the variance; neither M nor f* = 0 is attained, for the parts
    are extreme at different places.

    >>> f = logistic(num_stages=2)
    >>> round(f.M, 12) == round((1 + 0.1 * 3 * 3**0.5 / 8 * 2) ** 2, 12)
    True
    """
    rows, planted = _data(num_stages, num_samples, seed)
    rows *= np.sign(rows @ planted)[:, None]
    loss = _ridge(LOG_LOSS, num_stages, rows, np.zeros(len(rows)))
    dim = len(planted)
    weight = np.full((num_samples, dim), 0.1)
    regulariser = _ridge(GEMAN_MCCLURE, num_stages, np.eye(dim), np.zeros(dim), weight)
    return Sum("logistic", loss, regulariser)


def tanh_neuron(num_stages: int, num_samples: int = 2, seed: int = 0) -> RidgeSum:
    """Return one neuron: f_i = (tanh(a_i . w) - b_i)^2/2, b_i = tanh(a_i . w*).

    Derived here, for all |b_i| <= 1: L = 1.2325 lambda_max(A^T A / n), M = (32/27)^2. Neither is
    attained where |b_i| < 1. f* = 0, attained at w*.

    >>> round(tanh_neuron(num_stages=2).M * (27 / 32) ** 2, 12)
    1.0
    """
    rows, planted = _data(num_stages, num_samples, seed)
    return _ridge(TANH_NEURON, num_stages, rows, np.tanh(rows @ planted))


def noisy_quadratic(num_stages: int, num_samples: int = 2, seed: int = 0) -> NoisyQuadratic:
    """Return f_i = (w - w*)' A (w - w*)/2 + xi_i . (w - w*), a random A with eigenvalues to 1.

    The finite noise set {xi_i} has mean 0 and, with two samples or more, variance 1; so all its
    paths can be enumerated. L = 1 and the variance are attained, M = inf; see NoisyQuadratic.

    >>> problem = noisy_quadratic(num_stages=2)
    >>> round(problem.L, 12), problem.M, round(problem.variance, 12)
    (1.0, inf, 1.0)
    """
    rng = np.random.default_rng(seed)
    dim = 2 * num_stages
    basis, _ = np.linalg.qr(rng.standard_normal((dim, dim)))
    matrix = (basis * np.linspace(0.1, 1.0, dim)) @ basis.T
    noise = rng.standard_normal((num_samples, dim))
    noise -= noise.mean(axis=0)
    if num_samples > 1:
        noise /= np.sqrt(np.mean(np.sum(noise**2, axis=1)))
    return NoisyQuadratic(
        name="noisy-quadratic",
        matrix=0.5 * (matrix + matrix.T),
        solution=rng.standard_normal(dim),
        noise=noise,
        start=np.zeros(dim),
        blocks=_pairs(num_stages),
    )


def kuramoto(num_stages: int, num_samples: int = 2, seed: int = 0) -> RidgeSum:
    """Return phase synchronisation on a star: f = mean_e 1 - cos(w_0 - w_e - theta_e).

    The hub w_0 is the first stage's only weight, so the most delayed stage pulls on every edge;
    the leaves lie in the other stages, m of them per sample (m >= 4), and no edge stays inside a
    stage unless there is only one. f_i is the mean over sample i's m edges, |E| = n m.

    Constants (derived here): L = lambda_max(Laplacian)/|E| = (|E| + 1)/|E|, attained at w*;
    M = lambda_max(Laplacian of m edges)/m = (m + 1)/m, attained where all phases are pi/2
    (a single edge per sample would give the familiar M = 2); f* = 0, attained, because a star
    has no cycle that could be frustrated.

    >>> problem = kuramoto(num_stages=2)
    >>> problem.start.shape, round(problem.L, 12), round(problem.M, 12)
    ((9,), 1.125, 1.25)
    """
    rng = np.random.default_rng(seed)
    leaf_stages = max(1, num_stages - 1)
    per_stage = -(-4 // leaf_stages)  # leaves of one sample in one stage
    per_sample = per_stage * leaf_stages
    edges = num_samples * per_sample
    rows = np.zeros((edges, edges + 1))
    rows[:, 0] = 1.0
    rows[:, 1:] = -np.eye(edges)
    in_stage = num_samples * per_stage
    leaves = [slice(1 + j * in_stage, 1 + (j + 1) * in_stage) for j in range(leaf_stages)]
    coefficients = np.zeros((num_samples, edges))
    # Consecutive leaves alternate between the samples, so every stage sees every sample.
    coefficients[np.arange(edges) % num_samples, np.arange(edges)] = 1.0 / per_sample
    return RidgeSum(
        name="kuramoto",
        link=COSINE,
        rows=rows,
        # From w^0 = 0 every edge pulls the hub the same way, with at least 70 % of full strength.
        offsets=rng.uniform(0.25 * np.pi, 0.75 * np.pi, edges),
        coefficients=coefficients,
        start=np.zeros(edges + 1),
        blocks=(slice(0, edges + 1),) if num_stages == 1 else (slice(0, 1), *leaves),
    )


def rotation_chain(num_stages: int, num_samples: int = 2, seed: int = 0) -> Chain:
    """Return the K-stage chain h_k = tanh(R(theta_k) h_{k-1}) fitted to a teacher chain.

    One angle a stage. Inputs have length 1/2, the targets come from teacher angles, the start is
    0.4 to 1.0 rad off in every stage. L = K r^2 + B q_K and M = K B^2 r^2 as derived in
    `theory.rotation`, not attained; f* = 0 at the teacher.

    >>> chain = rotation_chain(num_stages=3)
    >>> chain.start.shape, chain.f_star
    ((3,), 0.0)
    """
    return _taught("rotation-chain", Rotation(), num_stages, num_samples, seed)


def reversible_chain(num_stages: int, num_samples: int = 2, seed: int = 0) -> Chain:
    """Return the K-stage chain h_k = (v, u + sin(w_k) tanh(v)/sqrt K), h_{k-1} = (u, v), taught.

    As `rotation_chain`, with stages whose input follows from their output at any weights. L and M
    as derived in `theory.reversible`, not attained; f* = 0 at the teacher.

    >>> chain = reversible_chain(num_stages=3)
    >>> chain.start.shape, chain.f_star
    ((3,), 0.0)
    """
    layer = Coupling(strength=num_stages**-0.5)
    return _taught("reversible-chain", layer, num_stages, num_samples, seed)


def opposed_cosines(start: tuple[float, float] = (0.5 * np.pi, 0.0)) -> RidgeSum:
    """Return f_i(w) = c_i (1 - cos(w_1 + w_2)), c = (3, -1): two stages, L = 2, M = 10, f* = 0.

    Source: counterexamples (a) and (c) to Lemma 1 and to the independence step of its proof.

    >>> problem = opposed_cosines()
    >>> round(problem.L, 12), round(problem.M, 12)
    (2.0, 10.0)
    """
    return RidgeSum(
        name="opposed-cosines",
        link=COSINE,
        rows=np.ones((1, 2)),
        offsets=np.zeros(1),
        coefficients=np.array([[3.0], [-1.0]]),
        start=np.array(start, dtype=np.float64),
        blocks=(slice(0, 1), slice(1, 2)),
    )


def one_sided_cosine() -> RidgeSum:
    """Return f(w) = 1 - cos(w_1), one sample, two stages, from w = (pi/2, 0): L = M = 1, f* = 0.

    Source: counterexample (b) to Lemma 1; the only stage that matters idles in the warm-up.

    >>> problem = one_sided_cosine()
    >>> problem.num_samples, problem.L, problem.M
    (1, 1.0, 1.0)
    """
    return RidgeSum(
        name="one-sided-cosine",
        link=COSINE,
        rows=np.array([[1.0, 0.0]]),
        offsets=np.zeros(1),
        coefficients=np.ones((1, 1)),
        start=np.array([0.5 * np.pi, 0.0]),
        blocks=(slice(0, 1), slice(1, 2)),
    )


def _data(num_stages: int, num_samples: int, seed: int) -> tuple[FloatArray, FloatArray]:
    """Return rows a_i of length 1, (n, 2 K), and planted weights w*, (2 K,)."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((num_samples, 2 * num_stages))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows, rng.standard_normal(2 * num_stages)


def _pairs(num_stages: int) -> tuple[slice, ...]:
    return tuple(slice(2 * k, 2 * k + 2) for k in range(num_stages))


def _ridge(
    link: Link,
    num_stages: int,
    rows: FloatArray,
    offsets: FloatArray,
    coefficients: FloatArray | None = None,
) -> RidgeSum:
    """Return the sum with one term per sample, or with these coefficients."""
    return RidgeSum(
        name=link.name,
        link=link,
        rows=rows,
        offsets=offsets,
        coefficients=np.eye(len(rows)) if coefficients is None else coefficients,
        start=np.zeros(2 * num_stages),
        blocks=_pairs(num_stages),
    )


def _robust(link: Link, num_stages: int, num_samples: int, seed: int) -> RidgeSum:
    rows, planted = _data(num_stages, num_samples, seed)
    return _ridge(link, num_stages, rows, rows @ planted)


def _taught(name: str, layer: Layer, num_stages: int, num_samples: int, seed: int) -> Chain:
    """Return the chain of that layer whose targets are what a chain with other weights makes."""
    rng = np.random.default_rng(seed)
    direction = rng.uniform(-np.pi, np.pi, num_samples)
    h_0 = 0.5 * np.stack((np.cos(direction), np.sin(direction)), axis=1)
    teacher = rng.uniform(-np.pi, np.pi, num_stages)
    offset = rng.uniform(0.4, 1.0, num_stages) * rng.choice([-1.0, 1.0], num_stages)
    targets = Chain(name, layer, h_0, h_0, teacher).outputs(teacher)
    return Chain(name, layer, h_0, targets, teacher + offset)


PROBLEMS: dict[str, Callable[[int, int, int], Problem]] = {
    "cauchy": cauchy,
    "geman-mcclure": geman_mcclure,
    "kuramoto": kuramoto,
    "logistic": logistic,
    "noisy-quadratic": noisy_quadratic,
    "reversible-chain": reversible_chain,
    "rotation-chain": rotation_chain,
    "sigmoid": sigmoid,
    "tanh-neuron": tanh_neuron,
    "welsch": welsch,
}
