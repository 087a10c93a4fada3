"""Times that vary: their moments, their text, and draws that belong to what is timed."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ddg_sim.costs import Costs, costs
from ddg_sim.draws import durations, uniforms
from ddg_sim.eventgraph import event_graph
from ddg_sim.methods import bp, ddg
from ddg_sim.times import Gamma, LogNormal, Normal, Samples, Straggler, mean, parse_time, scaled

GRID = (np.arange(20_000) + 0.5) / 20_000

CASES = [
    (Normal(2.0, 0.5), stats.truncnorm(-4.0, math.inf, 2.0, 0.5)),
    (Normal(1.0, 2.0), stats.truncnorm(-0.5, math.inf, 1.0, 2.0)),
    (LogNormal(2.0, 0.5), stats.lognorm(math.sqrt(math.log(1.0625)), scale=2 / math.sqrt(1.0625))),
    (Gamma(2.0, 0.5), stats.gamma(16.0, scale=0.125)),
    (Gamma(0.5, 0.5), stats.expon(scale=0.5)),
]


@pytest.mark.parametrize(("ours", "theirs"), CASES, ids=[str(ours) for ours, _ in CASES])
def test_quantiles_and_means_are_scipys(ours, theirs):
    assert ours.quantile(GRID) == pytest.approx(theirs.ppf(GRID), rel=1e-9)
    assert ours.mean == pytest.approx(theirs.mean(), rel=1e-9)
    assert scaled(ours, 3.0).quantile(GRID) == pytest.approx(3.0 * ours.quantile(GRID))


@given(st.lists(st.floats(0, 100), min_size=1, max_size=40))
def test_samples_are_drawn_equally_often(values):
    found = Samples(tuple(values)).quantile((np.arange(len(values)) + 0.5) / len(values))
    assert found.tolist() == sorted(values)
    assert Samples(tuple(values)).mean == pytest.approx(sum(values) / len(values))


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("2", 2.0),
        (" gamma( 1 , 0.25 )", Gamma(1.0, 0.25)),
        ("normal(1,0.1)", Normal(1.0, 0.1)),
        ("lognormal(1,0.1)", LogNormal(1.0, 0.1)),
        ("samples(3,1,2)", Samples((1.0, 2.0, 3.0))),
        ("straggler(0.1,4)", Straggler(0.1, 4.0)),
    ],
)
def test_times_are_read(text, time):
    assert parse_time(text) == time


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fast", "'fast' is no time: give a number, or normal"),
        ("gamma(1)", "is no time"),
        ("gamma(1,x)", "is no time"),
        ("weibull(1,2)", "is no time"),
        ("gamma(0,1)", "gamma: mean is 0 while std is 1.0"),
        ("gamma(-1,1)", "gamma: mean is -1.0: give a finite number of seconds that is at least 0"),
        ("normal(1,nan)", "normal: std is nan"),
        ("samples()", "is no time"),
        ("straggler(2,3)", "probability is 2.0: give 0 to 1"),
    ],
)
def test_what_is_no_time_is_refused(text, message):
    with pytest.raises(ValueError, match="^[^\n]*$") as found:
        parse_time(text)
    assert message in str(found.value)


def test_a_wrong_time_in_costs_is_named():
    with pytest.raises(ValueError, match=r"forward\[1\] is -1"):
        Costs(forward=(Gamma(1.0, 0.1), -1.0), backward=(1.0, 1.0))
    with pytest.raises(ValueError, match=r"input_share\[0\] is 1.5: give a fraction"):
        costs(1, input_share=1.5)
    with pytest.raises(ValueError, match="forward is a straggler, which is a factor"):
        costs(2, forward=Straggler(0.1, 3.0))
    with pytest.raises(ValueError, match="input_share"):
        costs(1, input_share=Gamma(0.5, 0.1))
    with pytest.raises(TypeError, match="costs has no entry 'forwards'"):
        costs(2, forwards=1.0)


# --- Draws --------------------------------------------------------------------------------------


def drawn(schedule, prices, iterations, **given):
    graph = event_graph(schedule)
    times = durations(graph, prices, iterations, **given)
    return {event.name: time for event, time in zip(graph.events, times, strict=True)}


def test_draws_do_not_depend_on_how_many_there_are():
    long = uniforms(3, (1, 2), 50, range(100), 2)
    for runs in (range(7), range(30, 40), range(64, 65)):
        short = uniforms(3, (1, 2), 20, runs, 1)
        assert (short == long[:20, runs.start : runs.stop, :1]).all()
    assert (uniforms(4, (1, 2), 50, range(100), 2) != long).all()
    assert np.unique(long).size == long.size  # no number is used twice


def test_the_same_sample_meets_the_same_luck_in_every_method():
    prices = costs(3, forward=Gamma(1.0, 0.3), backward=LogNormal(2.0, 0.4), jitter=Gamma(1.0, 0.1))
    ours, theirs = drawn(ddg(3), prices, 20), drawn(bp(3), prices, 20)
    for stage in range(3):
        delay = 2 - stage
        backward = ours[f"B{stage}"][delay : delay + 20]  # sample t - delay in iteration t
        assert (backward == theirs[f"B{stage}"]).all()
        assert (ours[f"F{stage}"][:20] == theirs[f"F{stage}"]).all()
    assert (ours["F0"] != ours["F1"]).all()


def test_moments_of_an_operation():
    prices = costs(
        2, forward=Gamma(1.0, 0.2), overhead=0.5, message=Gamma(0.25, 0.05), jitter=Gamma(1.0, 0.1)
    )
    forward = drawn(ddg(2), prices, 400, runs=range(200))["F0"]  # it sends one message
    assert forward.mean() == pytest.approx(1.75, rel=0.005)
    expected = math.sqrt((0.2**2 + 0.05**2) * 1.01 + (1.75 * 0.1) ** 2)
    assert forward.std() == pytest.approx(expected, rel=0.02)


def test_a_slowdown_stays_for_the_whole_run():
    prices = costs(2, slowdown=(Straggler(0.5, 3.0), 1.0))
    found = drawn(ddg(2), prices, 10, runs=range(64))
    assert set(np.unique(found["F0"])) == {1.0, 3.0}
    assert (found["F0"] == found["F0"][:1]).all()
    assert (found["B0"] == 2 * found["F0"]).all()
    assert found["F1"] == 1.0 or (np.asarray(found["F1"]) == 1.0).all()


def test_means():
    prices = costs(2, forward=Gamma(1.5, 0.3), comm=LogNormal(0.5, 0.1), barrier=Gamma(0.1, 0.1))
    assert prices.random
    assert prices.means() == costs(2, forward=1.5, comm=0.5, barrier=0.1)
    assert mean(prices.forward[0]) == 1.5
