"""Which rate a method bears: against direct recursions of its own updates, and the theorems."""

import math

import numpy as np
import pytest

from ddg_sim.methods import bp, ddg, fr, method
from ddg_sim.schedule import staleness
from theory.rates import rates
from theory.stability import stable_limit


def inconsistent_reads(matrix, ages, gamma):
    """Largest |eigenvalue| of w^{s+1} = w^s - gamma A (w_j^{s - ages_j})_j."""
    dim, depth = len(ages), max(ages) + 1
    big = np.zeros((dim * depth, dim * depth))
    big[:dim, :dim] = np.eye(dim)
    for j, age in enumerate(ages):
        big[:dim, dim * age + j] -= gamma * matrix[:, j]
    big[dim:, :-dim] = np.eye(dim * (depth - 1))
    return np.abs(np.linalg.eigvals(big)).max()


@pytest.mark.parametrize("name", ["ddg", "fdg", "pipedream", "stale", "pipedream-2bw"])
def test_a_smaller_rate_is_stable_and_a_larger_one_is_not(name):
    schedule, rng = method(name, 4), np.random.default_rng(0)
    ages, found = staleness(schedule), rates(schedule, 1.0)
    for _ in range(30):
        factor = rng.standard_normal((4, 4))
        matrix = factor @ factor.T
        matrix /= np.linalg.eigvalsh(matrix)[-1]
        assert inconsistent_reads(matrix, ages, 0.999 * found.stable) < 1.0
    assert found.attained
    assert inconsistent_reads(np.eye(4), ages, 1.001 * found.stable) > 1.0


def test_smoothness_scales_and_momentum_shrinks():
    plain, steep = rates(ddg(4), 1.0), rates(ddg(4), 8.0)
    assert steep.stable == pytest.approx(plain.stable / 8)
    assert steep.suggested == pytest.approx(1 / (7 * 8))
    assert rates(bp(3), 2.0).stable == pytest.approx(1.0)
    heavy = rates(ddg(4), 1.0, momentum=0.9)
    assert heavy.stable == pytest.approx(float(stable_limit(3, 0.9)))
    assert heavy.allowed == ()
    assert heavy.suggested / heavy.stable == pytest.approx(plain.suggested / plain.stable)


def test_the_theorems_best_rates_are_minima():
    given = {"gap": 1.3, "iterations": 200, "second_moment": 2.0, "variance": 0.7}
    a, v, d = rates(ddg(3), 1.5, **given).allowed
    gamma = np.geomspace(1e-4, 10, 400_001)
    start = 2 * 1.3 / (gamma * 200)
    theorem_a = start + gamma * 1.5 * 2.0 * (1 + gamma * 1.5 * 4)
    assert a.bound == pytest.approx(theorem_a.min(), rel=1e-8)
    assert a.best == pytest.approx(gamma[theorem_a.argmin()], rel=1e-3)
    theorem_v = start + gamma * 1.5 * 0.7 + 2 * gamma**2 * 1.5**2 * 2 * 0.7
    assert v.largest == pytest.approx(1 / (2 * 1.5 * 5))
    assert v.bound == pytest.approx(theorem_v[gamma <= v.largest].min(), rel=1e-4)
    allowed = gamma < 2 / (5 * 1.5)
    theorem_d = 1.3 / (gamma * 200 * (1 - gamma * 1.5 * 2.5))
    assert d.bound == pytest.approx(theorem_d[allowed].min(), rel=1e-8)
    assert math.isinf(a.largest)
    assert d.largest == pytest.approx(2 / (5 * 1.5))


def test_what_is_not_covered_is_said_or_refused():
    assert rates(fr(3), 1.0).allowed == ()
    assert any("Jacobians at newer weights" in text for text in rates(fr(3), 1.0).assumptions)
    with pytest.raises(ValueError, match="'dgl': local losses are no gradients"):
        rates(method("dgl", 3), 1.0)
    with pytest.raises(ValueError, match="'spectrain': no stable rate is known for predict"):
        rates(method("spectrain", 3), 1.0)
    with pytest.raises(ValueError, match="smoothness must be positive and finite, got nan"):
        rates(ddg(3), math.nan)
