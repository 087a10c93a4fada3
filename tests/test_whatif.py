"""What would help most: derivatives against finite differences, gains against recomputation."""

import dataclasses

import pytest
from hypothesis import given, settings
from strategies import costed, quarters

from ddg_sim.costs import PER_LINK, costs
from ddg_sim.cycletime import cycle_time
from ddg_sim.methods import bp, ddg
from ddg_sim.schedule import Sync, staleness
from ddg_sim.whatif import improvements, sensitivities, with_more_delay

ENTRY = {"F": "forward", "B": "backward", "R": "recompute", "U": "update"}


@settings(max_examples=60, deadline=None)
@given(costed(quarters))
def test_a_slower_operation_costs_what_its_derivative_says(pair):
    schedule, prices = pair
    found = cycle_time(schedule, prices)
    step = 1e-6
    for name, slope in sensitivities(found).items():
        if name[0] not in ENTRY or not name[1:].isdigit():
            continue
        entry, stage = ENTRY[name[0]], int(name[1:])
        slower = dataclasses.replace(
            prices,
            **{entry: tuple(t + step * (k == stage) for k, t in enumerate(getattr(prices, entry)))},
        )
        gained = (cycle_time(schedule, slower).period - found.period) / step
        # With several critical cycles the steepest one counts; one operation of a stage that runs
        # once per micro-batch stands for all of them.
        assert gained >= slope - 1e-6


def test_derivatives_of_a_round_trip():
    slopes = sensitivities(cycle_time(ddg(3), costs(3, comm=2.0)))
    assert slopes["F2"] == slopes["gradient 2→1"] == pytest.approx(1 / 3)
    assert "U2" not in slopes


@settings(max_examples=40, deadline=None)
@given(costed(quarters))
def test_every_gain_is_real_and_the_best_comes_first(pair):
    schedule, prices = pair
    period = cycle_time(schedule, prices).period
    found = improvements(schedule, prices)
    assert [change.gain for change in found] == sorted(
        (change.gain for change in found), reverse=True
    )
    for change in found:
        assert 0 < change.gain <= 1
        assert change.period == pytest.approx(period * (1 - change.gain))
        if change.what.startswith("the link"):
            link = int(change.what.split("stages ")[1].split()[0]) - 1
            faster = {
                name: tuple(t / 2 if k == link else t for k, t in enumerate(getattr(prices, name)))
                for name in PER_LINK
            }
            again = cycle_time(schedule, dataclasses.replace(prices, **faster)).period
            assert again == pytest.approx(change.period, rel=1e-12)


def test_one_more_delay_hides_the_messages():
    """With one more iteration per link, DDG computes all the time although messages are slow."""
    prices = costs(3, comm=0.5)
    patient = with_more_delay(with_more_delay(ddg(3), 0), 1)
    assert staleness(patient) == (4, 2, 0)
    assert cycle_time(ddg(3), prices).period == pytest.approx(11 / 3)
    assert cycle_time(patient, prices).period == 3.0


def test_what_cannot_wait_is_left_out():
    assert with_more_delay(ddg(3, Sync.BARRIER), 1) is not None
    delayed = with_more_delay(bp(2), 0)  # legal: then it is a pipeline
    assert delayed is not None
    assert staleness(delayed) == (1, 0)


@pytest.mark.parametrize("faster", [0.0, 1.0, -1.0, float("nan")])
def test_a_wrong_fraction_is_refused(faster):
    with pytest.raises(ValueError, match="faster is"):
        improvements(ddg(2), costs(2), faster)
