import itertools
import math
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import example, given, target
from hypothesis import strategies as st
from noisy_quadratic import NoisyQuadratic, damping

from ddg_sim.methods import Semantics, bp, ddg
from theory import counterexamples, paths
from theory.bounds import STATEMENTS
from theory.check import Verdict, check
from theory.corrected import THEOREM_A
from theory.motion import motion
from theory.paths import count_paths, mean_squared_gradients, sample_paths, worst_step
from theory.problems import PROBLEMS, make, one_sided_cosine, opposed_cosines
from theory.statement import Constants, harmonic_steps

#: The families with a finite M, without which the statements have no right side.
BOUNDED = [name for name in PROBLEMS if math.isfinite(make(name, 1).M)]


def naive_runs(problem, gamma, ticks):
    """All paths of DDG one by one, as (path, [w^0, ..., w^T])."""
    stages = len(problem.blocks)
    for path in itertools.product(range(problem.num_samples), repeat=ticks):
        w = [problem.start]
        for t in range(ticks):
            new = w[t].copy()
            for k, block in enumerate(problem.blocks):
                s = t - (stages - 1 - k)
                if s >= 0:
                    g = problem.gradients(w[s][None], np.array([path[s]]))[0]
                    new[block] -= gamma * g[block]
            w.append(new)
        yield path, w


def naive_worst_step(problem, gamma, ticks, constant):
    """(excess, t, left, right) of the worst conditional step, histories told apart by w^t."""
    histories = defaultdict(list)
    for _, w in naive_runs(problem, gamma, ticks):
        for t in range(ticks):
            histories[t, tuple(np.round(w[t], 10))].append((w[t], w[t + 1]))
    found = []
    for (t, _), steps in histories.items():
        before = np.array([now for now, _ in steps])
        after = np.array([then for _, then in steps])
        left = float(np.mean(problem.value(after) - problem.value(before)))
        slope = float(np.sum(problem.full_gradient(before[:1]) ** 2))
        right = constant - gamma / 2 * slope
        found.append((left - right, t, left, right))
    return max(found)


# --- The counterexamples, to the printed digits ---------------------------------------------------


def test_counterexample_a_a_sample_that_w_depends_on():
    sides = counterexamples.dependent_sample()
    assert f"{sides.left:.1e}" == "-1.5e-09"
    assert f"{sides.right:.2e}" == "-6.40e-04"
    assert sides.left > sides.right
    total = counterexamples.dependent_sample_total()
    assert f"{total.left:.1e}" == "-2.0e-03"
    assert total.left < total.right


def test_counterexample_b_an_idle_stage():
    sides = counterexamples.idle_stage()
    assert sides.left == 0.0
    assert sides.right == pytest.approx(-3.2e-3, rel=1e-12)


def test_counterexample_c_the_independence_step():
    sides = counterexamples.independence_step()
    assert f"{sides.left:.4f} {sides.right:.4f}" == "0.3082 0.4588"
    # By hand: w^1 = (pi/4, -gamma c sin(pi/4)) for c = 3, -1, and grad_1 f = sin.
    s = math.sin(math.pi / 4)
    moved = [math.sin(math.pi / 4 - 0.1 * c * s) for c in (3, -1)]
    assert sides.left == pytest.approx((3 * moved[0] - moved[1]) / 2 * s, rel=1e-14)
    assert sides.right == pytest.approx((moved[0] + moved[1]) / 2 * s, rel=1e-14)


def test_check_finds_counterexample_a():
    report = check("lemma1", opposed_cosines(), ddg(2), gamma=1e-3, iterations=2)
    assert (report.verdict, report.step, report.status) == ("VIOLATED", 1, "refuted as stated")
    sides = counterexamples.dependent_sample()
    assert (report.measured, report.bound) == pytest.approx((sides.left, sides.right), rel=1e-6)
    assert "all stages at work" in report.reason
    assert report.failing == ()


def test_check_finds_counterexample_b():
    report = check("lemma1", one_sided_cosine(), ddg(2), gamma=0.01, iterations=3)
    assert (report.verdict, report.step, report.paths) == ("VIOLATED", 0, 1)
    assert report.measured == 0.0
    assert report.bound == pytest.approx(-3.2e-3, rel=1e-12)
    assert math.isnan(report.tightness)
    assert report.nonvacuous  # it promises a decrease, and breaks the promise
    assert "warm-up" in report.reason


def test_lemma1_on_kuramoto_is_violated_in_the_warm_up():
    problem = make("kuramoto", 2)
    report = check("lemma1", problem, ddg(2), gamma=0.01, iterations=8)
    assert (report.verdict, report.step, report.paths) == ("VIOLATED", 0, 256)
    # At t = 0 the hub idles and only the leaves move.
    leaves = np.tile(problem.start, (2, 1))
    leaves[:, 1:] -= 0.01 * problem.gradients(leaves, np.array([0, 1]))[:, 1:]
    left = problem.value(leaves).mean() - problem.value(problem.start[None])[0]
    slope = np.sum(problem.full_gradient(problem.start[None]) ** 2)
    right = -0.005 * slope + 1e-4 * (9 / 8) * (2 + 16) * (5 / 4)
    assert (report.measured, report.bound) == pytest.approx((left, right), rel=1e-11)


@pytest.mark.parametrize("key", ["lemma1", "lemma1-prime"])
def test_every_step_has_the_constant_of_its_own_step_size(key):
    # Claimed is only what smoothness gives without delay: c = gamma_t^2 L M/2. With the last, least
    # gamma_t in all places the first step would exceed it.
    statement = replace(
        STATEMENTS[key],
        step_rule=harmonic_steps,
        bound=lambda constants, gammas: gammas[-1] ** 2 * constants.L * constants.M / 2,
    )
    problem = NoisyQuadratic(1, noise=1.0, w_1=0.0, M=2.0)  # E f(w^1) = gamma_0^2/2
    assert check(statement, problem, ddg(1), 0.5, 6).verdict == "VERIFIED"


def test_lemma1_holds_without_delay():
    for name, gamma in itertools.product(BOUNDED, (1e-3, 0.1, 0.5)):
        assert check("lemma1", make(name, 1), ddg(1), gamma, 6).verdict == "VERIFIED"


# --- Enumeration against a loop over single paths -------------------------------------------------


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize(("stages", "samples"), [(1, 2), (2, 3), (3, 1), (3, 2)])
def test_mean_squared_gradients_against_single_paths(name, stages, samples):
    problem = make(name, stages, samples)
    runs = [w for _, w in naive_runs(problem, 0.3, 4)]
    expected = [
        np.mean([np.sum(problem.full_gradient(w[t][None]) ** 2) for w in runs]) for t in range(4)
    ]
    measured = mean_squared_gradients(ddg(stages), problem, [0.3] * 4)
    np.testing.assert_allclose(measured, expected, rtol=1e-12)
    report = check("theorem-a", problem, ddg(stages), 0.3, 4)
    assert report.measured == pytest.approx(np.mean(expected), rel=1e-12)
    assert report.paths == samples**4


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize(
    ("stages", "samples", "gamma"),
    [(1, 2, 0.1), (2, 2, 1e-3), (2, 3, 0.1), (3, 1, 0.1), (3, 2, 0.1)],
)
def test_worst_step_against_single_paths(name, stages, samples, gamma):
    problem = make(name, stages, samples)
    worst = worst_step(motion(ddg(stages), 1), problem, [gamma] * 4, constant=1e-3)
    excess, t, left, right = naive_worst_step(problem, gamma, 4, constant=1e-3)
    assert worst.left - worst.right == pytest.approx(excess, abs=1e-14)
    assert (worst.t, worst.left, worst.right) == pytest.approx((t, left, right), abs=1e-14)


def test_the_condition_is_the_weights_and_not_the_history():
    # Stage 1 applies xi_{t-1} at t, and nothing else depends on xi_{t-1} before: given w^t it is
    # still a fair coin, given the history it is known. Lemma 1 claims the former only.
    problem, gamma, ticks = NoisyQuadratic(2, noise=2.0, w_1=0.2), 0.1, 4
    worst = worst_step(motion(ddg(2), 1), problem, [gamma] * ticks, 0.0)
    excess, t, left, right = naive_worst_step(problem, gamma, ticks, 0.0)
    assert (worst.t, worst.left, worst.right) == pytest.approx((t, left, right), abs=1e-14)
    given_history = max(
        problem.value(w[t + 1][None])[0] - problem.value(w[t][None])[0] + gamma / 2 * w[t][0] ** 2
        for _, w in naive_runs(problem, gamma, ticks)
        for t in range(ticks)
    )
    assert given_history > excess + 0.01


def test_equal_samples_are_one_sample():
    twice = replace(one_sided_cosine(), coefficients=np.ones((2, 1)))
    one = worst_step(motion(ddg(2), 1), one_sided_cosine(), [0.1] * 5, 0.0)
    two = worst_step(motion(ddg(2), 1), twice, [0.1] * 5, 0.0)
    assert one == two


@pytest.mark.parametrize("name", BOUNDED)
def test_batches_do_not_show(name, monkeypatch):
    problem, gammas = make(name, 2), np.full(7, 0.2)
    squares = mean_squared_gradients(ddg(2), problem, gammas)
    worst = worst_step(motion(ddg(2), 1), problem, gammas, 0.0)
    monkeypatch.setattr(paths, "BATCH_NUMBERS", 40)
    np.testing.assert_allclose(mean_squared_gradients(ddg(2), problem, gammas), squares, rtol=1e-14)
    batched = worst_step(motion(ddg(2), 1), problem, gammas, 0.0)
    assert (batched.t, batched.left, batched.right) == pytest.approx(
        (worst.t, worst.left, worst.right), rel=1e-12
    )


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_additive_noise_against_its_covariance(delay):
    # Anchor: w_t = h_t w_0 - gamma sum_j h_j xi_{t-1-delay-j}, h the noise-free run from 1, so
    # E w_t^2 = h_t^2 w_0^2 + gamma^2 s^2 sum_{j < t-delay} h_j^2: enumeration = recursion.
    gamma, noise, ticks = 0.2, 0.7, 12
    problem = NoisyQuadratic(delay + 1, noise=noise, w_1=1.5)
    h = [1.0]
    for t in range(ticks):
        h.append(h[t] - gamma * h[t - delay] if t >= delay else h[t])
    expected = [
        (1.5 * h[t]) ** 2 + (gamma * noise) ** 2 * sum(g * g for g in h[: max(0, t - delay)])
        for t in range(ticks)
    ]
    measured = mean_squared_gradients(ddg(delay + 1), problem, np.full(ticks, gamma))
    np.testing.assert_allclose(measured, expected, rtol=1e-13)
    # And the sum is on its way to the stationary gamma s^2 / (2 c).
    assert measured[-1] < 1.5**2 * h[ticks - 1] ** 2 + gamma * noise**2 / (
        2 * damping(delay, gamma)
    )


def test_sample_paths_are_all_there_once_in_order():
    rows = [tuple(row) for row in sample_paths(3, 4, 0, 81)]
    assert rows == list(itertools.product(range(3), repeat=4))


# --- Verdicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["theorem1", "theorem2", "theorem-a"])
@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_theorems_hold_in_total_expectation(key, name, stages):
    for gamma in (1e-3, 0.1):
        report = check(key, make(name, stages), ddg(stages), gamma, 8)
        assert report.verdict is Verdict.VERIFIED, report
        assert report.failing == ()
        assert report.tightness == pytest.approx(report.measured / report.bound)
        assert 0 < report.tightness < 1


@given(
    name=st.sampled_from(BOUNDED),
    stages=st.integers(1, 4),
    samples=st.integers(1, 3),
    seed=st.integers(0, 20),
    gamma=st.integers(1, 40).map(lambda k: k / 20),
)
@example(name="kuramoto", stages=2, samples=2, seed=0, gamma=0.01)
def test_theorem_a_holds_for_any_gamma(name, stages, samples, seed, gamma):
    problem = make(name, stages, samples, seed)
    report = check("theorem-a", problem, ddg(stages), gamma, iterations=5)
    target(report.tightness)
    assert report.verdict is Verdict.VERIFIED


def test_nonvacuous_bounds_exist_and_are_recognised():
    good = check("theorem-a", make("kuramoto", 1), ddg(1), gamma=0.5, iterations=8)
    assert good.nonvacuous
    assert good.bound < make("kuramoto", 1).M
    assert not check("theorem1", make("kuramoto", 3), ddg(3), 0.5, 8).nonvacuous


def test_a_bound_above_the_starting_gradients_is_vacuous():
    # Close to the minimum 2 L gap is below M; a bound in between says nothing about G_t.
    problem = NoisyQuadratic(1, w_1=0.01, M=1.0)
    report = check("theorem-a", problem, ddg(1), gamma=0.5, iterations=4)
    assert 2 * problem.L * 0.5 * 0.01**2 < report.bound < problem.M
    assert not report.nonvacuous


def test_theorem2_weighs_the_ticks_with_their_step_sizes():
    problem = make("kuramoto", 2)
    gammas = 0.5 / (1 + np.arange(5))
    squares = mean_squared_gradients(ddg(2), problem, gammas)
    weighted = (gammas @ squares) / gammas.sum()
    assert abs(weighted - squares.mean()) > 0.01
    report = check("theorem2", problem, ddg(2), gamma=0.5, iterations=5)
    assert report.measured == pytest.approx(weighted, rel=1e-12)


def test_large_steps_are_outside_theorem1_but_not_theorem_a():
    problem = make("kuramoto", 2)
    report = check("theorem1", problem, ddg(2), gamma=2.0, iterations=4)
    assert report.verdict == "NOT APPLICABLE"
    assert report.failing == ("gamma_t L <= 1 for every t (here gamma_0 L = 2.25)",)
    assert report.failing[0] in report.reason
    assert math.isnan(report.tightness)  # the right side bounds nothing
    assert not report.nonvacuous
    assert report.measured > 0
    assert check("theorem-a", problem, ddg(2), gamma=2.0, iterations=4).failing == ()


def test_a_step_size_of_exactly_one_over_L_is_allowed():
    problem = make("geman-mcclure", 2)
    assert check("theorem1", problem, ddg(2), gamma=1 / problem.L, iterations=4).failing == ()


def test_other_delays_are_outside_the_paper_but_not_theorem_a():
    problem = make("kuramoto", 3)
    report = check("theorem1", problem, bp(3), gamma=0.1, iterations=4)
    assert report.verdict == "NOT APPLICABLE"
    assert "here d = (0, 0, 0)" in report.reason
    report = check("theorem-a", problem, bp(3), gamma=0.1, iterations=4)
    assert report.verdict == "VERIFIED"
    # D = 0 enters the bound: the same as without stages.
    assert report.bound == check("theorem-a", make("kuramoto", 1), bp(1), 0.1, 4).bound


@pytest.mark.parametrize("semantics", [Semantics.CURRENT, Semantics.REPLAY])
def test_other_readings_are_outside_theorem_a(semantics):
    schedule = ddg(3, semantics=semantics)
    report = check("theorem-a", make("rotation-chain", 3), schedule, gamma=0.1, iterations=5)
    assert report.verdict == "NOT APPLICABLE"
    assert "does not read the weights" in report.reason


# --- A check that can fail ------------------------------------------------------------------------


@dataclass(frozen=True)
class Declared:
    """A problem with constants that somebody got wrong."""

    problem: object
    M: float

    def __getattr__(self, name):
        return getattr(self.problem, name)


def noisy_run():
    """Steps, and M along the run, of a quadratic on which Theorem A is nearly attained."""
    problem = NoisyQuadratic(1, noise=1.0, w_1=0.0)
    squares = mean_squared_gradients(ddg(1), problem, np.full(14, 0.5))
    return Declared(problem, 1.0 + squares.max())


def test_a_wrong_M_is_caught():
    honest = noisy_run()
    assert check("theorem-a", honest, ddg(1), 0.5, 14).verdict == "VERIFIED"
    with pytest.raises(ValueError, match=r"is wrong: M = 0.333\d*, but E.* = 1.33"):
        check("theorem-a", replace(honest, M=honest.M / 4), ddg(1), 0.5, 14)


def test_a_second_term_four_times_too_small_is_caught():
    def too_small(constants: Constants, step_sizes):
        first = THEOREM_A.bound(replace(constants, M=0.0), step_sizes)
        return first + (THEOREM_A.bound(constants, step_sizes) - first) / 4

    report = check(replace(THEOREM_A, bound=too_small), noisy_run(), ddg(1), 0.5, 14)
    assert report.verdict == "VIOLATED"
    assert report.measured > report.bound + report.rounding


def test_equality_up_to_rounding_is_no_violation():
    problem = make("kuramoto", 2)
    measured = check("theorem-a", problem, ddg(2), 0.1, 4).measured
    for factor, verdict in ((1 - 1e-11, "VIOLATED"), (1 - 1e-13, "INCONCLUSIVE"), (1, "VERIFIED")):
        statement = replace(THEOREM_A, bound=lambda _, __, b=measured * factor: b)
        assert check(statement, problem, ddg(2), 0.1, 4).verdict == verdict


# --- Errors ---------------------------------------------------------------------------------------


def test_too_many_paths_names_the_argument_and_what_fits():
    with pytest.raises(
        ValueError, match=r"iterations = 24 means 2\^24 sample paths, .* at most 23 fit"
    ):
        check("lemma1", make("kuramoto", 2), ddg(2), 0.1, 24)
    with pytest.raises(ValueError, match="at most 14 fit"):
        check("lemma1-prime", make("kuramoto", 2, num_samples=3), ddg(2), 0.1, 15)
    assert count_paths(1, 10**6) == 1
    assert count_paths(10, 7) == 10**7


@pytest.mark.parametrize("key", STATEMENTS)
@pytest.mark.parametrize("gamma", [0.0, -1.0, math.nan, math.inf])
def test_bad_gamma_is_named(key, gamma):
    with pytest.raises(ValueError, match=f"gamma must be positive and finite, got {gamma}"):
        check(key, make("kuramoto", 2), ddg(2), gamma, 4)


def test_other_errors_name_argument_and_value():
    problem = make("kuramoto", 2)
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        check("theorem1", problem, ddg(2), 0.1, 0)
    with pytest.raises(ValueError, match="statement 'theorem9' is unknown; known are lemma1"):
        check("theorem9", problem, ddg(2), 0.1, 4)
    with pytest.raises(ValueError, match="schedule has 3 stages"):
        check("theorem1", problem, ddg(3), 0.1, 4)
    with pytest.raises(ValueError, match="has no stages that could tell the two apart"):
        check("theorem-a", problem, ddg(2, semantics=Semantics.REPLAY), 0.1, 4)
