"""Workers that share cores: hand-computed runs, conservation of work, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddg_sim.contention import contended
from ddg_sim.costs import Costs, costs
from ddg_sim.cycletime import cycle_time, evaluate
from ddg_sim.decoupled import adl, dgl, fdg
from ddg_sim.methods import bp, data_parallel, ddg
from ddg_sim.predict import predict
from ddg_sim.replicate import exact_period, typical_period
from ddg_sim.schedule import OpKind, Schedule, Sync
from ddg_sim.simulate import simulate, steady_period
from ddg_sim.synchronous import gpipe, zb_h1
from ddg_sim.times import Gamma
from ddg_sim.whatif import improvements

SCHEDULES = [bp(3), ddg(3), ddg(4, Sync.BARRIER), fdg(3), adl(3, 2), dgl(3), gpipe(3), zb_h1(3)]


@pytest.mark.parametrize(
    ("backward", "seconds"),
    [
        ((2.0, 2.0, 2.0), 3.0),  # three share two cores: two thirds each
        ((1.0, 2.0, 2.0), 2.5),  # 1.5 s until the first ends, then a core each for what is left
        ((1.0, 1.0, 4.0), 4.5),
    ],
)
def test_between_barriers_by_hand(backward: tuple[float, ...], seconds: float) -> None:
    shared = costs(3, forward=1.0, backward=backward, cores=2)
    run = simulate(ddg(3, Sync.BARRIER), shared, 30)
    assert run.period == pytest.approx(3.0 + seconds)
    free = cycle_time(ddg(3, Sync.BARRIER), costs(3, forward=1.0, backward=backward))
    assert free.period == 3.0 + max(backward)


def work(schedule: Schedule, prices: Costs) -> float:
    """Seconds of all operations of an iteration."""
    return sum(prices.duration(template.kind, template.stage) for template in schedule.templates())


TIMES = st.lists(st.floats(0.2, 3.0), min_size=4, max_size=4)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.method)
@given(forward=TIMES, backward=TIMES)
@settings(max_examples=5, deadline=None)
def test_one_core_does_all_the_work(
    schedule: Schedule, forward: list[float], backward: list[float]
) -> None:
    k = schedule.num_stages
    prices = costs(k, forward[:k], backward[:k], update=0.125, cores=1)
    assert steady_period(schedule, prices) == pytest.approx(work(schedule, prices), rel=0.02)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.method)
@given(forward=TIMES, backward=TIMES)
@settings(max_examples=5, deadline=None)
def test_the_period_is_at_least_each_bound(
    schedule: Schedule, forward: list[float], backward: list[float]
) -> None:
    k = schedule.num_stages
    alone = costs(k, forward[:k], backward[:k])
    two = steady_period(schedule, costs(k, forward[:k], backward[:k], cores=2))
    assert two >= max(cycle_time(schedule, alone).period, work(schedule, alone) / 2) * 0.98
    assert two <= work(schedule, alone) * 1.02


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.method)
def test_as_many_cores_as_workers_change_nothing(schedule: Schedule) -> None:
    k = schedule.num_stages
    few, free = costs(k, comm=0.25, cores=k), costs(k, comm=0.25)
    assert list(simulate(schedule, few, 8).spans) == list(simulate(schedule, free, 8).spans)
    assert exact_period(schedule, few) == exact_period(schedule, free)


def test_replicas_share_the_cores_too() -> None:
    assert steady_period(data_parallel(bp(1), 4), costs(1, cores=2)) == pytest.approx(6.0)


def test_what_waits_uses_no_core() -> None:
    assert steady_period(bp(4), costs(4, cores=1)) == 12.0


def test_overlap_counts_what_runs_not_what_is_ready() -> None:
    one = costs(3, cores=1)
    assert contended(ddg(3), one, [1.5] * 3) == one  # nothing runs beside anything
    two = contended(ddg(3), costs(3, cores=2), [1.5] * 3)
    assert two.forward == pytest.approx([1.5] * 3)
    assert two.cores == 2


def test_after_a_wait_operations_take_longer() -> None:
    waits = {(OpKind.FORWARD, None): 1.5, (OpKind.BACKWARD, None): 1.25}
    found = contended(bp(2), costs(2), [waits] * 2)
    # Stage 1's forward pass follows its update, stage 2's backward pass its forward pass.
    assert found.forward == pytest.approx((1.0, 1.5))
    assert found.backward == pytest.approx((2.5, 2.0))
    busy = contended(ddg(2), costs(2), [waits] * 2)
    assert busy.forward == pytest.approx((1.0, 1.0), rel=0.02)  # it waits at the start only
    assert busy.backward == pytest.approx((2.0, 2.0), rel=0.02)


def test_predictions_say_that_cores_are_shared() -> None:
    found = predict(ddg(4), costs(4, cores=2), 40, engine="des")
    assert found.period.value == pytest.approx(6.0)
    assert not found.period_is_exact
    assert found.speedup is not None
    assert found.speedup.value == pytest.approx(2.0)
    assert found.utilisation == pytest.approx((0.5,) * 4)
    assert found.bound_by.startswith("4 workers take turns on 2 cores; with a core each, stage")


def test_random_times_on_shared_cores() -> None:
    prices = costs(3, Gamma(1.0, 0.1), cores=2)
    assert typical_period(ddg(3), prices, 20, runs=16) == pytest.approx(4.5, rel=0.05)


@pytest.mark.parametrize("answer", [cycle_time, improvements, lambda s, c: evaluate(s, c, 4)])
def test_the_max_plus_engine_refuses_shared_cores(answer) -> None:
    with pytest.raises(ValueError, match="cores is 2 for 3 workers.*can be simulated"):
        answer(ddg(3), costs(3, cores=2))


def test_no_cores_are_refused() -> None:
    with pytest.raises(ValueError, match="cores must be at least 1, got 0"):
        costs(2, cores=0)
