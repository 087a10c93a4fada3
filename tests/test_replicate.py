"""Random runs: the engines agree on them, and intervals cover what is known exactly."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from strategies import PATIENT, costed

from ddg_sim.costs import PER_LINK, SECONDS, costs
from ddg_sim.cycletime import completions, cycle_time, evaluate
from ddg_sim.decoupled import dgl
from ddg_sim.methods import bp, data_parallel, ddg, dp
from ddg_sim.network import Bus, Network, Sharing
from ddg_sim.predict import predict
from ddg_sim.replicate import estimate, periods, ratio, replicate, typical_period
from ddg_sim.schedule import Sync
from ddg_sim.simulate import simulate
from ddg_sim.synchronous import interleaved
from ddg_sim.times import Gamma, LogNormal, Samples, Straggler


def spread(prices, share=0.3):
    """The same costs, but with gamma-distributed times."""
    changed = {
        name: tuple(Gamma(t, share * t) if t else 0.0 for t in getattr(prices, name))
        for name in (*SECONDS, *PER_LINK)
    }
    factor = (Gamma(1.0, share),) * prices.num_stages
    late = Gamma(prices.barrier, share * prices.barrier) if prices.barrier else 0.0
    return dataclasses.replace(prices, **changed, jitter=factor, slowdown=factor, barrier=late)


@settings(max_examples=60, deadline=None)
@given(costed(), st.integers(1, 6), st.integers(0, 3))
def test_both_engines_agree_on_random_runs(pair, iterations, run):
    schedule, prices = pair
    prices = spread(prices)
    ours = simulate(schedule, prices, iterations, seed=5, run=run)
    theirs = evaluate(schedule, prices, iterations, seed=5, run=run)
    for one, other in ((ours.op_columns, theirs.op_columns),):
        order = ["lane", "position", "iteration"]
        one, other = np.sort(one, order=order), np.sort(other, order=order)
        assert one["start"] == pytest.approx(other["start"], rel=1e-9, abs=1e-9)
        assert one["end"] == pytest.approx(other["end"], rel=1e-9, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(costed(), st.integers(1, 6))
def test_many_runs_at_once_are_those_runs(pair, iterations):
    schedule, prices = pair
    prices = spread(prices)
    many = completions(schedule, prices, iterations, seed=1, runs=range(30, 35))
    for column, run in enumerate(range(30, 35)):
        table = evaluate(schedule, prices, iterations, seed=1, run=run).op_columns
        for tick in range(schedule.num_ticks(0), iterations):  # from there on nothing is skipped
            latest = table["end"][table["iteration"] == tick].max()
            assert many[tick, column] == pytest.approx(latest, rel=1e-12)


def test_an_interval_is_students():
    values = np.random.default_rng(0).normal(3.0, 1.0, 20)
    found = estimate(values, 0.9)
    low, high = stats.t.interval(0.9, 19, values.mean(), stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_intervals_cover_a_known_mean():
    """Of one stage alone the expected period is the sum of the means."""
    prices = costs(1, forward=Gamma(1.0, 0.5), backward=LogNormal(2.0, 1.0))
    covered = 0
    for seed in range(60):
        found = estimate(periods(bp(1), prices, 12, seed, range(32)), 0.9)
        covered += found.low <= 3.0 <= found.high
    # A binomial of 60 and 0.9 is below 46 or is 60 with probability 0.004.
    assert 46 <= covered <= 59


def test_random_times_cost_more_than_their_means():
    prices = costs(4, forward=Gamma(1.0, 0.5), backward=Gamma(2.0, 1.0))
    for sync in Sync:
        found = estimate(periods(ddg(4, sync), prices, 150, 0, range(64)), 0.999)
        assert found.low > cycle_time(ddg(4, sync), prices).period
    exact = cycle_time(bp(4), prices).period
    found = estimate(periods(bp(4), prices, 150, 0, range(64)), 0.999)
    assert found.low < exact < found.high  # whoever never waits for the later of two loses nothing


def test_a_barrier_waits_for_the_last_of_exponential_times():
    """E max of K independent exponential times is the harmonic sum 1 + 1/2 + … + 1/K."""
    prices = costs(4, forward=0.25, backward=Gamma(1.0, 1.0))
    found = estimate(periods(ddg(4, Sync.BARRIER), prices, 300, 0, range(128)), 0.999)
    assert found.low < 4 * 0.25 + 25 / 12 < found.high


def test_replication_stops_when_the_interval_is_narrow_enough():
    prices = costs(3, forward=Gamma(1.0, 0.4))
    cases = {"bp": (bp(3), prices), "ddg": (ddg(3), prices)}
    for precision in (0.02, 0.002):
        found = replicate(cases, 30, precision)
        widths = [estimate(values).relative_width for values in found.values()]
        assert max(widths) <= precision
    assert len(found["bp"]) > 32
    short = replicate(cases, 30, 1e-9, most_runs=64)
    assert len(short["ddg"]) == 64
    assert (short["ddg"] == found["ddg"][:64]).all()


def test_common_random_numbers_narrow_a_comparison():
    prices = costs(3, forward=Gamma(1.0, 0.4), slowdown=Gamma(1.0, 0.3))
    base = periods(bp(3), prices, 40, 0, range(128))
    paired = ratio(base, periods(ddg(3), prices, 40, 0, range(128)))
    apart = ratio(base, periods(ddg(3), prices, 40, 1, range(128)))
    assert paired.high - paired.low < 0.7 * (apart.high - apart.low)


def test_without_randomness_everything_is_exact():
    found = replicate({"ddg": (ddg(3), costs(3))}, 10)
    assert found["ddg"].tolist() == [3.0]
    assert predict(ddg(3), costs(3), 10).period.runs == 0


def test_predictions_of_random_times_have_intervals():
    prices = costs(2, forward=Gamma(1.0, 0.2))
    found = predict(ddg(2), prices, 20, precision=0.005)
    assert found.period.runs >= 32
    assert found.period.low < found.period.value < found.period.high
    assert found.period.relative_width <= 0.005
    assert not found.period_is_exact
    assert found.speedup is not None
    assert found.speedup.low < found.speedup.value < 2.0
    assert found.period.value > found.cycle.period == 3.0
    again = predict(ddg(2), prices, 20, precision=0.005)
    assert again.period == found.period


def test_the_typical_period_ignores_rare_pauses():
    pauses = Samples((1.0,) * 199 + (100.0,))
    prices = costs(1, forward=pauses)
    assert typical_period(bp(1), prices, 60) == pytest.approx(3.0, rel=0.02)
    assert periods(bp(1), prices, 60, 0, range(256)).mean() > 3.3


def test_what_is_rare_is_waited_for():
    """Most small samples see no straggler at all; a period below that of the means is no answer."""
    prices = costs(2, slowdown=Straggler(0.01, 10.0))
    least = cycle_time(ddg(2), prices).period
    for seed in (1, 2, 3):
        values = replicate({"ddg": (ddg(2), prices)}, 20, 0.01, seed=seed, most_runs=512)["ddg"]
        assert estimate(values).high >= least or len(values) == 512


def test_warm_up_is_not_mistaken_for_the_steady_state():
    """DGL's queues fill slowly; and a backlog on a link takes long to be felt."""
    prices = costs(8, forward=Gamma(1.0, 0.5), backward=Gamma(2.0, 1.0))
    long = estimate(periods(dgl(8), prices, 3000, 1, range(32)))
    found = predict(dgl(8), prices, 10).period
    assert found.value == pytest.approx(long.value, rel=0.02)
    slow = costs(2, forward=Gamma(5.0, 0.01), backward=(5.0, 0.1), gradient_transfer=10.5)
    slow = dataclasses.replace(slow, forward=(Gamma(5.0, 0.01), 0.1))
    assert predict(PATIENT, slow, 10).period.high >= 10.5


def test_an_all_reduce_ends_for_all_at_once():
    """Its duration is drawn once: nobody waits for the slowest of eight."""
    prices = costs(1, all_reduce=Gamma(1.0, 0.5))
    schedule = data_parallel(bp(1), 8)
    found = estimate(periods(schedule, prices, 100, 0, range(64)), 0.999)
    assert found.low < 4.0 < found.high
    one, other = (engine(schedule, prices, 4, run=3) for engine in (simulate, evaluate))
    assert one.makespan == pytest.approx(other.makespan, rel=1e-12)


def test_replicas_wait_for_the_slowest_forward_pass():
    """E max of two exponential times is 1.5 means."""
    prices = costs(1, forward=Gamma(1.0, 1.0), backward=0.0)
    found = estimate(periods(data_parallel(bp(1), 2), prices, 400, 0, range(128)), 0.999)
    assert found.low < 1.5 < found.high


def test_the_baseline_has_the_same_devices():
    assert predict(dp(4, 1), costs(4, comm=1.0), 10).speedup.value == 1.0
    two = predict(interleaved(4, 4, 2), costs(4), 10)
    assert two.bp_period == pytest.approx(4 * 12.0)
    assert predict(bp(1), costs(1, forward=Gamma(1.0, 1.0)), 10).utilisation[0] <= 1.0
    silent = costs(2, forward=Samples((0.0,)), backward=0.0)
    assert predict(ddg(2), silent, 10).speedup is None


# --- Networks -----------------------------------------------------------------------------------


def bus(sharing, *links):
    return Network(buses=(Bus(frozenset(links), sharing),))


def test_a_shared_bus_halves_what_crosses_it():
    """Two links, each busy 3 s per iteration, on one bus: 6 s per iteration."""
    links = [(0, 1), (1, 2)]
    prices = costs(3, forward=0.1, backward=0.1, activation_transfer=3.0)
    for sharing in Sharing:
        shared = dataclasses.replace(prices, network=bus(sharing, *links))
        found = predict(ddg(3), shared, 40, engine="des")
        assert found.period.value == pytest.approx(6.0, rel=1e-6)
        assert predict(ddg(3), prices, 40, engine="des").period.value == pytest.approx(3.0)
        assert found.cycle is None
        with pytest.raises(ValueError, match="buses"):
            predict(ddg(3), shared, 40, engine="cycle")


@pytest.mark.parametrize("sharing", list(Sharing))
def test_a_bus_with_one_link_is_a_link(sharing):
    prices = costs(3, comm=(0.7, 1.3))
    alone = dataclasses.replace(prices, network=bus(sharing, (0, 1)))
    for schedule in (bp(3), ddg(3), ddg(3, Sync.MAILBOX)):
        one = simulate(schedule, prices, 8)
        other = simulate(schedule, alone, 8)
        assert np.sort(one.op_columns["end"]) == pytest.approx(np.sort(other.op_columns["end"]))


@pytest.mark.parametrize(
    ("sharing", "ends"), [(Sharing.FIFO, [3.0, 5.0, 7.0]), (Sharing.FAIR, [3.0, 6.0, 7.0])]
)
def test_who_queues_and_who_shares(sharing, ends):
    """Activation 1 is on the bus from 3 s on, and gradient 0 asks for it at 4 s."""
    prices = costs(2, forward=1.0, backward=0.0, comm=2.0, network=bus(sharing, (0, 1), (1, 0)))
    moved = sorted(s.end for s in simulate(ddg(2), prices, 2).spans if s.message is not None)
    assert moved[:3] == pytest.approx(ends)


def test_a_queue_serves_in_the_order_in_which_it_was_asked():
    """Activations 1 and 2 of the first link are asked for before the second link's first."""
    shared = bus(Sharing.FIFO, (0, 1), (1, 2))
    prices = costs(3, (1.0, 0.5, 0.1), 0.0, activation_transfer=4.0, network=shared)
    moved = [s for s in simulate(ddg(3), prices, 3).spans if s.message is not None]
    order = [(s.lane, s.message.sample) for s in sorted(moved, key=lambda s: s.start)][:4]
    assert order == [("link 1→2", 0), ("link 1→2", 1), ("link 1→2", 2), ("link 2→3", 0)]


def test_contention_works_with_a_bus():
    prices = costs(2, comm=0.1, network=bus(Sharing.FIFO, (0, 1), (1, 0)))
    found = predict(ddg(2), prices, 20, engine="des", contention=[1.5, 1.5])
    assert found.period.value == pytest.approx(4.5, rel=0.02)


def test_blocking_transfers_cost_the_sender():
    free = costs(2, forward=1.0, backward=1.0, comm=0.5)
    blocking = dataclasses.replace(free, network=Network(blocking=True))
    assert cycle_time(ddg(2), free).period == 2.5
    assert cycle_time(ddg(2), blocking).period == 2.5
    heavy = dataclasses.replace(blocking, forward=(3.0, 1.0))
    assert cycle_time(ddg(2), heavy).period == 4.5  # stage 1 computes 4 s and sends 0.5 s
    assert cycle_time(ddg(2), dataclasses.replace(heavy, network=Network())).period == 4.0


@settings(max_examples=100, deadline=None)
@given(costed(), st.integers(1, 7))
def test_both_engines_agree_on_blocking_transfers(pair, iterations):
    schedule, prices = pair
    prices = dataclasses.replace(prices, network=Network(blocking=True))
    try:
        theirs = evaluate(schedule, prices, iterations)
    except ValueError:
        with pytest.raises(ValueError, match="deadlock"):
            simulate(schedule, prices, iterations)
        return
    ours = simulate(schedule, prices, iterations)
    order = ["lane", "position", "iteration"]
    one, other = np.sort(ours.op_columns, order=order), np.sort(theirs.op_columns, order=order)
    assert one["end"] == pytest.approx(other["end"], rel=1e-9, abs=1e-9)
