"""Non-convex problems whose L, M and f* are proved and hold globally, by name.

``make(name, num_stages, num_samples, seed)`` builds one. The same arguments give the same problem.
"""

from collections.abc import Callable

import numpy as np

from theory.protocols import Problem
from theory.ridge import COSINE, GEMAN_MCCLURE, RidgeSum
from theory.rotation import RotationChain

__all__ = [
    "PROBLEMS",
    "geman_mcclure",
    "kuramoto",
    "make",
    "one_sided_cosine",
    "opposed_cosines",
    "rotation_chain",
]


def make(name: str, num_stages: int, num_samples: int = 2, seed: int = 0) -> Problem:
    """Return the named problem with ``num_stages`` blocks and ``num_samples`` samples.

    Raises ValueError if the name is unknown (the message lists the names), or if
    ``num_stages`` or ``num_samples`` is below 1.

    >>> make("kuramoto", num_stages=2).name
    'kuramoto'
    >>> make("lasso", num_stages=2)
    Traceback (most recent call last):
    ValueError: problem 'lasso' is unknown; known are geman-mcclure, kuramoto, rotation-chain
    """
    if name not in PROBLEMS:
        raise ValueError(f"problem {name!r} is unknown; known are {', '.join(sorted(PROBLEMS))}")
    for argument, count in (("num_stages", num_stages), ("num_samples", num_samples)):
        if count < 1:
            raise ValueError(f"{argument} must be at least 1, got {count}")
    return PROBLEMS[name](num_stages, num_samples, seed)


def geman_mcclure(num_stages: int, num_samples: int = 2, seed: int = 0) -> RidgeSum:
    """Return robust regression: f_i = r_i^2 / (1 + r_i^2), r_i = a_i . w - b_i.

    Two weights a stage; the rows a_i have length 1, and b = A w* for a planted w*.

    Constants (derived here, see RidgeSum): L = 2 lambda_max(A^T A / n) <= 2, attained at w*;
    M = 27/64, attained if n <= dim; f* = 0, attained at w*.

    >>> problem = geman_mcclure(num_stages=2)
    >>> problem.start.shape, round(problem.M, 12) == 27 / 64
    ((4,), True)
    """
    rng = np.random.default_rng(seed)
    dim = 2 * num_stages
    rows = rng.standard_normal((num_samples, dim))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return RidgeSum(
        name="geman-mcclure",
        link=GEMAN_MCCLURE,
        rows=rows,
        offsets=rows @ rng.standard_normal(dim),
        coefficients=np.eye(num_samples),
        start=np.zeros(dim),
        blocks=tuple(slice(2 * k, 2 * k + 2) for k in range(num_stages)),
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


def rotation_chain(num_stages: int, num_samples: int = 2, seed: int = 0) -> RotationChain:
    """Return the K-stage chain h_k = tanh(R(theta_k) h_{k-1}) fitted to a teacher chain.

    Inputs have length 1/2, the targets come from teacher angles, the start is 0.4 to 1.0 rad off
    in every stage. L = K r^2 + B q_K and M = K B^2 r^2 as derived in RotationChain; f* = 0 at the
    teacher.

    >>> chain = rotation_chain(num_stages=3)
    >>> chain.start.shape, chain.f_star
    ((3,), 0.0)
    """
    rng = np.random.default_rng(seed)
    direction = rng.uniform(-np.pi, np.pi, num_samples)
    h_0 = 0.5 * np.stack((np.cos(direction), np.sin(direction)), axis=1)
    teacher = rng.uniform(-np.pi, np.pi, num_stages)
    offset = rng.uniform(0.4, 1.0, num_stages) * rng.choice([-1.0, 1.0], num_stages)
    targets = h_0
    chain = RotationChain("rotation-chain", h_0, h_0, teacher)
    for k in range(num_stages):
        targets = chain.forward(k, np.full((num_samples, 1), teacher[k]), targets)
    return RotationChain("rotation-chain", h_0, targets, teacher + offset)


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


PROBLEMS: dict[str, Callable[[int, int, int], Problem]] = {
    "geman-mcclure": geman_mcclure,
    "kuramoto": kuramoto,
    "rotation-chain": rotation_chain,
}
