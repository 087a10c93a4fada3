"""Delayed gradients with any delays, against one straight-line recursion per path."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from noisy_quadratic import NoisyQuadratic, damping

from ddg_sim.methods import ddg
from theory import delays as module
from theory.delays import delayed, uniform_delays
from theory.iterate import iterate, snapshot_delays
from theory.problems import PROBLEMS, make


def straight_line(problem, delay_of, path, gammas):
    """One path: w_k^{t+1} = w_k^t - gamma_t grad_k f_{i(t-d)}(w^{t-d}), d = delay_of(t, k)."""
    w = [problem.start]
    for t, gamma in enumerate(gammas):
        new = w[t].copy()
        for k, block in enumerate(problem.blocks):
            s = t - delay_of(t, k)
            if s >= 0:
                gradient = problem.gradients(w[s][None], np.array([path[s]]))[0]
                new[block] = new[block] - gamma * gradient[block]
        w.append(new)
    return np.array(w)


@st.composite
def runs(draw):
    stages, ticks, paths = draw(st.integers(1, 4)), draw(st.integers(1, 8)), draw(st.integers(1, 5))
    problem = make(draw(st.sampled_from(sorted(PROBLEMS))), stages, num_samples=3)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    samples = rng.integers(0, 3, (paths, ticks))
    return problem, samples, rng.uniform(0.05, 0.4, ticks), rng


@given(runs(), st.sampled_from(["fixed", "by tick", "by path"]))
@settings(deadline=None, max_examples=60)
def test_delayed_is_the_rule_written_out(run, form):
    problem, samples, gammas, rng = run
    paths, ticks = samples.shape
    stages = len(problem.blocks)
    shape = {"fixed": (stages,), "by tick": (ticks, stages), "by path": (ticks, stages, paths)}
    lags = rng.integers(0, ticks + 1, shape[form])
    found = delayed(problem, lags, samples, gammas).w
    whole = np.broadcast_to(lags if lags.ndim == 3 else lags[..., None], (ticks, stages, paths))
    for p, path in enumerate(samples):
        expected = straight_line(problem, lambda t, k, p=p: whole[t, k, p], path, gammas)
        np.testing.assert_allclose(found[:, p], expected, atol=1e-14, rtol=0)


@given(runs())
@settings(deadline=None, max_examples=40)
def test_ddg_is_the_case_of_delays_from_k_minus_1_to_0(run):
    problem, samples, gammas, _ = run
    stages = len(problem.blocks)
    lags = np.minimum(np.arange(stages)[::-1], len(gammas))
    expected = iterate(ddg(stages), problem, samples, gammas).w
    np.testing.assert_allclose(
        delayed(problem, lags, samples, gammas).w, expected, atol=1e-15, rtol=1e-15
    )


@given(runs())
@settings(deadline=None, max_examples=40)
def test_a_schedule_with_delays_that_do_not_grow_does_the_same(run):
    problem, samples, gammas, rng = run
    lags = np.sort(rng.integers(0, len(gammas) + 1, len(problem.blocks)))[::-1]
    schedule = ddg(len(lags), delays=lags.tolist())
    assert snapshot_delays(schedule) == tuple(lags)
    expected = iterate(schedule, problem, samples, gammas).w
    np.testing.assert_allclose(
        delayed(problem, lags, samples, gammas).w, expected, atol=1e-14, rtol=0
    )


@pytest.mark.parametrize("delays", [(1, 2, 0), (2, 1), (1, 0, -1)])
def test_delays_that_no_schedule_has(delays):
    with pytest.raises(ValueError, match="delays must be 3 numbers that do not grow, at least 0"):
        ddg(3, delays=delays)


@pytest.mark.parametrize("form", ["fixed", "by path"])
def test_groups_of_paths_change_nothing(form, monkeypatch):
    problem = make("kuramoto", 3)
    rng = np.random.default_rng(1)
    samples = rng.integers(0, 2, (23, 9))
    lags = (3, 0, 2) if form == "fixed" else rng.integers(0, 6, (9, 3, 23))
    whole = delayed(problem, lags, samples, np.full(9, 0.3)).w
    monkeypatch.setattr(module, "GROUP", 5)
    np.testing.assert_allclose(
        delayed(problem, lags, samples, np.full(9, 0.3)).w, whole, atol=1e-15, rtol=0
    )


@pytest.mark.parametrize("delay", [0, 1, 5, 12])
def test_sum_of_squares_of_the_delayed_quadratic(delay):
    # Anchor: w_{t+1} = w_t - x w_{t-delay} from 1 has sum w_t^2 = 1/(2 x c(x)).
    x, ticks = np.sin(np.pi / (4 * delay + 2)), 1200  # half of the stability limit
    run = delayed(NoisyQuadratic(1), [delay], np.zeros((1, ticks), dtype=int), np.full(ticks, x))
    assert np.sum(run.w**2) == pytest.approx(1 / (2 * x * damping(delay, x)), rel=1e-12)


def test_random_delays_are_drawn_once_and_may_skip_and_repeat():
    problem, law = make("geman-mcclure", 2), uniform_delays(4, seed=7)
    samples = np.zeros((3, 12), dtype=int)
    drawn = law((12, 2, 3))
    assert drawn.min() == 0
    assert drawn.max() == 4
    one, other = (delayed(problem, d, samples, np.full(12, 0.2)).w for d in (law, drawn))
    np.testing.assert_array_equal(one, other)
    assert np.ptp(one[-1], axis=0).max() > 1e-3  # the paths' samples agree, their delays do not


def test_errors_name_argument_and_value():
    problem, samples, steps = make("kuramoto", 2), np.zeros((1, 3), dtype=int), np.full(3, 0.1)

    def run(delays=(1, 0), paths=samples, gammas=steps):
        return delayed(problem, delays, paths, gammas)

    with pytest.raises(ValueError, match="delays must be at least 0, got -1"):
        run([1, -1])
    with pytest.raises(ValueError, match="delays must be at most the 3 ticks of the run, got 4"):
        run([4, 0])
    with pytest.raises(ValueError, match=r"shape \(2,\), \(3, 2\) or \(3, 2, 1\), got \(3,\)"):
        run([1, 1, 1])
    with pytest.raises(ValueError, match=r"delays must have shape .* got \(1, 2, 3\)"):
        run(lambda shape: np.zeros(shape[::-1], dtype=int))
    with pytest.raises(ValueError, match="delays must be whole ticks of 64 bits, got float64"):
        run([1.0, 0.0])
    with pytest.raises(ValueError, match=r"paths must have shape \(P >= 1, 3\), got \(1, 2\)"):
        run(paths=samples[:, :2])
    with pytest.raises(ValueError, match="step_sizes must be a vector of positive"):
        run(gammas=[])
    for beta in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got"):
            delayed(problem, [1, 0], samples, steps, momentum=beta)
    with pytest.raises(ValueError, match="longest must be at least 0, got -2"):
        uniform_delays(-2, seed=0)
