import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from noisy_quadratic import NoisyQuadratic, damping, stability_limit

from ddg_sim.methods import Semantics, bp, ddg, method
from ddg_sim.rule import Jacobian, Rule
from ddg_sim.schedule import Schedule, backward, forward, update
from theory import iterate as module
from theory.chain import Chain
from theory.iterate import iterate, snapshot_delays
from theory.paths import sample_paths
from theory.problems import PROBLEMS, make

STAGES = [1, 2, 3, 4, 5]


def random_run(problem, ticks=9, paths=6, seed=3):
    rng = np.random.default_rng(seed)
    return rng.integers(0, problem.num_samples, (paths, ticks)), rng.uniform(0.05, 0.4, ticks)


def delayed_gradient_oracle(problem, paths, gammas):
    """w_k^{t+1} = w_k^t - gamma_t grad_k f_{i(t-d_k)}(w^{t-d_k}), nothing while t < d_k."""
    stages = len(problem.blocks)
    w = [np.tile(problem.start, (len(paths), 1))]
    for t, gamma in enumerate(gammas):
        new = w[t].copy()
        for k, block in enumerate(problem.blocks):
            delay = stages - 1 - k
            if t >= delay:
                gradient = problem.gradients(w[t - delay], paths[:, t - delay])
                new[:, block] -= gamma * gradient[:, block]
        w.append(new)
    return np.array(w)


def sgd_oracle(problem, paths, gammas):
    w = [np.tile(problem.start, (len(paths), 1))]
    for t, gamma in enumerate(gammas):
        w.append(w[t] - gamma * problem.gradients(w[t], paths[:, t]))
    return np.array(w)


def chain_oracle(chain, path, gammas, semantics):
    """One path of DDG on a rotation chain in plain scalar steps, by the text of each reading."""
    stages = len(chain.start)

    def rotation(angle):
        return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])

    def derivative(angle):
        return np.array([[-math.sin(angle), -math.cos(angle)], [math.cos(angle), -math.sin(angle)]])

    w = [chain.start.copy()]
    inputs, outputs, deltas = {}, {}, {}
    for t, gamma in enumerate(gammas):
        h = chain.h_0[path[t]]
        for k in range(stages):
            inputs[k, t] = h
            h = outputs[k, t] = np.tanh(rotation(w[t][k]) @ h)
        new = w[t].copy()
        for k in range(stages):
            s = t - (stages - 1 - k)
            if s < 0:
                continue
            angle = w[s][k] if semantics is Semantics.STASH else w[t][k]
            out = outputs[k, s]
            if semantics is Semantics.REPLAY:
                out = np.tanh(rotation(angle) @ inputs[k, s])
            # delta of stage k + 1 was computed in the tick before, from its own reading.
            delta = out - chain.targets[path[s]] if k == stages - 1 else deltas[k + 1, s]
            inner = delta * (1 - out**2)
            new[k] -= gamma * inner @ (derivative(angle) @ inputs[k, s])
            deltas[k, s] = rotation(angle).T @ inner
        w.append(new)
    return np.array(w)


@dataclass(frozen=True)
class WithoutStages:
    """A rotation chain that hides its stages: only whole gradients can be asked for."""

    chain: Chain

    def __getattr__(self, name):
        if name in ("inputs", "forward", "backward"):
            raise AttributeError(name)
        return getattr(self.chain, name)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("stages", STAGES)
def test_ddg_is_the_delayed_gradient_rule(name, stages):
    problem = make(name, stages, num_samples=3)
    paths, gammas = random_run(problem)
    run = iterate(ddg(stages), problem, paths, gammas)
    expected = delayed_gradient_oracle(problem, paths, gammas)
    np.testing.assert_allclose(run.w, expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("stages", STAGES)
def test_bp_is_sgd(name, stages):
    problem = make(name, stages, num_samples=3)
    paths, gammas = random_run(problem)
    run = iterate(bp(stages), problem, paths, gammas)
    np.testing.assert_allclose(run.w, sgd_oracle(problem, paths, gammas), atol=1e-13, rtol=0)


def test_the_oracles_differ_where_there_is_delay():
    problem = make("kuramoto", 3)
    paths, gammas = random_run(problem)
    delayed, plain = (
        oracle(problem, paths, gammas) for oracle in (delayed_gradient_oracle, sgd_oracle)
    )
    assert np.abs(delayed - plain).max() > 0.01


@pytest.mark.parametrize("stages", STAGES)
def test_propagating_equals_whole_gradients_with_stashed_weights(stages):
    chain = make("rotation-chain", stages)
    paths, gammas = random_run(chain)
    propagated = iterate(ddg(stages), chain, paths, gammas)
    whole = iterate(ddg(stages), WithoutStages(chain), paths, gammas)
    np.testing.assert_allclose(propagated.w, whole.w, atol=1e-14, rtol=0)


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("semantics", Semantics)
def test_the_three_readings_equal_their_scalar_oracles(stages, semantics):
    chain = make("rotation-chain", stages)
    paths, gammas = random_run(chain)
    run = iterate(ddg(stages, semantics=semantics), chain, paths, gammas)
    for p, path in enumerate(paths):
        expected = chain_oracle(chain, path, gammas, semantics)
        np.testing.assert_allclose(run.w[:, p], expected, atol=1e-13, rtol=0)


def test_the_three_readings_differ():
    chain = make("rotation-chain", 3)
    paths, gammas = random_run(chain, ticks=12)
    stash, current, replay = (
        iterate(ddg(3, semantics=semantics), chain, paths, gammas).w[-1] for semantics in Semantics
    )
    for one, other in ((stash, current), (stash, replay), (current, replay)):
        assert np.abs(one - other).max() > 1e-4


@pytest.mark.parametrize("semantics", Semantics)
def test_without_delay_the_three_readings_are_sgd(semantics):
    chain = make("rotation-chain", 1)
    paths, gammas = random_run(chain)
    run = iterate(ddg(1, semantics=semantics), chain, paths, gammas)
    np.testing.assert_allclose(run.w, sgd_oracle(chain, paths, gammas), atol=1e-14, rtol=0)


@given(st.randoms(use_true_random=False), st.sampled_from(sorted(PROBLEMS)), st.integers(1, 3))
@settings(max_examples=30)
def test_sharing_beginnings_changes_nothing(random, name, stages):
    problem = make(name, stages)
    paths = sample_paths(2, 5, 0, 32)
    order = np.array(random.sample(range(32), 32))
    together = iterate(ddg(stages), problem, paths, np.full(5, 0.2))
    shuffled = iterate(ddg(stages), problem, paths[order], np.full(5, 0.2))
    assert [len(rows) for rows in together.distinct] == [1, 2, 4, 8, 16, 32]
    np.testing.assert_allclose(together.w[:, order], shuffled.w, atol=1e-15, rtol=0)
    for p in (0, 13):
        alone = iterate(ddg(stages), problem, paths[p : p + 1], np.full(5, 0.2))
        np.testing.assert_allclose(together.w[:, p], alone.w[:, 0], atol=1e-15, rtol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("key", ["ddg", "spectrain", "fr"])
def test_groups_of_paths_change_nothing(key, momentum, monkeypatch):
    chain, schedule, steps = make("rotation-chain", 3), method(key, 3), np.full(7, 0.3)
    paths = np.random.default_rng(1).integers(0, 2, (23, 7))
    whole = iterate(schedule, chain, paths, steps, momentum=momentum)
    assert len(whole.distinct[0]) == 1
    monkeypatch.setattr(module, "GROUP", 5)
    groups = iterate(schedule, chain, paths, steps, momentum=momentum)
    assert [len(rows) for rows in groups.distinct] == [23] * 8
    np.testing.assert_allclose(groups.w, whole.w, atol=1e-15, rtol=0)
    # Not where beginnings are shared: every group would compute them again.
    every = iterate(schedule, chain, sample_paths(2, 7, 0, 2**7), steps, momentum=momentum)
    assert len(every.distinct[0]) == 1


def test_micro_batches_are_averaged():
    # Two samples a tick, both forward and backward before the one update.
    body = (
        forward(0, 0), backward(0, 0), forward(0, 1), backward(0, 1), update(0, 1),
    )  # fmt: skip
    schedule = Schedule("two", 1, (body,), samples_per_iteration=2)
    problem = make("geman-mcclure", 1)
    run = iterate(schedule, problem, np.array([[0, 1, 0, 0]]), [0.1, 0.2])
    w_1 = problem.start - 0.1 * problem.full_gradient(problem.start[None])[0]
    w_2 = w_1 - 0.2 * problem.gradients(w_1[None], np.array([0]))[0]
    np.testing.assert_allclose(run.w[:, 0], [problem.start, w_1, w_2], atol=1e-15)


@pytest.mark.parametrize(
    ("delay", "fraction", "ticks"),
    [(0, 0.5, 50), (1, 0.2, 150), (1, 0.8, 200), (2, 0.5, 170), (4, 0.5, 310), (7, 0.5, 520)],
)
def test_sum_of_squares_of_the_delayed_quadratic(delay, fraction, ticks):
    # Anchor: w_{t+1} = w_t - x w_{t-delay} from 1 has sum w_t^2 = 1/(2 x c(x)). A delay that is
    # off by one changes it by far more than the tolerance.
    x = fraction * stability_limit(delay)
    problem = NoisyQuadratic(delay + 1)
    run = iterate(ddg(delay + 1), problem, np.zeros((1, ticks), dtype=int), np.full(ticks, x))
    w = run.w[:, 0, 0]
    assert np.abs(w[-10:]).max() < 1e-7  # whose square is below the tolerance
    assert math.fsum(w**2) == pytest.approx(1 / (2 * x * damping(delay, x)), rel=1e-12)


@pytest.mark.parametrize("delay", [0, 1, 2, 5])
def test_stability_limit_of_the_delayed_quadratic(delay):
    problem = NoisyQuadratic(delay + 1)
    ticks = 400
    for factor, grows in ((0.97, False), (1.03, True)):
        gammas = np.full(ticks, factor * stability_limit(delay))
        run = iterate(ddg(delay + 1), problem, np.zeros((1, ticks), dtype=int), gammas)
        w = np.abs(run.w[:, 0, 0])
        assert (w[-100:].max() > w[:100].max()) is np.bool_(grows)


def test_snapshot_delays():
    assert snapshot_delays(ddg(4)) == (3, 2, 1, 0)
    assert snapshot_delays(bp(3)) == (0, 0, 0)
    assert snapshot_delays(bp(1)) == (0,)


@pytest.mark.parametrize("semantics", [Semantics.CURRENT, Semantics.REPLAY])
def test_snapshot_delays_refuses_other_readings(semantics):
    with pytest.raises(ValueError, match=r"[BR]0\(\d+\)v\d+@\d+ does not read the weights"):
        snapshot_delays(ddg(3, semantics=semantics))


def test_snapshot_delays_refuses_inconsistent_weights():
    # A pipeline: stage 1 sees a sample one tick later, with weights one update newer.
    late = Schedule(
        "late", 2, ((forward(0), backward(0, -1), update(0, -1)),
                    (forward(1, -1), backward(1, -1), update(1, -1))),
    )  # fmt: skip
    with pytest.raises(ValueError, match="does not read the weights with which tick"):
        snapshot_delays(late)


@pytest.mark.parametrize("semantics", [Semantics.CURRENT, Semantics.REPLAY])
def test_a_problem_without_stages_cannot_tell_readings_apart(semantics):
    problem = make("kuramoto", 2)
    paths, gammas = random_run(problem)
    with pytest.raises(ValueError, match="'kuramoto' has no stages that could tell the two apart"):
        iterate(ddg(2, semantics=semantics), problem, paths, gammas)


def test_errors_name_argument_and_value():
    problem = make("kuramoto", 2)
    good, steps = np.zeros((1, 2), dtype=int), [0.1, 0.1]
    with pytest.raises(ValueError, match="schedule has 3 stages, problem 'kuramoto' has 2 blocks"):
        iterate(ddg(3), problem, good, steps)
    with pytest.raises(ValueError, match=r"step_sizes must be .* got \[0.1 0. \]"):
        iterate(ddg(2), problem, good, [0.1, 0.0])
    with pytest.raises(ValueError, match=r"paths must have shape \(P >= 1, 2\), got \(1, 3\)"):
        iterate(ddg(2), problem, np.zeros((1, 3), dtype=int), steps)
    with pytest.raises(ValueError, match=r"paths must have shape \(P >= 1, 2\), got \(0, 2\)"):
        iterate(ddg(2), problem, np.zeros((0, 2), dtype=int), steps)
    with pytest.raises(ValueError, match=r"indices in \[0, 2\), got 2..2"):
        iterate(ddg(2), problem, good + 2, steps)
    with pytest.raises(ValueError, match="paths must hold integers, got float64"):
        iterate(ddg(2), problem, good * 1.0, steps)


def test_a_deadlock_is_reported():
    # Stage 1 runs a sample backward before it has run it forward.
    stuck = Schedule(
        "stuck",
        2,
        ((forward(0), backward(0), update(0)), (backward(1), forward(1), update(1))),
        rule=Rule(jacobian=Jacobian.CURRENT),
    )
    with pytest.raises(ValueError, match=r"deadlocks: B0\(0\)v0@0, B1\(0\)v0@0 wait"):
        iterate(stuck, make("kuramoto", 2), np.array([[0]]), [0.1])
