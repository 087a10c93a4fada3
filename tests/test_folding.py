"""More stages than devices: what runs stays, who runs it takes turns."""

from collections import defaultdict

import pytest

from ddg_sim.costs import Costs
from ddg_sim.cutcosts import CutCosts
from ddg_sim.cycletime import cycle_time
from ddg_sim.folding import fold
from ddg_sim.layers import Layer, LayerGraph
from ddg_sim.methods import METHODS, bp, ddg, method, pd_asgd
from ddg_sim.plan import plan
from ddg_sim.schedule import Op, Schedule, ScheduleError, Sync
from ddg_sim.simulate import steady_period

UNEVEN = Costs(
    forward=(1.0, 1.3, 0.8, 1.7, 1.1, 0.9),
    backward=(2.1, 1.9, 2.4, 1.2, 2.2, 1.6),
    update=(0.1,) * 6,
    activation_transfer=(0.3, 0.1, 0.2, 0.4, 0.1),
    gradient_transfer=(0.2, 0.3, 0.1, 0.1, 0.5),
)


def runs(schedule: Schedule) -> dict[int, list[Op]]:
    """Per stage what it runs, in its order."""
    found = defaultdict(list)
    for worker in range(len(schedule.workers)):
        for op in schedule.program(worker, iterations=12):
            found[op.stage].append(op)
    return found


def cases() -> list[Schedule]:
    found = []
    for name in METHODS:
        for sync in Sync:
            try:
                found.append(method(name, 6, sync))
            except ValueError:
                continue
    return [schedule for schedule in found if schedule.method != "pd-asgd"]


@pytest.mark.parametrize("schedule", cases(), ids=lambda each: f"{each.method}-{each.sync.value}")
@pytest.mark.parametrize("share", [2, 4])
def test_folding_changes_who_runs_it_and_nothing_else(schedule, share):
    folded = fold(schedule, share)
    assert len(folded.workers) == -(-len(schedule.workers) // share)
    if len(schedule.workers) == schedule.num_stages:
        # The very same operations: samples, versions, and the tick in which they run.
        assert runs(folded) == runs(schedule)
    period = cycle_time(folded, UNEVEN).period
    assert steady_period(folded, UNEVEN, 1000) == pytest.approx(period, rel=1e-9)
    for body in folded.workers:  # turns are taken
        assert period >= sum(UNEVEN.duration(op.kind, op.stage) for op in body) * (1 - 1e-9)


def test_on_one_device_nothing_waits():
    work = sum(UNEVEN.forward) + sum(UNEVEN.backward) + sum(UNEVEN.update)
    for schedule in (bp(6), ddg(6), ddg(6, Sync.BARRIER), ddg(6, Sync.MAILBOX)):
        assert cycle_time(fold(schedule, 6), UNEVEN).period == pytest.approx(work)


def test_memory_of_a_device_is_that_of_its_stages():
    layers = tuple(Layer(f"layer{n}", 1, 2, 10 + n, 5 * n) for n in range(8))
    graph = LayerGraph(layers, tuple((n, n + 1) for n in range(7)))
    apart = CutCosts(graph, ddg(4)).memory((2, 3, 6))
    together = CutCosts(graph, fold(ddg(4), 2)).memory((2, 3, 6))
    assert together == pytest.approx((apart[0] + apart[1], apart[2] + apart[3]))


def test_a_plan_folds_and_compares_with_as_many_devices():
    layers = tuple(Layer(f"layer{n}", 0.01, 0.02) for n in range(8))
    graph = LayerGraph(layers, tuple((n, n + 1) for n in range(7)))
    found = plan(graph, ["ddg"], [4], stages_per_device=[1, 2, 4, 8])
    assert {row.devices: row.period.value for row in found.rows} == {
        4: pytest.approx(0.06),
        2: pytest.approx(0.12),
        1: pytest.approx(0.24),
    }
    assert [row.over_bp.value for row in found.rows if row.over_bp] == pytest.approx([4, 2, 1])
    assert found.skipped == {"fewer stages than were to share a device": 1}


def test_a_stage_on_two_workers_is_not_folded():
    with pytest.raises(ScheduleError, match="pd-asgd has stages on two workers each"):
        fold(pd_asgd(4), 2)
