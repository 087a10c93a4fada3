"""Partitions against brute force: all cuts, each judged by `cycle_time`."""

from dataclasses import replace
from itertools import combinations, pairwise

import closed_forms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import schedules

from ddg_sim import labels, separable
from ddg_sim.costs import Costs
from ddg_sim.cycletime import cycle_time
from ddg_sim.layers import Layer, LayerGraph
from ddg_sim.lowering import memory
from ddg_sim.methods import METHODS, bp, ddg, dgl, fr, gpipe, method
from ddg_sim.partition import DoesNotFitError, partition
from ddg_sim.schedule import Sync

DIGITS = 1e-8


@pytest.fixture(scope="module", autouse=True)
def searching():
    """Search here even where all cuts could be looked at; test_descent.py compares the two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddg_sim.partition.FEW", 0)
        yield


@st.composite
def graphs(draw, layers, seconds=None):
    """Chains with some more edges; equal times and sizes are likely, so that there are ties."""
    seconds = seconds or st.one_of(st.integers(0, 3).map(float), st.floats(0, 5))
    measured = tuple(
        Layer(
            f"layer{n}",
            draw(seconds),
            draw(seconds),
            draw(st.integers(0, 1000)),
            draw(st.integers(0, 50)),
        )
        for n in range(draw(st.integers(*layers)))
    )
    ends = st.integers(0, len(measured) - 1)
    more = draw(st.lists(st.tuples(ends, ends).filter(lambda edge: edge[0] < edge[1]), max_size=3))
    return LayerGraph(measured, (*pairwise(range(len(measured))), *more))


@st.composite
def devices(draw, schedule):
    """Arguments of `partition`."""
    links = schedule.num_stages - 1
    alike = any(
        len({w for w, body in enumerate(schedule.workers) if any(t.stage == k for t in body)}) > 1
        for k in range(schedule.num_stages)
    )
    speed = st.sampled_from([0.5, 0.7, 1.0, 2.0])
    return {
        "speeds": 1.0 if alike else [draw(speed) for _ in schedule.workers],
        "latency": [draw(st.sampled_from([0.0, 0.1, 1.0])) for _ in range(links)],
        "bandwidth": [draw(st.sampled_from([float("inf"), 1000.0, 300.0])) for _ in range(links)],
        "barrier": draw(st.sampled_from([0.0, 0.5])),
    }


def costs_of(graph, schedule, cuts, speeds=1.0, latency=0.0, bandwidth=float("inf"), barrier=0.0):
    """What the stages and links of these cuts cost, layer by layer."""
    stages, links = range(schedule.num_stages), range(schedule.num_stages - 1)
    speeds = [speeds] * len(schedule.workers) if isinstance(speeds, float) else speeds
    latency = [latency] * len(links) if isinstance(latency, float) else latency
    bandwidth = [bandwidth] * len(links) if isinstance(bandwidth, float) else bandwidth
    speed = [speeds[schedule.worker_of(k)] for k in stages]
    parts = [graph.layers[i:j] for i, j in pairwise([0, *cuts, len(graph.layers)])]
    transfer = tuple(latency[k] + graph.crossing(cuts[k]) / bandwidth[k] for k in links)
    return Costs(
        forward=tuple(sum(layer.forward for layer in parts[k]) / speed[k] for k in stages),
        backward=tuple(sum(layer.backward for layer in parts[k]) / speed[k] for k in stages),
        activation_transfer=transfer,
        gradient_transfer=transfer,
        barrier=barrier,
    )


def every_cut(graph, schedule):
    return combinations(range(1, len(graph.layers)), schedule.num_stages - 1)


def bytes_of(graph, schedule, cuts, optimizer_state):
    """Peak bytes per stage of a method that keeps whole graphs, layer by layer."""
    held = memory(schedule)
    needs = []
    for k, (i, j) in enumerate(pairwise([0, *cuts, len(graph.layers)])):
        weights = sum(layer.parameter_bytes for layer in graph.layers[i:j])
        outputs = sum(layer.output_bytes for layer in graph.layers[i:j])
        sample = outputs + (graph.crossing(i) if i else 0)
        needs.append(
            weights * (held[k].weight_versions + optimizer_state) + held[k].activations * sample
        )
    return needs


def assert_optimal(graph, schedule, given, cuts=None):
    """The least period of all cuts, attained by the first that attains it."""
    among = {
        cut: cycle_time(schedule, costs_of(graph, schedule, cut, **given)).period
        for cut in (every_cut(graph, schedule) if cuts is None else cuts)
    }
    least = min(among.values())
    found = partition(graph, schedule, **given) if cuts is None else None
    if found is not None:
        assert found.period == pytest.approx(least, rel=DIGITS)
        assert found.exact
        assert found.lower_bound <= least * (1 + 1e-12)
        assert found.cuts == min(cut for cut in among if among[cut] <= least * (1 + 1e-9))
    return least


@pytest.mark.parametrize("name", [name for name in METHODS if name != "dp"])
@settings(max_examples=6, deadline=None)
@given(st.data())
def test_every_method_is_cut_as_brute_force_cuts_it(name, data):
    schedule = method(name, 4 if name == "interleaved" else 3)
    graph = data.draw(graphs((schedule.num_stages, 7)))
    assert_optimal(graph, schedule, data.draw(devices(schedule)))


@pytest.mark.parametrize(
    "schedule", [bp(4), ddg(4), ddg(4, Sync.BARRIER), ddg(4, Sync.MAILBOX), fr(4, Sync.BARRIER)]
)
@settings(max_examples=12, deadline=None)
@given(st.data())
def test_synchronisation_is_part_of_the_question(schedule, data):
    graph = data.draw(graphs((4, 9)))
    assert_optimal(graph, schedule, data.draw(devices(schedule)))


@settings(max_examples=40, deadline=None)
@given(schedules(max_stages=3), st.data())
def test_whatever_schedule_it_is(schedule, data):
    graph = data.draw(graphs((schedule.num_stages, 6)))
    assert_optimal(graph, schedule, data.draw(devices(schedule)))


CLOSED = [
    (ddg(4), closed_forms.ddg_none),
    (ddg(4, Sync.BARRIER), closed_forms.ddg_barrier),
    (ddg(4, Sync.MAILBOX), closed_forms.ddg_mailbox),
]


@pytest.mark.parametrize(("schedule", "closed"), CLOSED)
@pytest.mark.parametrize("seed", [1, 3])
def test_where_bounds_alone_do_not_decide(schedule, closed, seed, monkeypatch):
    """Enough layers that the dynamic program has to choose, and every cut's closed form."""
    graph = random_chain(32, seed, more=3)
    arguments = {"speeds": [1.0, 2.0, 0.5, 1.0], "bandwidth": 300.0}
    monkeypatch.setattr(separable.Cuts, "lower_bound", lambda self: 0.0)  # no implied constraints
    found = partition(graph, schedule, **arguments)
    periods = {
        cut: closed(costs_of(graph, schedule, cut, **arguments))
        for cut in every_cut(graph, schedule)
    }
    assert found.exact
    assert found.period == pytest.approx(min(periods.values()), rel=DIGITS)
    assert found.cuts == min(periods, key=lambda cut: (periods[cut], cut))


def test_the_barrier_balances_backward_times_and_without_it_both():
    layers = [Layer(f"l{n}", f, b) for n, (f, b) in enumerate([(6, 1), (1, 3), (1, 3), (1, 1)])]
    graph = LayerGraph(tuple(layers), ((0, 1), (1, 2), (2, 3)))
    assert partition(graph, ddg(2, Sync.BARRIER)).cuts == (2,)  # 1 + 3 and 3 + 1 backward
    assert partition(graph, ddg(2)).cuts == (1,)  # 7 and 10, where (2,) has 11 and 6


# --- Memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [bp(3), ddg(3), ddg(3, Sync.BARRIER), gpipe(3, 2)])
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_of_the_partitions_that_fit_the_fastest(schedule, data):
    graph = data.draw(graphs((3, 7)))
    state = data.draw(st.sampled_from([0.0, 1.0, 2.5]))
    capacities = [data.draw(st.sampled_from([1500, 3000, 6000, 12000])) for _ in range(3)]
    needs = {cut: bytes_of(graph, schedule, cut, state) for cut in every_cut(graph, schedule)}
    fitting = [
        cut
        for cut, need in needs.items()
        if all(n <= capacity for n, capacity in zip(need, capacities, strict=True))
    ]
    arguments = {"capacities": capacities, "optimizer_state": state, "bandwidth": 500.0}
    if not fitting:
        least = min(
            max(n / c for n, c in zip(need, capacities, strict=True)) for need in needs.values()
        )
        with pytest.raises(DoesNotFitError, match=r"^does not fit: stage \d needs .* of ") as error:
            partition(graph, schedule, **arguments)
        cut = eval(str(error.value).split("(cuts ")[1].split(")")[0])
        fullest = max(n / c for n, c in zip(needs[tuple(cut)], capacities, strict=True))
        if "shared out best" in str(error.value):
            assert fullest == pytest.approx(least, rel=DIGITS)
        assert fullest >= least * (1 - DIGITS)  # where single moves lead no further
        return
    found = partition(graph, schedule, **arguments)
    assert found.cuts in fitting
    assert found.memory == pytest.approx(needs[found.cuts])
    least = min(
        cycle_time(schedule, costs_of(graph, schedule, cut, bandwidth=500.0)).period
        for cut in fitting
    )
    assert found.period == pytest.approx(least, rel=DIGITS)


def test_what_does_not_fit_is_said_with_its_sizes():
    layers = tuple(Layer(f"l{n}", 1, 2, 0, int(9.1e9)) for n in range(2))
    with pytest.raises(DoesNotFitError) as error:
        partition(LayerGraph(layers, ((0, 1),)), bp(2), capacities=[16e9, 32e9])
    assert str(error.value) == (
        "does not fit: stage 1 needs 18.2 GB of 16 GB, even where memory is shared out best"
        " (cuts [1]): give larger capacities or more stages"
    )


# --- Laws ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [bp(4), ddg(4), ddg(4, Sync.BARRIER), gpipe(4, 3)])
def test_units_do_not_matter(schedule):
    graph = random_chain(40, seed=3)
    scaled = LayerGraph(
        tuple(replace(la, forward=8 * la.forward, backward=8 * la.backward) for la in graph.layers),
        graph.edges,
    )
    found = partition(graph, schedule, bandwidth=1000.0)
    again = partition(scaled, schedule, bandwidth=125.0)
    assert again.cuts == found.cuts
    assert again.period == pytest.approx(8 * found.period, rel=1e-12)


@pytest.mark.parametrize("schedule", [bp(4), ddg(4), ddg(4, Sync.MAILBOX), ddg(4, Sync.BARRIER)])
def test_better_devices_and_links_are_never_slower(schedule):
    graph = random_chain(40, seed=4)
    slow = partition(graph, schedule, speeds=[1, 1, 0.5, 1], bandwidth=200.0, latency=0.5)
    for better in ({"speeds": 1.0}, {"bandwidth": 400.0}, {"latency": 0.1}):
        arguments = {"speeds": [1, 1, 0.5, 1], "bandwidth": 200.0, "latency": 0.5} | better
        assert partition(graph, schedule, **arguments).period <= slow.period * (1 + DIGITS)


def test_a_layer_that_costs_nothing_changes_no_period():
    graph = random_chain(30, seed=5)
    layers = (*graph.layers, Layer("dropout", 0, 0, 0, 0))
    longer = LayerGraph(layers, (*graph.edges, (29, 30)))
    for schedule in (bp(4), ddg(4), ddg(4, Sync.BARRIER)):
        short = partition(graph, schedule, bandwidth=500.0).period
        assert partition(longer, schedule, bandwidth=500.0).period <= short * (1 + DIGITS)


def random_chain(layers, seed, more=0):
    random = np.random.default_rng(seed)
    measured = tuple(
        Layer(f"l{n}", f, b, int(size), 10)
        for n, (f, b, size) in enumerate(
            zip(
                random.uniform(0.1, 1, layers),
                random.uniform(0.2, 2, layers),
                random.integers(1, 1000, layers),
                strict=True,
            )
        )
    )
    jumps = [tuple(sorted(map(int, random.choice(layers, 2, replace=False)))) for _ in range(more)]
    return LayerGraph(measured, (*pairwise(range(layers)), *jumps))


def test_two_thousand_layers_are_cut_exactly():
    """A pipeline that never waits: the least largest stage, found greedily by bisection."""
    graph = random_chain(2000, seed=6)
    work = [layer.forward + layer.backward for layer in graph.layers]

    def stages_below(limit):
        count, load = 1, 0.0
        for seconds in work:
            load += seconds
            if load > limit:
                count, load = count + 1, seconds
        return count

    low, high = max(work), sum(work)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if stages_below(middle) <= 8 else (middle, high)
    found = partition(graph, dgl(8))
    assert found.period == pytest.approx(high, rel=DIGITS)
    assert found.exact


def test_where_it_gives_up_it_says_how_far_from_optimal_it_may_be(monkeypatch):
    graph = random_chain(40, seed=7)
    arguments = {"speeds": [1, 2, 0.5, 1], "bandwidth": 300.0}

    def start(problem, value_of, starts):  # a better one would leave nothing to search for
        return separable.Minimum(starts[0], value_of(starts[0]), 0.0)

    monkeypatch.setattr("ddg_sim.partition.descend", start)
    best = partition(graph, ddg(4, Sync.BARRIER), **arguments)
    assert best.exact
    monkeypatch.setattr(labels, "MOST_PAIRS", 50)
    rough = partition(graph, ddg(4, Sync.BARRIER), **arguments)
    assert not rough.exact
    assert rough.lower_bound < best.period < rough.period


@pytest.mark.parametrize("size", [0.99, 1.0])
def test_a_short_memory_that_is_hard_to_share_out_ends_with_an_answer(size, monkeypatch):
    graph = random_chain(12, seed=8)
    schedule = ddg(4)
    needs = [
        [
            need / speed
            for need, speed in zip(bytes_of(graph, schedule, c, 1.0), (1, 2, 3, 1), strict=True)
        ]
        for c in every_cut(graph, schedule)
    ]
    least = size * min(map(max, needs)) * (1 + 1e-9)
    capacities = [least * share for share in (1, 2, 3, 1)]
    monkeypatch.setattr(labels, "MOST_PAIRS", 0)
    try:
        found = partition(graph, schedule, capacities=capacities)
    except DoesNotFitError as error:  # it may give up, but must not say that nothing fits
        assert size < 1 or "as well as was found" in str(error)  # noqa: PT017
    else:
        assert size >= 1
        assert all(n <= c * (1 + 1e-9) for n, c in zip(found.memory, capacities, strict=True))


# --- Refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"speeds": [1.0]}, r"^speeds has 1 values, but 2 are needed"),
        ({"speeds": [1.0, 0.0]}, r"^speeds\[1\] is 0.0: give a number that is more than 0"),
        ({"bandwidth": float("nan")}, r"^bandwidth\[0\] is nan: give a number that is more than 0"),
        ({"latency": -1.0}, r"^latency\[0\] is -1.0: give a number that is at least 0"),
        ({"capacities": [1.0, -2.0]}, r"^capacities\[1\] is -2.0"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        partition(random_chain(4, seed=0), bp(2), **arguments)


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ValueError, match="graph has 2 layers, too few for the 3 stages"):
        partition(random_chain(2, seed=0), bp(3))
