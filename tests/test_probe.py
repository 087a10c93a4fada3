import math
from dataclasses import dataclass

import numpy as np
import pytest
from test_problems import ATTAINED

from theory.probe import GivenProblem, probe
from theory.problems import PROBLEMS, make, opposed_cosines


@dataclass(frozen=True)
class Claimed:
    """A problem with some of its claims replaced."""

    problem: object
    claims: dict

    def __getattr__(self, name):
        return self.claims[name] if name in self.claims else getattr(self.problem, name)


def wrong(problem, **claims):
    return [finding.claim for finding in probe(Claimed(problem, claims)) if finding.wrong]


@pytest.mark.parametrize("name", PROBLEMS)
def test_certified_families_pass(name):
    findings = probe(make(name, 3))
    assert [str(finding) for finding in findings if finding.wrong] == []
    assert [f.claim for f in findings] == ["gradient", "L", "M", "variance", "f_star"]


@pytest.mark.parametrize("name", sorted(set(ATTAINED) & set(PROBLEMS)))
def test_claims_five_percent_too_small_are_found(name):
    problem, constants = make(name, 2), ATTAINED[name].split()
    assert wrong(problem, **{c: 0.95 * getattr(problem, c) for c in constants}) == constants


@pytest.mark.parametrize("name", ["welsch", "kuramoto", "noisy-quadratic", "rotation-chain"])
def test_a_lower_bound_that_is_none_is_found(name):
    assert wrong(make(name, 2), f_star=0.01) == ["f_star"]


def test_the_points_are_the_evidence():
    problem = Claimed(opposed_cosines(), {"L": 1.9, "M": 9.0, "variance": 8.0, "f_star": 0.1})
    gradient, L, M, variance, f_star = probe(problem)
    assert not gradient.wrong
    x, y = L.points
    jump = np.diff(problem.full_gradient(L.points), axis=0)
    assert np.linalg.norm(jump) / np.linalg.norm(x - y) == L.found > 1.9
    rows = problem.gradients(np.tile(M.points, (2, 1)), np.arange(2))
    assert np.sum(rows**2) / 2 == pytest.approx(M.found) == pytest.approx(10.0)
    rows = problem.gradients(np.tile(variance.points, (2, 1)), np.arange(2))
    assert np.sum((rows - rows.mean(axis=0)) ** 2) / 2 == pytest.approx(variance.found)
    assert problem.value(f_star.points)[0] == f_star.found < 0.1
    assert str(L).startswith("claimed L = 1.9, but the gradients at [")
    assert str(L).endswith("need 2")
    assert str(gradient) == "gradient agrees with f"


def quadratic(slope=1.0, **claims):
    def value(w):
        return 0.5 * np.sum(w**2, axis=1)

    return GivenProblem(value, lambda w, i: slope * w, 1, np.array([1.0, -2.0]), **claims)


def test_a_users_own_functions():
    assert [f.claim for f in probe(quadratic(L=1.0, variance=0.0, f_star=0.0)) if f.wrong] == []
    # No bound on an unbounded gradient can be right, and an unbounded claim never is wrong.
    assert [f.claim for f in probe(quadratic(L=1.0, M=1e6)) if f.wrong] == ["M"]
    off = probe(quadratic(slope=1.01))[0]
    assert off.wrong
    assert str(off).startswith("gradient is wrong: it differs from finite differences by 0.0")


def test_a_gradient_that_is_not_the_samples_mean_is_found():
    problem = make("welsch", 2)
    twice = Claimed(problem, {"gradients": lambda w, i: 1.001 * problem.gradients(w, i)})
    assert probe(twice)[0].wrong


def test_errors_name_argument_and_value():
    with pytest.raises(ValueError, match="restarts must be at least 1, got 0"):
        probe(quadratic(), restarts=0)
    with pytest.raises(ValueError, match="radius must be positive and finite, got inf"):
        probe(quadratic(), radius=math.inf)
    nowhere = GivenProblem(lambda w: np.log(-1 - w[:, 0] ** 2), lambda w, i: w, 1, np.ones(1))
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match="not finite at its start"):
        probe(nowhere)
