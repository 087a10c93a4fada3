"""The public Hypothesis strategies: they find what is false, and shrink it to what can be read."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddg_sim.methods import ddg
from theory import strategies
from theory.bounds import STATEMENTS
from theory.check import Verdict, check
from theory.delays import delayed


def test_lemma1_falls_by_itself_and_shrinks():
    found = strategies.falsify("lemma1", method=ddg)
    case = found.case
    # Two stages, one term, one sample, one tick: what counterexample (b) says.
    assert len(case.ridge.start) == 2
    assert len(case.ridge.rows) == len(case.ridge.coefficients) == case.iterations == 1
    again = check("lemma1", case.ridge.problem, ddg(2), case.gamma, case.iterations)
    assert again.verdict is Verdict.VIOLATED
    # What is printed builds the same problem.
    assert eval(repr(case), vars(strategies)) == case


def test_a_true_statement_stands_and_a_weakened_one_falls():
    a = STATEMENTS["theorem-a"]
    strategies.assert_statement(a, max_examples=60)
    half = replace(a, key="half", bound=lambda c, steps: 0.25 * a.bound(c, steps))
    with pytest.raises(AssertionError, match="half is violated, measured .*Ridge"):
        strategies.assert_statement(half, max_examples=400)


def test_the_search_is_repeatable():
    wrong = replace(STATEMENTS["theorem-d"], bound=lambda c, steps: 0.0)
    first, second = (strategies.falsify(wrong, max_examples=50, seed=3) for _ in range(2))
    assert first == second is not None
    with pytest.raises(ValueError, match="max_examples must be at least 1, got 0"):
        strategies.falsify(wrong, max_examples=0)
    with pytest.raises(ValueError, match="'lemma9' is unknown"):
        strategies.falsify("lemma9")


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_the_strategies_fit_the_executor(data):
    problem = data.draw(strategies.ridges()).problem
    gammas = data.draw(strategies.step_sizes(4))
    paths = data.draw(strategies.sample_paths(problem.num_samples, 4))
    delays = data.draw(strategies.delay_vectors(len(problem.blocks), 3))
    run = delayed(problem, delays, paths, gammas)
    assert run.w.shape == (5, len(paths), len(problem.start))
    # The constants that the problem claims hold along the run.
    weights = run.w.reshape(-1, len(problem.start))
    assert np.all(problem.value(weights) >= problem.f_star)
    assert np.all(np.sum(problem.full_gradient(weights) ** 2, axis=1) <= problem.M * (1 + 1e-12))


@given(strategies.schedules())
@settings(max_examples=10, deadline=None)
def test_schedules_are_of_methods(schedule):
    assert schedule.method in ("bp", "ddg")
