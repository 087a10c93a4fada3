"""Exact anchors of delayed steps on quadratics, against recursions and polynomials written here."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ddg_sim.methods import ddg
from theory import paths, stability
from theory.stability import c_tau, quadratic_limit, spectral_radius, stable_limit

DELAYS = list(range(13))
MOMENTA = [0.0, 0.1, 0.5, 0.9, 0.99]


def root(delay, x, beta=0.0):
    """The largest |root| of z^(tau+2) - (1 + beta) z^(tau+1) + beta z^tau + x z."""
    polynomial = np.zeros(delay + 3)
    polynomial[0] += 1.0
    polynomial[1] -= 1.0 + beta
    polynomial[2] += beta
    polynomial[delay + 1] += x
    return np.abs(np.roots(polynomial)).max()


def companion(matrix, delays, gamma, beta):
    """The recursion as one matrix on every coordinate's own history, and its largest |eigenvalue|.

    Unlike the code under test: all coordinates, nothing factored.
    """
    depth = max(delays) + 2
    dim = len(matrix)
    big = np.zeros((dim * depth, dim * depth))
    for k in range(dim):
        big[k, k] += 1.0 + beta
        big[k, dim + k] -= beta
        for j in range(dim):
            big[k, dim * delays[k] + j] -= gamma * matrix[k, j]
    big[dim:, :-dim] = np.eye(dim * (depth - 1))
    return np.abs(np.linalg.eigvals(big)).max()


@pytest.mark.parametrize("delay", DELAYS)
def test_the_limit_is_where_a_root_leaves_the_circle(delay):
    limit = float(stable_limit(delay))
    assert limit == pytest.approx(2 * math.sin(math.pi / (2 * (2 * delay + 1))), rel=4e-15)
    assert root(delay, limit) == pytest.approx(1.0, abs=1e-12)
    assert root(delay, 0.999 * limit) < 1.0 < root(delay, 1.001 * limit)
    assert all(root(delay, share * limit) < 1.0 for share in np.linspace(0.01, 0.99, 30))


@pytest.mark.parametrize("delay", DELAYS)
def test_the_fastest_rate(delay):
    x, rate = (float(part) for part in stability.fastest(delay))
    assert x == pytest.approx(delay**delay / (delay + 1) ** (delay + 1), rel=1e-14)
    # A double root, where the numerical roots are only good to sqrt(1e-16).
    assert root(delay, x) == pytest.approx(delay / (delay + 1), abs=1e-7)
    assert min(root(delay, 0.99 * x), root(delay, 1.01 * x)) > rate + 1e-4


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("delay", DELAYS)
def test_the_squares_add_up(delay, share):
    x = share * float(stable_limit(delay))
    w = [0.0] * delay + [1.0]
    while max(map(abs, w[-delay - 1 :])) > 1e-18:
        w.append(w[-1] - x * w[-1 - delay])
    assert stability.energy(x, delay) == pytest.approx(math.fsum(v * v for v in w), rel=1e-14)


def test_the_damping_of_no_and_of_one_delay():
    x = np.linspace(0.0, 1.0, 11)
    np.testing.assert_allclose(c_tau(x, 0), 1 - x / 2, rtol=1e-15, atol=1e-16)
    np.testing.assert_allclose(c_tau(x, 1), (1 - x) * (2 + x) / (2 * (1 + x)), rtol=3e-15, atol=0)
    # Beyond the limit nothing is promised, however large x is.
    assert not c_tau([1.0001, 1.9, 2.0, 50.0], 1).any()
    assert np.isinf(stability.energy(1.5, 1))


@pytest.mark.parametrize("beta", MOMENTA)
@pytest.mark.parametrize("delay", DELAYS)
def test_the_limit_with_momentum(delay, beta):
    limit = float(stable_limit(delay, beta))
    if delay < 2:
        assert limit == pytest.approx([2 * (1 + beta), 1 - beta][delay], rel=1e-12)
    assert root(delay, limit, beta) == pytest.approx(1.0, abs=1e-9)
    assert root(delay, 0.99 * limit, beta) < 1.0 < root(delay, 1.01 * limit, beta)


@given(
    st.integers(1, 4).flatmap(
        lambda dim: st.tuples(
            st.lists(st.integers(-4, 4), min_size=dim * dim, max_size=dim * dim),
            st.lists(st.integers(0, 4), min_size=dim, max_size=dim),
        )
    ),
    st.sampled_from([0.0, 0.5, 0.9]),
)
@example(([1], [3]), 0.0)
@settings(max_examples=30, deadline=None)
def test_stages_with_different_delays_are_no_worse_than_the_most_delayed(case, beta):
    entries, delays = case
    factor = np.array(entries, dtype=float).reshape(len(delays), -1)
    matrix = factor @ factor.T
    largest = np.linalg.eigvalsh(matrix)[-1]
    if largest < 0.5:
        return
    limit = float(stable_limit(max(delays), beta))
    gamma = 0.99 * limit / largest
    found = float(spectral_radius(matrix, delays, gamma, beta))
    assert found < 1.0
    if np.linalg.eigvalsh(matrix)[0] > 1e-6 * largest:  # no flat direction, which would stay at 1
        assert found == pytest.approx(companion(matrix, delays, gamma, beta), abs=1e-6)
    exact = quadratic_limit(matrix, delays, beta)
    assert exact >= limit / largest * (1 - 1e-9)
    assert spectral_radius(matrix, delays, [0.995 * exact], beta)[0] < 1.0
    assert companion(matrix, delays, 1.005 * exact, beta) > 1.0


@pytest.mark.parametrize("beta", MOMENTA)
def test_the_limit_of_the_most_delayed_stage_is_attained(beta):
    for delays in ([0, 3], [5, 2, 0], [1]):
        found = quadratic_limit(3.0 * np.eye(len(delays)), delays, beta)
        assert 3.0 * found == pytest.approx(float(stable_limit(max(delays), beta)), rel=1e-9)


def enumerate_gradients(matrix, delays, start, noises, gammas):
    """E||A w^t||^2 over all sequences of equally likely noises, one by one."""
    horizon = len(gammas)
    sums = [[] for _ in gammas]
    for drawn in itertools.product(range(len(noises)), repeat=horizon):
        w = [np.array(start, dtype=float)]
        for t in range(horizon):
            sums[t].append(float(np.sum((matrix @ w[t]) ** 2)))
            new = w[t].copy()
            for k, delay in enumerate(delays):
                if t >= delay:
                    gradient = matrix @ w[t - delay] + noises[drawn[t - delay]]
                    new[k] -= gammas[t] * gradient[k]
            w.append(new)
    return [math.fsum(part) / len(part) for part in sums]


@pytest.mark.parametrize(
    ("matrix", "delays"),
    [
        ([[1.0]], [0]),
        ([[1.0]], [3]),
        ([[2.0, 1.0], [1.0, 1.0]], [1, 0]),
        ([[2.0, 1.0, 0.0], [1.0, 1.0, -0.5], [0.0, -0.5, 1.0]], [2, 0, 2]),
    ],
)
def test_second_moments_are_what_all_paths_give(matrix, delays):
    rng = np.random.default_rng(1)
    matrix, dim = np.array(matrix), len(delays)
    noises = rng.integers(-4, 5, (3, dim)) / 4.0
    noises = np.concatenate((noises, -noises.sum(axis=0, keepdims=True)))  # zero mean
    start, gammas = rng.integers(-4, 5, dim) / 2.0, [0.25, 0.5, 0.125, 0.25, 0.5]
    expected = enumerate_gradients(matrix, delays, start, noises, gammas)
    covariance = noises.T @ noises / len(noises)
    found = stability.quadratic_mean_squares(matrix, delays, start, covariance, gammas)
    np.testing.assert_allclose(found, expected, rtol=2e-15, atol=1e-15)
    both = stability.quadratic_mean_squares(matrix, delays, start, covariance, [gammas, gammas])
    np.testing.assert_array_equal(both, [found, found])


def test_second_moments_are_those_of_the_schedule():
    from noisy_quadratic import NoisyQuadratic

    gammas = [0.3, 0.2, 0.4, 0.1, 0.3, 0.2, 0.2, 0.2]
    problem = NoisyQuadratic(num_stages=4, noise=0.5)
    expected = paths.mean_squared_gradients(ddg(4), problem, gammas)
    found = stability.quadratic_mean_squares([[1.0]], [3], [1.0], [[0.25]], gammas)
    np.testing.assert_allclose(found, expected, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("delay", [0, 1, 2, 5, 12])
def test_the_stationary_gradient(delay):
    x = 0.6 * float(stable_limit(delay))
    curvature, variance = 2.0, 3.0
    run = stability.quadratic_mean_squares(
        [[curvature]], [delay], [0.0], [[variance]], np.full(1500, x / curvature)
    )
    expected = float(stability.stationary_gradient(x, delay, variance))
    assert run[-1] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: c_tau(-1.0, 0), "x must be at least 0, got -1.0"),
        (lambda: c_tau(1.0, 0.5), "delay must be an integer of at least 0, got 0.5"),
        (lambda: stable_limit(-1), "delay must be an integer of at least 0, got -1.0"),
        (lambda: stable_limit(1, 1.0), "momentum must be in .0, 1., got 1.0"),
        (lambda: spectral_radius([[1.0, 0.0]], [1], 1.0), "matrix must be square"),
        (lambda: spectral_radius([[-1.0]], [1], 1.0), "positive semi-definite, has eigenvalue -1"),
        (lambda: spectral_radius([[1.0]], [1, 2], 1.0), "delays has shape .2,."),
        (
            lambda: stability.quadratic_mean_squares([[1.0]], [0], [1.0, 2.0], [[1.0]], [0.1]),
            "start has shape",
        ),
    ],
)
def test_errors_name_the_argument_and_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
