"""Worst cases: published and derived numbers, and that they really bound every run."""

import numpy as np
import pytest

from theory import search, stability, worst_case
from theory.search import search_conjecture
from theory.stability import c_tau, stable_limit
from theory.worst_case import Criterion

solver = pytest.mark.skipif(
    not worst_case.available(), reason="needs the extra worst-cases (clarabel)"
)


@solver
@pytest.mark.parametrize(
    ("stages", "iterations", "least", "average"),
    [
        (1, 10, "0.12500", "0.20000"),
        (2, 10, "0.31761", "0.51428"),
        (2, 20, "0.16484", "0.25714"),
        (3, 10, "0.51398", "0.84673"),
        (3, 20, "0.26907", "0.42398"),
    ],
)
def test_the_anchors(stages, iterations, least, average):
    delays, gamma = range(stages - 1, -1, -1), 1 / (2 * stages - 1)
    for criterion, expected in ((Criterion.LEAST, least), (Criterion.AVERAGE, average)):
        found = worst_case.worst_case(list(delays), gamma, iterations, criterion)
        assert f"{found.value:.5f}" == expected
        assert found.dual == pytest.approx(found.value, rel=1e-6)
        assert worst_case.violation(found) < 1e-6


@solver
def test_scales_and_the_witness():
    one = worst_case.worst_case([1, 0], 0.3, 4)
    scaled = worst_case.worst_case([1, 0], 0.1, 4, smoothness=3.0, gap=2.0)
    assert scaled.value == pytest.approx(one.value * 6.0, rel=1e-6)
    # The witness follows the recursion, and its gradients are as large as claimed.
    g, x = one.gradients, one.points
    for k, delay in enumerate((1, 0)):
        for t in range(4):
            step = 0.3 * g[k, t - delay] if t >= delay else 0.0
            np.testing.assert_allclose(x[k, t + 1], x[k, t] - step, atol=1e-9)
    assert np.sum(g[:, :4] ** 2) / 4 == pytest.approx(one.value, abs=1e-6)
    assert one.values[0] == pytest.approx(1.0, abs=1e-6)
    broken = worst_case.WorstCase(0.0, 0.0, one.values - 0.5, g, x)
    assert worst_case.violation(broken) > 0.1


@solver
def test_samples():
    plain = worst_case.worst_case([1, 0], 0.3, 3).value
    # Without noise, two samples are one.
    assert worst_case.worst_case([1, 0], 0.3, 3, num_samples=2).value == pytest.approx(
        plain, rel=1e-5
    )
    noisy = worst_case.worst_case([1, 0], 0.15, 3, num_samples=2, variance=0.5)
    # Theorem V holds for it, and a quadratic with that noise is no worse.
    assert noisy.value <= 2 / (0.15 * 3) + 0.15 * 0.5 + 2 * 0.15**2 * 0.5
    run = stability.quadratic_mean_squares(
        np.eye(2), [1, 0], [np.sqrt(2), 0], np.diag([0.5, 0.0]), [0.15] * 3
    )
    assert run.mean() <= noisy.value + 1e-6
    assert noisy.value > worst_case.worst_case([1, 0], 0.15, 3).value + 1e-3


@solver
def test_the_conjecture_holds_where_it_is_searched_and_is_nearly_attained():
    found = search_conjecture(max_delay=2, iterations=8, trials=15, seed=1)
    assert not found.broken
    assert [trial.delays[0] for trial in found.closest] == [0, 1, 2]
    assert max(trial.ratio for trial in found.closest) > 0.99
    assert "semidefinite" in found.method


@pytest.mark.parametrize("exact", [pytest.param(True, marks=solver), False])
def test_a_false_conjecture_is_broken(monkeypatch, exact):
    monkeypatch.setattr(search, "available", lambda: exact)
    monkeypatch.setattr(search, "c_tau", lambda x, tau: 1.3 * c_tau(x, tau))
    assert search_conjecture(max_delay=1, iterations=8, trials=60 if not exact else 12).broken


def test_random_functions_take_over_without_the_solver(monkeypatch):
    monkeypatch.setattr(search, "available", lambda: False)
    found = search_conjecture(max_delay=3, iterations=12, trials=200)
    assert not found.broken
    assert found.method.startswith("random functions")
    assert all(0 < trial.gamma < stable_limit(trial.delays[0]) for trial in found.closest)


def test_without_the_solver_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(worst_case, "available", lambda: False)
    with pytest.raises(RuntimeError, match=r"pip install 'ddg-toolkit\[worst-cases\]'"):
        worst_case.worst_case([1, 0], 0.3, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 0.1, 3), "delays must be integers of at least 0"),
        (([-1], 0.1, 3), r"got \[-1\]"),
        (([0], 0.0, 3), "gamma must be positive and finite, got 0.0"),
        (([0], 0.1, 0), "iterations and num_samples must be at least 1, got 0 and 1"),
        (([0], 0.1, 200), "iterations = 200 with num_samples = 1 visits too many points"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        worst_case.worst_case(*arguments)
