from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from noisy_quadratic import NoisyQuadratic

from ddg_sim.methods import ddg
from theory.bounds import STATEMENTS
from theory.delayed_bounds import theorem_a
from theory.hypotheses import DDG_DELAYS, SMALL_STEPS
from theory.paths import mean_squared_gradients
from theory.published import lemma1, theorem1, theorem2
from theory.statement import Constants, Scope, Status, constant_steps, harmonic_steps

#: Counterexample (a)'s constants with a gap that is easy to calculate with.
EXAMPLE = Constants(L=2.0, M=10.0, gap=1.0, delays=(1, 0))


def ddg_delays(stages):
    return tuple(range(stages - 1, -1, -1))


def test_lemma1_by_hand():
    # M_K = 2*10 + 16*10 = 180, gamma^2 L M_K = 10^-6 * 360.
    assert lemma1(EXAMPLE, constant_steps(1e-3, 5)) == pytest.approx(3.6e-4, rel=1e-14)


def test_lemma1_sigma_is_the_largest_ratio_of_delayed_steps():
    # Steps 1, 1/2, 1/3: sigma = max(1, 1/(1/2), (1/2)/(1/3)) = 2 = K; M_K = 20 + 320 = 340.
    assert lemma1(EXAMPLE, harmonic_steps(1.0, 3)) == pytest.approx(2 * 340 / 9, rel=1e-14)
    three = replace(EXAMPLE, delays=(2, 1, 0))  # sigma = 3 = K: M_K = 30 + 3*81*10 = 2460
    assert lemma1(three, harmonic_steps(1.0, 4)) == pytest.approx(2 * 2460 / 16, rel=1e-14)


def test_theorem1_by_hand():
    # 2/(0.01*100) + 2*0.01*2*180.
    assert theorem1(EXAMPLE, constant_steps(0.01, 100)) == pytest.approx(2 + 7.2, rel=1e-14)


def test_theorem2_by_hand():
    # Steps 0.1, 0.05: Gamma = 0.15, sum of squares 0.0125, M_K = 20 + 32*10 = 340.
    expected = (2 + 2 * 0.0125 * 2 * 340) / 0.15
    assert theorem2(EXAMPLE, harmonic_steps(0.1, 2)) == pytest.approx(expected, rel=1e-14)


def test_theorem_a_by_hand():
    # 2/(0.01*100) + 0.01*2*10*(1 + 0.01*2*9).
    delayed = replace(EXAMPLE, delays=(3, 2, 1, 0))
    assert theorem_a(delayed, constant_steps(0.01, 100)) == pytest.approx(2.236, rel=1e-14)


positive = st.floats(1e-3, 1e3)


@given(positive, positive, positive, st.integers(1, 9), st.integers(1, 50), st.floats(1e-4, 1))
def test_theorem_a_implies_theorem1_where_gamma_L_is_at_most_1(L, M, gap, stages, ticks, x):
    constants = Constants(L, M, gap, ddg_delays(stages))
    gammas = constant_steps(x / L, ticks)
    assert theorem_a(constants, gammas) <= theorem1(constants, gammas) * (1 + 1e-12)


@given(positive, positive, st.integers(1, 6), st.floats(1e-4, 1), st.integers(1, 1000))
@example(L=3.0, M=1.0, stages=1, x=0.25 * (1 - 1e-9), ticks=7)
@example(L=3.0, M=1.0, stages=1, x=0.25 * (1 + 1e-9), ticks=7)
def test_theorem1_is_vacuous_unless_gamma_L_is_tiny(L, M, stages, x, ticks):
    constants = Constants(L, M, 0.0, ddg_delays(stages))
    threshold = 1 / (2 * (stages + stages**4))
    assume(abs(x / threshold - 1) > 1e-12)  # there rounding decides
    assert (theorem1(constants, constant_steps(x / L, ticks)) < M) == (x < threshold)


@pytest.mark.parametrize(("delay", "gamma"), [(0, 0.3), (0, 0.5), (1, 0.2)])
def test_theorem_a_is_nearly_attained_by_additive_noise(delay, gamma):
    # From the minimum of a noisy quadratic: gap = 0, so the bound is its second term alone, and
    # the proof needs M along the run only. A second term 1/4 as large would be exceeded.
    problem = NoisyQuadratic(delay + 1, noise=1.0, w_1=0.0)
    gammas = constant_steps(gamma, 15)
    squares = mean_squared_gradients(ddg(delay + 1), problem, gammas)
    constants = Constants(1.0, 1.0 + squares.max(), 0.0, ddg_delays(delay + 1))
    ratio = squares.mean() / theorem_a(constants, gammas)
    assert 0.3 < ratio <= 1


def test_statements_say_what_is_known():
    assert {key: statement.status for key, statement in STATEMENTS.items()} == {
        "lemma1": "refuted as stated",
        "lemma1-steady": "refuted as stated",
        "independence": "refuted as stated",
        "theorem1": "paper claim",
        "theorem2": "paper claim",
        "corollary": "paper claim",
        "features-replay": "paper claim",
        "lian": "proved",
        "lemma1-prime": "proved",
        "theorem-a": "proved",
        "theorem-a-young": "proved",
        "theorem-v": "proved",
        "theorem-d": "proved",
        "theorem2-prime": "proved",
        "theorem-f": "proved",
        "theorem-m": "proved",
        "c-tau": "conjecture",
    }
    published = ("lemma1", "lemma1-steady", "independence", "theorem1", "theorem2", "corollary")
    for key, statement in STATEMENTS.items():
        assert statement.key == key
        assert ("Huo, Gu, Yang" in statement.source) == (key in published)
        assert (DDG_DELAYS in statement.hypotheses) == (key in published)
        assert (SMALL_STEPS in statement.hypotheses) == (key in published and key != "independence")
        assert (statement.bound is None) == (statement.scope is Scope.INNER_PRODUCT)
    assert STATEMENTS["lemma1"].status is Status.REFUTED
    assert "total expectation for t >= K-1" in STATEMENTS["lemma1"].note


def test_step_rules():
    np.testing.assert_array_equal(constant_steps(0.2, 3), [0.2, 0.2, 0.2])
    np.testing.assert_allclose(harmonic_steps(0.6, 3), [0.6, 0.3, 0.2], rtol=1e-15)
    assert STATEMENTS["theorem2"].step_rule is harmonic_steps


@pytest.mark.parametrize("rule", [constant_steps, harmonic_steps])
@pytest.mark.parametrize("gamma", [0.0, -0.1, float("nan"), float("inf")])
def test_bad_gamma_is_named(rule, gamma):
    with pytest.raises(ValueError, match=f"gamma must be positive and finite, got {gamma}"):
        rule(gamma, 3)


@pytest.mark.parametrize("rule", [constant_steps, harmonic_steps])
def test_bad_iterations_is_named(rule):
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        rule(0.1, 0)


@pytest.mark.parametrize("bound", [theorem1, theorem_a])
def test_constant_step_statements_refuse_other_steps(bound):
    with pytest.raises(ValueError, match="step_sizes must all be the same"):
        bound(EXAMPLE, harmonic_steps(0.1, 2))
