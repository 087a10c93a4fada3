"""Statements that were proved or conjectured here: exact anchors, faults, hypotheses, errors."""

import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.mathtext import MathTextParser

from ddg_sim.methods import Semantics, ddg, dp, fr
from theory import motion as motions
from theory import paths
from theory.bounds import STATEMENTS
from theory.check import MonteCarlo, Verdict, check
from theory.delayed_bounds import lemma1_prime, theorem_a, theorem_a_young, theorem_m, theorem_v
from theory.iterate import snapshot_delays
from theory.links import COSINE
from theory.motion import motion
from theory.paths import expectations, mean_squared_gradients, sampled_averages
from theory.probe import GivenProblem
from theory.problems import make, one_sided_cosine, opposed_cosines
from theory.quadratic import NoisyQuadratic
from theory.ridge import RidgeSum
from theory.stability import c_tau, stable_limit
from theory.statement import Constants, Status


def parabola(noise=0.0, start=1.0, stages=1):
    """f = w^2/2 in the first stage, with noise +-xi: L = 1."""
    matrix = np.zeros((stages, stages))
    matrix[0, 0] = 1.0
    first = np.eye(stages)[0]
    xi = np.array([first, -first]) * noise if noise else np.zeros((1, stages))
    blocks = tuple(slice(k, k + 1) for k in range(stages))
    return NoisyQuadratic("parabola", matrix, np.zeros(stages), xi, start * first, blocks)


@pytest.mark.parametrize("key", STATEMENTS)
def test_latex_is_set(key):
    MathTextParser("agg").parse(f"${STATEMENTS[key].latex}$")


# --- Bounds by hand -------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2, 3, 6])
def test_lemma1_prime_has_ddgs_constant(stages):
    x = 0.3
    constants = Constants(L=2.0, M=5.0, gap=1.0, delays=tuple(range(stages - 1, -1, -1)))
    c = 0.5 * (stages**2 + x * stages * (stages - 1) * (5 * stages - 4) / 6)
    assert lemma1_prime(constants, [x / 2] * 9) == pytest.approx(0.15**2 * 2 * 5 * c, rel=1e-14)


@pytest.mark.parametrize(("delay", "gamma"), [(0, 0.5), (1, 0.3), (4, 0.01), (4, 3.0)])
def test_the_young_parameter_is_the_best(delay, gamma):
    one = Constants(L=2.0, M=5.0, gap=0.7, delays=(delay, 0))
    p, q = 0.7 / (gamma * 9) + gamma * 5, 2 * gamma**2 * 5 * delay**2
    grid = np.linspace(1e-4, 1.9999, 20001)
    best = np.min((p + q / grid) / (1 - grid / 2))
    assert theorem_a_young(one, [gamma] * 9) == pytest.approx(best, rel=1e-4)
    assert theorem_a_young(one, [gamma] * 9) <= theorem_a(one, [gamma] * 9)


def test_momentum_of_zero_is_theorem_a():
    one = Constants(L=2.0, M=5.0, gap=0.7, delays=(2, 0))
    assert theorem_m(one, [0.1] * 5) == theorem_a(one, [0.1] * 5)


def test_theorem_v_ends_at_one_and_a_half():
    for delay in range(6):
        one = Constants(L=2.0, M=math.inf, gap=0.0, delays=(delay,), variance=3.0)
        gamma = 1 / (4 * (2 * delay + 1))
        assert theorem_v(one, [gamma] * 5) <= 1.5 * gamma * 2 * 3


# --- Anchors: both sides are known ----------------------------------------------------------------


@pytest.mark.parametrize("delay", [0, 1, 2, 4])
@pytest.mark.parametrize("part", [0.2, 0.7])
def test_the_conjecture_is_attained_by_the_parabola(delay, part):
    x = part * float(stable_limit(delay))
    report = check("c-tau", parabola(), [delay], gamma=x, iterations=800)
    assert report.verdict in (Verdict.VERIFIED, Verdict.INCONCLUSIVE)  # equal up to rounding
    assert report.tightness == pytest.approx(1.0, abs=1e-9)


def test_theorem_v_with_noise_against_the_covariance():
    # Stationary E||grad f||^2 = gamma L s^2/(2 c_tau): half of the bound's gamma L s^2.
    x = 0.15
    squares = mean_squared_gradients(ddg(2), parabola(1.0, 0.0, 2), [x] * 15)
    limit = x / (2 * float(c_tau(x, 1)))
    assert 0.8 * limit < squares[-1] < limit
    report = check("theorem-v", parabola(1.0, 0.0, 2), [1, 0], gamma=x, iterations=15)
    assert report.verdict == "VERIFIED"
    assert report.measured == pytest.approx(squares.mean(), rel=1e-13)


def test_momentum_runs_as_written():
    beta, gamma, delay = 0.6, 0.2, 2
    found = expectations(motion([delay], 9, beta), parabola(start=1.5), [gamma] * 9).squares
    w, v = [1.5], 0.0
    for t in range(9):
        v = beta * v + (w[t - delay] if t >= delay else 0.0)
        w.append(w[t] - gamma * v)
    np.testing.assert_allclose(found, np.square(w[:-1]), rtol=1e-13)


@pytest.mark.parametrize("beta", [0.5, 0.9])
def test_delay_one_is_stable_below_one_minus_beta(beta):
    for part, grows in ((0.97, False), (1.03, True)):
        gammas = [part * (1 - beta)] * 1200
        squares = expectations(motion([1], 1200, beta), parabola(), gammas).squares
        assert (squares[-50:].max() > squares[:50].max()) == grows


def test_expectations_by_hand():
    # One step of opposed_cosines, stage 1 idle: w_2 moves by -gamma c_i.
    problem, gamma = opposed_cosines(), 0.1
    found = expectations(motion(ddg(2), 1), problem, [gamma])
    after = np.mean([1 - math.cos(math.pi / 2 - gamma * c) for c in (3, -1)])
    np.testing.assert_allclose(found.values, [1.0, after], rtol=1e-14)
    assert found.squares == pytest.approx([2.0])
    assert found.aligned == pytest.approx([1.0])  # grad_2 f = 1, E g_2 = (3 - 1)/2
    assert found.moved == pytest.approx([5.0])  # (9 + 1)/2 in one of the two blocks
    assert found.moments == pytest.approx([10.0])
    assert found.spreads == pytest.approx([8.0])


# --- True statements on random inputs -------------------------------------------------------------

PROVED = [key for key, s in STATEMENTS.items() if s.status not in (Status.REFUTED,)]


def random_problem(rng):
    stages, samples = rng.integers(1, 4), rng.integers(1, 4)
    rows = rng.integers(-2, 3, (samples, stages)).astype(float)
    rows[np.all(rows == 0, axis=1)] = 1.0
    return RidgeSum(
        "random",
        COSINE,
        rows=rows,
        offsets=rng.uniform(-3, 3, samples),
        coefficients=np.diag(rng.uniform(0.2, 3, samples)),
        start=rng.uniform(-3, 3, stages),
        blocks=tuple(slice(k, k + 1) for k in range(stages)),
    )


def test_no_true_statement_is_violated_by_enumeration():
    rng, verdicts = np.random.default_rng(0), []
    for key in itertools.islice(itertools.cycle(PROVED), 1000):
        problem = random_problem(rng)
        delays = rng.integers(0, 4, len(problem.blocks))
        if key == "lian":
            delays[:] = delays[0]
        momentum = rng.uniform(0, 0.9) if key == "theorem-m" else 0.0
        gamma = 10 ** rng.uniform(-2, 0.3) / problem.L
        source = ddg(len(delays)) if rng.random() < 0.5 and key != "lian" else delays
        report = check(key, problem, source, gamma, iterations=5, momentum=momentum)
        assert report.verdict is not Verdict.VIOLATED, report
        verdicts.append(report.verdict)
    assert verdicts.count(Verdict.VERIFIED) > 500


def test_no_true_statement_is_violated_by_random_paths():
    rng, verdicts = np.random.default_rng(1), []
    keys = ("theorem-a", "theorem-a-young", "theorem2-prime", "theorem-v")
    for key in itertools.islice(itertools.cycle(keys), 1000):
        problem = random_problem(rng)
        delays = rng.integers(0, 4, len(problem.blocks))
        gamma = 10 ** rng.uniform(-2, 0) / problem.L
        sampling = MonteCarlo(1e-3, seed=len(verdicts), most=256, always=True)
        report = check(key, problem, delays, gamma, 8, monte_carlo=sampling)
        assert report.verdict is not Verdict.VIOLATED, report
        verdicts.append(report.verdict)
    assert verdicts.count(Verdict.VERIFIED) > 400


# --- Seeded faults, each with an anchor that catches it -------------------------------------------


def test_a_delay_off_by_one_is_caught(monkeypatch):
    arguments = "c-tau", parabola(), [1], 0.6, 400
    assert check(*arguments).verdict is not Verdict.VIOLATED
    right = motions.delayed
    monkeypatch.setattr(
        motions, "delayed", lambda p, delays, *rest, **more: right(p, delays + 1, *rest, **more)
    )
    assert check(*arguments).verdict is Verdict.VIOLATED


def test_a_second_term_four_times_too_small_is_caught():
    # From the minimum: gap = 0, so the bound is its second term. theorem-v, no delay.
    def too_small(constants, gammas):
        first = theorem_v(replace(constants, variance=0.0), gammas)
        return first + (theorem_v(constants, gammas) - first) / 4

    arguments = parabola(1.0, 0.0), ddg(1), 0.5, 14
    assert check("theorem-v", *arguments).verdict is Verdict.VERIFIED
    wrong = replace(STATEMENTS["theorem-v"], bound=too_small)
    assert check(wrong, *arguments).verdict is Verdict.VIOLATED


class Claiming:
    """A problem that claims other constants than it has."""

    def __init__(self, problem, **claims):
        self.__dict__.update(claims, problem=problem)

    def __getattr__(self, name):
        return getattr(self.problem, name)


@pytest.mark.parametrize(
    ("claim", "shown"),
    [
        ({"M": 9.5}, r"M = 9.5, but E\|\|grad f_i\(w\^t\)\|\|\^2 = 10"),
        ({"variance": 7.6}, "variance = 7.6, but .* = 8 along"),
        ({"f_star": 1.05}, r"f_star = 1.05, but f = 1 at a point"),
        ({"f_star": 0.999}, r"f_star = 0.999, but f = 0.0007"),
        ({"L": 0.5}, "L = 0.5, but .* = [12]"),
    ],
)
def test_constants_that_are_five_percent_wrong_are_caught(claim, shown):
    arguments = ddg(2), 0.1, 4
    assert check("theorem-a", opposed_cosines(), *arguments).verdict is Verdict.VERIFIED
    with pytest.raises(ValueError, match=f"problem 'opposed-cosines' is wrong: {shown}"):
        check("theorem-a", Claiming(opposed_cosines(), **claim), *arguments)


def test_an_M_too_small_for_one_path_is_caught_by_random_paths(monkeypatch):
    # ||grad f||^2 = 2 at the start, whatever E||grad f_i||^2 may be on the paths probed before.
    monkeypatch.setattr("theory.sides.require_claims", lambda problem, means: None)
    problem = Claiming(opposed_cosines(), M=1.9)
    with pytest.raises(ValueError, match=r"M = 1.9, but \|\|grad f\|\|\^2 = 2"):
        check("theorem-a", problem, ddg(2), 1e-3, 1, monte_carlo=MonteCarlo(always=True))


def shuffled(rng, num_samples, length, count):
    """One epoch after the other, each in random order: the mistake."""
    epochs = -(-length // num_samples)
    order = [[rng.permutation(num_samples) for _ in range(epochs)] for _ in range(count)]
    return np.array(order).reshape(count, -1)[:, :length]


def test_sampling_by_shuffling_is_caught(monkeypatch):
    # Anchor: E of the average is known exactly, by the covariance of independent noise.
    x, ticks = 0.4, 12
    exact = np.mean([x**2 * sum((1 - x) ** (2 * j) for j in range(t)) for t in range(ticks)])
    run = motion(ddg(1), ticks)

    def average():
        draws = sampled_averages(
            run, parabola(1.0, 0.0), [x] * ticks, 0, 4000, np.random.default_rng(0)
        )
        return (draws.mean() - exact) / (draws.std() / math.sqrt(len(draws)))

    assert abs(average()) < 4
    monkeypatch.setattr(paths, "draw_paths", shuffled)
    assert abs(average()) > 10


# --- Hypotheses: never VERIFIED where one fails ---------------------------------------------------

UNBOUNDED = Claiming(make("cauchy", 2), variance=math.inf)
CHANGING = np.array([[1, 0], [0, 1], [1, 0], [0, 1], [1, 0]])  # applies samples twice


@pytest.mark.parametrize(
    ("key", "problem", "source", "x", "momentum", "reason"),
    [
        ("theorem1", make("cauchy", 2), ddg(2), 1.1, 0.0, "gamma_0 L = 1.1"),
        ("theorem1", make("cauchy", 2), [0, 1], 0.1, 0.0, r"d = \(0, 1\)"),
        ("independence", make("cauchy", 1), dp(1, 2), 0.1, 0.0, "2 samples per update, not one"),
        ("theorem-f", make("cauchy", 1), dp(1, 2), 0.1, 0.0, "2 samples per update, not one"),
        ("theorem-a", make("noisy-quadratic", 2), ddg(2), 0.1, 0.0, "M = inf"),
        ("theorem-a", make("cauchy", 2), CHANGING, 0.1, 0.0, "more than once"),
        ("theorem-a", make("cauchy", 2), ddg(2), 0.1, 0.5, "momentum 0.5"),
        ("theorem-v", make("cauchy", 2), ddg(2), 0.17, 0.0, "gamma L = 0.17 > 0.16"),
        (
            "theorem-v",
            Claiming(make("cauchy", 2), variance=math.inf),
            [1, 0],
            0.1,
            0,
            r"s\^2 = inf",
        ),
        ("theorem-d", make("cauchy", 2), ddg(2), 0.1, 0.0, r"s\^2 = 0"),
        ("theorem-d", make("cauchy", 2, 1), ddg(2), 0.67, 0.0, "gamma L = 0.67, not <"),
        ("c-tau", make("cauchy", 2, 1), ddg(2), 1.0, 0.0, "gamma L = 1, not < 1"),
        ("c-tau", make("cauchy", 2, 1), CHANGING, 0.1, 0.0, "change with time"),
        ("lian", make("cauchy", 2), ddg(2), 0.1, 0.0, r"d = \(1, 0\)"),
        ("lian", make("cauchy", 2), [1, 1], 0.6, 0.0, "1.32 > 1"),
        ("theorem2-prime", make("cauchy", 2), CHANGING, 0.1, 0.0, "change with time"),
        ("theorem-f", make("cauchy", 2), CHANGING, 0.1, 0.0, "change with time"),
        ("theorem-f", make("noisy-quadratic", 2), [1, 0], 0.1, 0.0, "M' = inf"),
        ("theorem-m", make("noisy-quadratic", 2), [1, 0], 0.1, 0.5, "M = inf"),
    ],
)
def test_a_failing_hypothesis_is_named(key, problem, source, x, momentum, reason):
    report = check(key, problem, source, x / problem.L, 5, momentum)
    assert report.verdict is Verdict.NOT_APPLICABLE
    assert len(report.failing) == 1
    assert re.search(rf"\(here .*{reason}", report.failing[0])


def test_delays_that_change_but_apply_each_sample_once():
    # Sample 0 and 1 overtake each other in stage 0: once each, at most 2 ticks late.
    delays = np.array([[3, 0], [0, 0], [2, 0], [1, 0], [1, 0], [1, 0]])
    assert motion(delays, 6).once_delays == (3, 0)
    assert check("theorem-a", make("cauchy", 2), delays, 0.3, 6).verdict is Verdict.VERIFIED


@pytest.mark.parametrize("semantics", list(Semantics))
@pytest.mark.parametrize("name", ["rotation-chain", "reversible-chain"])
def test_theorem_f_holds_for_every_reading(semantics, name):
    problem = make(name, 3)
    report = check("theorem-f", problem, ddg(3, semantics=semantics), 0.2 / problem.L, 7)
    assert report.verdict is Verdict.VERIFIED
    assert motion(fr(3), 7).replayed_delays == snapshot_delays(ddg(3))


def test_a_direction_that_is_not_sufficient_is_measured():
    # Beyond the stable step the late gradient points backwards on average.
    report = check("features-replay", parabola(), [1], gamma=1.5, iterations=6)
    assert report.verdict is Verdict.NOT_APPLICABLE
    assert "measured sigma = -" in report.reason
    # At w^2 = (-1e-7, 1e-14) the gradient is small and the late one next to it is not: it counts.
    plane = NoisyQuadratic(
        "plane", np.eye(2), np.zeros(2), np.zeros((1, 2)), np.ones(2), (slice(0, 1), slice(1, 2))
    )
    small = check("features-replay", plane, [1, 0], gamma=1 + 1e-7, iterations=3)
    assert "measured sigma = -1e+07" in small.reason
    good = check("features-replay", make("rotation-chain", 3), fr(3), 0.2, 7)
    assert good.verdict is Verdict.VERIFIED


# --- Numbers that are none, and problems that claim too much --------------------------------------


def test_f_or_gradients_that_are_not_finite_on_the_way_verify_nothing():
    def nan_on_the_way(w):  # w_1 = 1 is the start; every step makes it smaller
        return np.where(w[:, 0] < 1.0, np.nan, 1.0)

    def value(w):
        return 1.0 - np.cos(w[:, 0])

    def gradient(w, i):
        return np.stack([np.sin(w[:, 0]), 0.0 * w[:, 0]], axis=1)

    claims = {"L": 1.0, "M": 1.0, "variance": 0.0, "f_star": 0.0, "num_samples": 1}
    claims |= {"start": np.array([1.0, 0.0]), "blocks": (slice(0, 1), slice(1, 2))}
    problems = (
        GivenProblem(lambda w: nan_on_the_way(w) * value(w), gradient, **claims),
        GivenProblem(value, lambda w, i: nan_on_the_way(w)[:, None] * gradient(w, i), **claims),
    )
    for problem in problems:
        for key in ("lemma1", "lemma1-steady", "lemma1-prime", "theorem-a", "theorem-d", "c-tau"):
            report = check(key, problem, ddg(2), 0.01, 6)
            assert report.verdict is Verdict.INCONCLUSIVE, key
            assert "not finite" in report.reason
        sampled = check("theorem-a", problem, ddg(2), 0.01, 6, 0.0, MonteCarlo(always=True))
        assert sampled.verdict is Verdict.INCONCLUSIVE


@pytest.mark.parametrize("gamma", [1e200, 1e308])
@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("key", ["theorem-a", "theorem-a-young", "theorem2-prime", "theorem-f"])
@pytest.mark.filterwarnings("error")
def test_steps_so_large_that_numbers_overflow_are_inconclusive(gamma, always, key):
    sampling = MonteCarlo(always=always)
    report = check(key, make("kuramoto", 2), ddg(2), gamma, 4, 0.0, sampling)
    assert report.verdict is Verdict.INCONCLUSIVE


def test_no_violation_is_found_where_the_problem_is_wrong():
    cosine = one_sided_cosine()
    with pytest.raises(ValueError, match="'one-sided-cosine' is wrong: M = 0.1, but"):
        check("lemma1", Claiming(cosine, M=0.1), ddg(2), 0.01, 2)
    always = MonteCarlo(always=True)
    with pytest.raises(ValueError, match="'one-sided-cosine' is wrong: L = 0.001, but"):
        check("theorem-a", Claiming(cosine, L=1e-3), [1, 0], 1.0, 20, monte_carlo=always)
    with pytest.raises(ValueError, match="'one-sided-cosine' is wrong: f_star = 0.9, but"):
        check("theorem-a", Claiming(cosine, f_star=0.9), [1, 0], 0.5, 20, monte_carlo=always)


# --- Wrong arguments, in one line -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": 0.0}, "gamma must be positive and finite, got 0"),
        ({"source": [4, 0]}, "delays must be from 0 to iterations - 1 = 3, .* got 4"),
        ({"source": [-1, 0]}, "delays must be from 0 .* got -1"),
        ({"source": [1, 0, 0]}, r"delays must have shape \(2,\) or \(4, 2\), .* got \(3,\)"),
        ({"source": [0.5, 0]}, "delays must be whole ticks of 64 bits, got float64"),
        ({"source": [10**30, 0]}, "delays must be whole ticks of 64 bits, got object"),
        ({"iterations": 10**9}, "iterations must be at most 10000, got 1000000000"),
        (
            {"problem": Claiming(make("cauchy", 2), blocks=(slice(0, 3), slice(2, 4)))},
            "blocks must be slices that follow each other from weight 0 to 4, got",
        ),
        (
            {"problem": Claiming(make("cauchy", 1), blocks=(slice(0, 1),)), "source": [0]},
            "blocks must be slices that follow each other from weight 0 to 2, got",
        ),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, got 1"),
        ({"problem": Claiming(make("cauchy", 2), start=np.full(4, np.nan))}, "f.* = nan is not"),
        ({"monte_carlo": MonteCarlo(alpha=2, always=True)}, "alpha must be between 0 and 1"),
        ({"statement": "lemma1", "monte_carlo": MonteCarlo(always=True)}, "lemma1 is not about"),
        (
            {"problem": make("noisy-quadratic", 2), "monte_carlo": MonteCarlo(always=True)},
            "because M = inf",
        ),
        (
            {
                "statement": replace(STATEMENTS["features-replay"], key="mine"),
                "monte_carlo": MonteCarlo(always=True),
            },
            "mine has constants that are measured over all paths",
        ),
        ({"statement": "lian", "source": ddg(5), "problem": make("cauchy", 5)}, "warm-up"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    given = {"statement": "theorem-a", "problem": make("cauchy", 2), "source": [1, 0]}
    given |= {"gamma": 0.1, "iterations": 4} | arguments
    with pytest.raises(ValueError, match=message) as caught:
        check(**given)
    assert "\n" not in str(caught.value)
