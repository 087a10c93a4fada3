import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from theory.problems import PROBLEMS, kuramoto, make, one_sided_cosine, opposed_cosines
from theory.ridge import COSINE, GEMAN_MCCLURE, RidgeSum
from theory.rotation import SUP_TANH_CURVATURE, RotationChain

NAMES = sorted(PROBLEMS)
INSTANCES = [(name, stages, n) for name in NAMES for stages, n in ((1, 2), (2, 2), (3, 1), (4, 3))]
ALL = [pytest.param(make(*instance), id="-".join(map(str, instance))) for instance in INSTANCES]
ALL += [pytest.param(p, id=p.name) for p in (opposed_cosines(), one_sided_cosine())]


def mean_square(problem, w):
    """(1/n) sum_i ||grad f_i(w)||^2 for one w."""
    n = problem.num_samples
    rows = problem.gradients(np.tile(w, (n, 1)), np.arange(n))
    return float(np.sum(rows**2) / n)


def point_with_residual(problem, residual):
    """The least-norm w that gives every term of a RidgeSum the same residual."""
    return np.linalg.lstsq(problem.rows, problem.offsets + residual, rcond=None)[0]


@st.composite
def problem_and_points(draw):
    problem = make(
        draw(st.sampled_from(NAMES)), draw(st.integers(1, 4)), draw(st.integers(1, 3)), seed=1
    )
    dim = len(problem.start)
    grid = st.integers(-24, 24).map(lambda k: k / 8)  # rational, so that failures stay readable
    points = [draw(st.lists(grid, min_size=dim, max_size=dim)) for _ in range(2)]
    return problem, np.array(points)


@given(problem_and_points())
def test_full_gradient_is_the_derivative_of_value(case):
    problem, w = case
    h = 1e-5
    steps = h * np.eye(w.shape[1])
    for row in w:
        numeric = (problem.value(row + steps) - problem.value(row - steps)) / (2 * h)
        np.testing.assert_allclose(problem.full_gradient(row[None])[0], numeric, atol=1e-8)


@given(problem_and_points())
def test_full_gradient_is_the_mean_of_the_samples_gradients(case):
    problem, w = case
    samples = [np.full(len(w), i) for i in range(problem.num_samples)]
    mean = np.mean([problem.gradients(w, sample) for sample in samples], axis=0)
    np.testing.assert_allclose(problem.full_gradient(w), mean, atol=1e-14)


@given(problem_and_points())
def test_batch_rows_do_not_influence_each_other(case):
    problem, w = case
    sample = np.arange(len(w)) % problem.num_samples
    for p in range(len(w)):
        alone = problem.gradients(w[p : p + 1], sample[p : p + 1])
        np.testing.assert_allclose(problem.gradients(w, sample)[p], alone[0], atol=1e-15)


@given(problem_and_points())
def test_constants_hold_at_random_points(case):
    problem, (x, y) = case
    jump = np.linalg.norm(problem.full_gradient(x[None]) - problem.full_gradient(y[None]))
    assert jump <= problem.L * np.linalg.norm(x - y) * (1 + 1e-12)
    assert mean_square(problem, x) <= problem.M * (1 + 1e-12)
    assert problem.value(x[None])[0] >= problem.f_star


@pytest.mark.parametrize("problem", ALL)
def test_no_optimised_secant_exceeds_L(problem):
    rng = np.random.default_rng(0)
    dim, h = len(problem.start), 1e-3
    best = 0.0

    def negative_ratio(z):
        x, u = z[:dim], z[dim:] / np.linalg.norm(z[dim:])
        ends = np.stack((x + h * u, x - h * u))
        return -np.linalg.norm(np.diff(problem.full_gradient(ends), axis=0)) / (2 * h)

    for _ in range(3):
        found = minimize(negative_ratio, rng.standard_normal(2 * dim), options={"maxiter": 60})
        best = max(best, -found.fun)
    assert best <= problem.L * (1 + 1e-9)
    # Exact for the ridge sums (see below); the chain's is a sum of worst cases.
    assert best >= (0.1 if problem.name == "rotation-chain" else 0.9) * problem.L


@pytest.mark.parametrize("problem", ALL)
def test_no_optimised_point_exceeds_M(problem):
    rng = np.random.default_rng(0)
    best = 0.0
    for _ in range(4):
        start = rng.uniform(-math.pi, math.pi, len(problem.start))
        found = minimize(lambda w: -mean_square(problem, w), start, options={"maxiter": 60})
        best = max(best, -found.fun)
    assert best <= problem.M * (1 + 1e-9)
    # Exact for the ridge sums (see below); the chain's factors do not peak together.
    assert best >= (0.1 if problem.name == "rotation-chain" else 0.9) * problem.M


@pytest.mark.parametrize("name", ["geman-mcclure", "kuramoto"])
@pytest.mark.parametrize(("stages", "samples"), [(1, 2), (2, 2), (3, 3), (5, 2)])
def test_ridge_constants_are_attained(name, stages, samples):
    problem = make(name, stages, samples)
    solution = point_with_residual(problem, 0.0)
    assert problem.value(solution[None])[0] == pytest.approx(problem.f_star, abs=1e-25)

    h = 1e-4  # rho'' is even in r, so the secant's error is of order h^2
    steps = h * np.eye(len(solution))
    rows = problem.full_gradient(solution + steps) - problem.full_gradient(solution - steps)
    assert np.linalg.norm(rows / (2 * h), ord=2) == pytest.approx(problem.L, rel=1e-6)

    steepest = 1 / math.sqrt(3) if name == "geman-mcclure" else math.pi / 2
    worst = point_with_residual(problem, steepest)
    # One sample of geman-mcclure per weight at most, or the residuals could not all be steepest.
    if name == "kuramoto" or samples <= len(solution):
        assert mean_square(problem, worst) == pytest.approx(problem.M, rel=1e-12)


@pytest.mark.parametrize("link", [GEMAN_MCCLURE, COSINE], ids=lambda link: link.name)
def test_link_suprema(link):
    r = np.linspace(-10, 10, 2_000_001)
    slopes = link.slope(r)
    assert np.abs(slopes).max() == pytest.approx(link.sup_slope, rel=1e-9)
    assert np.abs(slopes).max() <= link.sup_slope * (1 + 1e-15)
    assert np.abs(np.diff(slopes) / np.diff(r)).max() == pytest.approx(link.sup_curvature, rel=1e-9)


def test_exact_constants_of_the_named_problems():
    for problem, expected in (
        (opposed_cosines(), (2.0, 10.0)),
        (one_sided_cosine(), (1.0, 1.0)),
        (kuramoto(2), (9 / 8, 5 / 4)),  # 8 edges, 4 per sample
        (kuramoto(4, num_samples=3), (19 / 18, 7 / 6)),  # 18 edges, 6 per sample
    ):
        np.testing.assert_allclose((problem.L, problem.M), expected, rtol=1e-14)


def test_one_edge_per_sample_has_the_textbook_constants():
    # Kuramoto on the path 0 - 1 - 2: M = 2, L = lambda_max(Laplacian)/|E| = 3/2.
    rows = np.array([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0]])
    path = RidgeSum(
        "path", COSINE, rows, np.zeros(2), np.eye(2), np.zeros(3), (slice(0, 2), slice(2, 3))
    )
    np.testing.assert_allclose((path.L, path.M), (1.5, 2.0), rtol=1e-14)


def test_rotation_constants_by_hand():
    x, y = np.array([[0.6, 0.0]]), np.array([[0.0, 0.3]])
    r, b, s = 0.6, 0.9, SUP_TANH_CURVATURE
    one = RotationChain("one", x, y, np.zeros(1))
    by_hand = r**2 + b * (s * r**2 + r), b**2 * r**2
    np.testing.assert_allclose((one.L, one.M), by_hand, rtol=1e-14)
    two = RotationChain("two", x, y, np.zeros(2))
    q_1 = s * r**2 + r
    top = 0.5 * (r + q_1) + math.hypot(0.5 * (r - q_1), r)
    by_hand = 2 * r**2 + b * (2 * s * r**2 + top), 2 * b**2 * r**2
    np.testing.assert_allclose((two.L, two.M), by_hand, rtol=1e-14)


def test_sup_of_tanh_curvature():
    z = np.linspace(-5, 5, 1_000_001)
    curvature = np.abs(2 * np.tanh(z) * (1 - np.tanh(z) ** 2)).max()
    assert curvature == pytest.approx(SUP_TANH_CURVATURE, rel=1e-9)


def test_a_rotation_chain_reaches_its_f_star():
    chain = make("rotation-chain", 2)
    found = minimize(
        lambda w: chain.value(w[None])[0],
        chain.start,
        jac=lambda w: chain.full_gradient(w[None])[0],
        tol=1e-14,
    )
    assert found.fun == pytest.approx(chain.f_star, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stages", [1, 2, 3, 6])
def test_every_stage_owns_weights_and_every_weight_a_stage(name, stages):
    problem = make(name, stages)
    owned = [index for block in problem.blocks for index in range(*block.indices(10**6))]
    assert len(problem.blocks) == stages
    assert owned == list(range(len(problem.start)))
    # And each of them has something to descend, or delays would not be tested there.
    gradient = problem.full_gradient(problem.start[None])[0]
    assert all(np.abs(gradient[block]).max() > 1e-6 for block in problem.blocks)


@pytest.mark.parametrize("name", NAMES)
def test_make_depends_on_its_arguments_only(name):
    w = np.ones((1, len(make(name, 3).start)))
    assert make(name, 3, seed=5).value(w) == make(name, 3, seed=5).value(w)
    assert make(name, 3, seed=5).value(w) != make(name, 3, seed=6).value(w)


def test_kuramoto_edges_cross_the_stages():
    for stages in (2, 3, 5):
        problem = kuramoto(stages)
        stage_of = {
            index: k
            for k, block in enumerate(problem.blocks)
            for index in range(block.start, block.stop)
        }
        for edge in problem.rows:
            a, b = np.flatnonzero(edge)
            assert stage_of[a] != stage_of[b]


def test_errors_name_argument_and_value():
    with pytest.raises(ValueError, match="'lasso' is unknown; known are geman-mcclure, kuramoto"):
        make("lasso", 2)
    with pytest.raises(ValueError, match="num_stages must be at least 1, got 0"):
        make("kuramoto", 0)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got -1"):
        make("kuramoto", 2, -1)
    with pytest.raises(ValueError, match="negative mean"):
        RidgeSum("bad", COSINE, np.eye(1), np.zeros(1), -np.eye(1), np.zeros(1), (slice(0, 1),))
    with pytest.raises(ValueError, match="must both be"):
        RotationChain("bad", np.zeros((2, 2)), np.zeros((1, 2)), np.zeros(1))
