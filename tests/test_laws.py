"""Metamorphic laws: what may be renamed, reordered or left idle changes no answer."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import costed, costs_for, quarters

from ddg_sim.cluster import Cluster
from ddg_sim.costs import Costs
from ddg_sim.cycletime import cycle_time, evaluate
from ddg_sim.layers import Layer, LayerGraph
from ddg_sim.methods import METHODS, data_parallel, method
from ddg_sim.placement import place
from ddg_sim.point import Setting, outcomes
from ddg_sim.predict import ENGINES, predict
from ddg_sim.schedule import OpKind, Schedule, Sync
from ddg_sim.simulate import simulate, steady_period
from ddg_sim.timeline import Timeline

STAGES = 4
CATALOGUE = {name: method(name, STAGES) for name in METHODS}
CATALOGUE |= {f"ddg {sync.value}": method("ddg", STAGES, sync=sync) for sync in Sync}
every = pytest.mark.parametrize("schedule", CATALOGUE.values(), ids=CATALOGUE)
both = pytest.mark.parametrize("engine", ENGINES)
ENGINE = {"des": simulate, "cycle": evaluate}


def whole(run: Timeline) -> dict[str, tuple[float, float]]:
    """When everything took place, but not on which worker."""
    found = {
        str(span.op or span.message): (span.start, span.end)
        for span in run.spans
        if span.op is None or span.op.kind is not OpKind.ALL_REDUCE
    }
    assert found
    return found


def assert_same_run(one: Timeline, other: Timeline) -> None:
    ours, theirs = whole(one), whole(other)
    assert ours.keys() == theirs.keys()
    for name, times in ours.items():
        assert times == pytest.approx(theirs[name], rel=1e-12, abs=1e-12), name
    assert one.makespan == pytest.approx(other.makespan, rel=1e-12)
    assert one.memory == other.memory


# --- Names of workers, replicas and stages ------------------------------------------------------


def assert_order_of_workers_is_a_name(schedule: Schedule, prices: Costs, order: list[int]) -> None:
    workers = tuple(schedule.workers[worker] for worker in order)
    renamed = dataclasses.replace(schedule, workers=workers)
    for engine in ENGINES:
        found, same = (predict(s, prices, 5, engine) for s in (schedule, renamed))
        assert_same_run(found.timeline, same.timeline)
        assert same.period.value == pytest.approx(found.period.value, rel=1e-9)
        assert same.bp_period == pytest.approx(found.bp_period, rel=1e-9)
        assert (same.staleness, same.memory) == (found.staleness, found.memory)
        busy = [found.utilisation[worker] for worker in order]
        assert same.utilisation == pytest.approx(busy, rel=1e-9)
        lanes = [found.timeline.utilisation[worker] for worker in order]
        assert same.timeline.utilisation == pytest.approx(lanes, rel=1e-9)


@every
@settings(max_examples=3, deadline=None)
@given(prices=costs_for(STAGES, quarters), data=st.data())
def test_the_order_of_the_workers_is_only_a_name(
    schedule: Schedule, prices: Costs, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(schedule.workers))))
    assert_order_of_workers_is_a_name(schedule, prices, order)


@settings(max_examples=40, deadline=None)
@given(costed(quarters), st.data())
def test_the_order_of_any_schedules_workers_is_only_a_name(
    pair: tuple[Schedule, Costs], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(pair[0].workers))))
    assert_order_of_workers_is_a_name(*pair, order)


@every
@both
@settings(max_examples=3, deadline=None)
@given(prices=costs_for(STAGES, quarters))
def test_replicas_that_meet_in_no_time_run_like_one(
    schedule: Schedule, engine: str, prices: Costs
) -> None:
    alone = dataclasses.replace(schedule, replicas=1)
    free = dataclasses.replace(prices, overhead=())
    if schedule.replicas == 1:
        copies = [data_parallel(schedule, replicas) for replicas in (2, 3)]
    else:  # data parallelism itself has its all-reduce already
        copies = [dataclasses.replace(schedule, replicas=replicas) for replicas in (2, 3)]
    for several in copies:
        assert_same_run(*(ENGINE[engine](s, free, 4) for s in (alone, several)))
        assert cycle_time(several, free).period == pytest.approx(cycle_time(alone, free).period)


def permuted(prices: Costs, order: list[int]) -> Costs:
    """Costs of stages in another order; transfers are free."""
    names = ("forward", "backward", "update", "recompute")
    return Costs(**{n: tuple(getattr(prices, n)[stage] for stage in order) for n in names})


#: Nobody ever waits for a slower neighbour but for the slowest one's own work.
SLOWEST_DECIDES = ("fdg", "adl", "dsp", "stale", "pb", "sideways", "petra")


@pytest.mark.parametrize("name", SLOWEST_DECIDES)
@settings(max_examples=10, deadline=None)
@given(prices=costs_for(STAGES, quarters), data=st.data())
def test_where_the_slowest_stage_decides_the_order_of_stages_does_not(
    name: str, prices: Costs, data: st.DataObject
) -> None:
    schedule, order = method(name, STAGES), data.draw(st.permutations(range(STAGES)))
    found, same = (permuted(prices, places) for places in (range(STAGES), order))
    expected = cycle_time(schedule, found).period
    assert cycle_time(schedule, same).period == pytest.approx(expected, rel=1e-9)
    assert steady_period(schedule, same) == pytest.approx(expected, rel=1e-9)


@both
@settings(max_examples=20, deadline=None)
@given(prices=costs_for(STAGES, quarters), data=st.data())
def test_backpropagation_takes_as_long_with_its_stages_in_any_order(
    engine: str, prices: Costs, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(STAGES)))
    free = dataclasses.replace(prices, update=())
    runs = [
        ENGINE[engine](method("bp", STAGES), permuted(free, places), 6)
        for places in (range(STAGES), order)
    ]
    assert runs[0].makespan == pytest.approx(runs[1].makespan, rel=1e-12)
    assert runs[0].period == pytest.approx(runs[1].period, rel=1e-12)


@every
@settings(max_examples=2, deadline=None)
@given(prices=costs_for(STAGES, quarters), data=st.data())
def test_identical_stages_may_change_places(
    schedule: Schedule, prices: Costs, data: st.DataObject
) -> None:
    """Stages of which two are alike, described in two orders: layer names are all that differs."""
    one, other = data.draw(st.permutations(range(STAGES)))[:2]
    layers = [
        Layer(f"layer {stage}", forward, backward, 8, 4)
        for stage, (forward, backward) in enumerate(
            zip(prices.forward, prices.backward, strict=True)
        )
    ]
    layers[other] = dataclasses.replace(layers[one], name="alike")
    swapped = list(layers)
    swapped[one], swapped[other] = layers[other], layers[one]
    chain = tuple((stage, stage + 1) for stage in range(STAGES - 1))
    devices = [{"name": "gpu", "count": STAGES * schedule.replicas}]
    joined = {"bandwidth": "16 B/s", "latency": "250 ms"}
    cluster = Cluster.model_validate({"version": 1, "devices": devices, "default_link": joined})
    found, same = (
        outcomes(Setting(LayerGraph(tuple(order), chain), cluster), schedule, [1.0])[0]
        for order in (layers, swapped)
    )
    assert (same.cuts, same.memory, same.bound) == (found.cuts, found.memory, found.bound)
    assert same.periods.tolist() == found.periods.tolist()


# --- Idle devices -------------------------------------------------------------------------------

speeds = st.sampled_from([0.5, 1.0, 2.0])


@st.composite
def clusters(draw: st.DrawFn, devices: int, even: bool) -> dict[str, Any]:
    """Clusters of so many devices, with links of their own here and there, and maybe a bus."""
    first = draw(speeds)
    groups = [{"name": f"gpu{i}", "speed": first if even else draw(speeds)} for i in range(devices)]
    sharing = draw(st.sampled_from(["fifo", "fair"]))
    link = {"bandwidth": "4 B/s", "latency": "1 s"}
    links = [
        {"between": [f"gpu{i}", f"gpu{i + 1}"], "bandwidth": draw(st.sampled_from(["2 B/s"]))}
        for i in range(devices - 1)
        if draw(st.booleans())
    ]
    return {
        "version": 1,
        "devices": groups,
        "default_link": {**link, "bus": "shared"} if draw(st.booleans()) else link,
        "links": links,
        "buses": [{"name": "shared", "sharing": sharing}],
        "transfers": draw(st.sampled_from(["overlapped", "blocking"])),
    }


@every
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_an_idle_device_changes_nothing(schedule: Schedule, data: st.DataObject) -> None:
    needed = len(schedule.workers) * schedule.replicas
    split = schedule.worker_of(0) != schedule.worker_of(0, OpKind.FORWARD)
    described = data.draw(clusters(needed, even=split))  # workers of a stage are equally fast
    if schedule.replicas > 1:  # whose links may not share a bus
        described["default_link"] = {"bandwidth": "4 B/s"}
    if described["transfers"] == "blocking" and schedule.replicas == 1:
        described["default_link"].pop("bus", None)
    idle = {"name": "idle", "count": data.draw(st.integers(1, 3)), "speed": data.draw(speeds)}
    slow = {"between": ["idle", "gpu0"], "bandwidth": "1 B/s", "bus": "shared"}
    larger = {
        **described,
        "devices": [*described["devices"], {**idle, "memory": "1 B"}],
        "links": [*described["links"], slow],
    }
    small, large = (Cluster.model_validate(found) for found in (described, larger))
    assert place(schedule, large) == place(schedule, small)
    if schedule.method != "gpipe":  # simulating every schedule on a bus until it repeats takes long
        described["default_link"].pop("bus", None)
        larger["default_link"] = described["default_link"]
        small, large = (Cluster.model_validate(found) for found in (described, larger))
    layers = tuple(Layer(str(i), 1.0 + i % 3, 2.0, 8, 4) for i in range(STAGES))
    graph = LayerGraph(layers, tuple((i, i + 1) for i in range(STAGES - 1)))
    found, same = (
        outcomes(Setting(graph, cluster), schedule, [1.0])[0] for cluster in (small, large)
    )
    assert dataclasses.replace(same, periods=found.periods) == found
    assert same.periods.tolist() == found.periods.tolist()
