"""Quick searches for cuts, against brute force over all cuts."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddg_sim.cycletime import cycle_time
from ddg_sim.descent import descend, enumerate_all
from ddg_sim.layers import Layer, LayerGraph
from ddg_sim.methods import bp, data_parallel, ddg, fdg, gpipe
from ddg_sim.network import Network
from ddg_sim.partition import DoesNotFitError, partition
from ddg_sim.schedule import Sync
from ddg_sim.separable import Cuts, Row

DIGITS = 1e-8
SCHEDULES = [ddg(3), ddg(3, Sync.BARRIER), bp(3), gpipe(3, 2), fdg(4), data_parallel(ddg(2), 3)]


def chain(seed: int, count: int) -> LayerGraph:
    draw = np.random.default_rng(seed)
    layers = tuple(
        Layer(f"layer{n}", *draw.uniform(0, 3, 2), *map(int, draw.integers(0, 1000, 2)))
        for n in range(count)
    )
    return LayerGraph(layers, tuple(pairwise(range(count))))


def everything(schedule):
    """Arguments that make every part of the costs count."""
    return {
        "latency": 0.1,
        "bandwidth": 400.0,
        "overhead": 0.05,
        "message": 0.02,
        "all_reduce_latency": 0.3,
        "all_reduce_rate": 1e-3,
        "speeds": [1.0 + 0.5 * (worker % 2) for worker in range(len(schedule.workers))],
        "network": Network(blocking=True),
    }


def each_cut(graph, schedule, **arguments):
    """Periods of all cuts, by fixing them: each stage's layers are made one."""
    found = {}
    for cuts in combinations(range(1, len(graph.layers)), schedule.num_stages - 1):
        bounds = [0, *cuts, len(graph.layers)]
        parts = [graph.layers[start:end] for start, end in pairwise(bounds)]
        merged = tuple(
            Layer(
                "stage",
                sum(layer.forward for layer in part),
                sum(layer.backward for layer in part),
                part[-1].output_bytes,
                sum(layer.parameter_bytes for layer in part),
            )
            for part in parts
        )
        small = LayerGraph(merged, tuple(pairwise(range(len(merged)))))
        costs = partition(small, schedule, **arguments).costs
        found[cuts] = cycle_time(schedule, costs).period
    return found


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.method}-{s.sync.value}")
@pytest.mark.parametrize("search", ["all", "quick", "exact"])
def test_searches_find_what_brute_force_finds(schedule, search, monkeypatch):
    if search != "all":
        monkeypatch.setattr("ddg_sim.partition.FEW", 0)
    for seed in range(3):
        graph = chain(seed, 7)
        periods = each_cut(graph, schedule, **everything(schedule))
        found = partition(graph, schedule, quick=search == "quick", **everything(schedule))
        least = min(periods.values())
        assert found.period == pytest.approx(periods[found.cuts], rel=DIGITS)
        assert found.lower_bound <= least * (1 + DIGITS)
        if search == "quick":  # no single move helps, by its own account
            assert found.period <= 1.2 * least
        else:
            assert found.exact
            assert found.period == pytest.approx(least, rel=DIGITS)


@given(st.data())
@settings(max_examples=60)
def test_looking_at_all_cuts_keeps_the_limits(data):
    number = st.integers(0, 9).map(float)
    cuts, size = data.draw(st.integers(1, 3)), 7
    basis = np.array(data.draw(st.lists(number, min_size=size, max_size=size)))[None].repeat(
        cuts, 0
    )
    problem = Cuts(basis[:, None, :])
    weights = st.lists(st.integers(-3, 3).map(float), min_size=cuts, max_size=cuts)
    for rate in (1.0, 2.0, 0.0):
        limit = data.draw(number) if rate == 0 else 0.0
        problem.add(Row(np.array(data.draw(weights))[:, None], 1.0, rate, limit))
    every = list(combinations(range(1, size - 1), cuts))
    within = [choice for choice in every if problem.within_limits(choice)]
    if not within:
        return
    best = min(map(problem.level, within))
    if best <= 0:
        return  # relative tolerances say nothing here
    found = enumerate_all(problem, problem.level)
    assert found.cuts == next(c for c in within if problem.level(c) <= best * (1 + 1e-9))
    rough = descend(problem, problem.level, within[:1])
    assert problem.within_limits(rough.cuts)
    assert rough.lower_bound <= best * (1 + 1e-9) <= rough.value * (1 + 2e-9)


def test_a_short_memory_is_searched_to_the_end(monkeypatch):
    monkeypatch.setattr("ddg_sim.partition.FEW", 0)
    graph, schedule = chain(5, 24), ddg(5)
    free = partition(graph, schedule, bandwidth=200.0, quick=True)
    tight = 0.8 * max(free.memory)
    arguments = {"bandwidth": 200.0, "capacities": tight}
    quick, slow = (partition(graph, schedule, quick=q, **arguments) for q in (True, False))
    assert max(quick.memory) <= tight
    assert quick.period == pytest.approx(slow.period, rel=DIGITS)
    with pytest.raises(DoesNotFitError):
        partition(graph, schedule, capacities=0.1 * tight, quick=True)


@pytest.mark.parametrize("share", [0.95, 0.85, 0.75])
def test_memory_that_rules_out_the_relaxed_optimum_is_noticed(share, monkeypatch):
    """Once all starts fitted, the best cuts did not, and what was found was far from the best."""
    monkeypatch.setattr("ddg_sim.partition.FEW", 0)
    schedule = bp(6)
    for seed in range(4):
        graph = chain(seed, 24)
        free = partition(graph, schedule, bandwidth=30.0)
        arguments = {"bandwidth": 30.0, "capacities": share * max(free.memory)}
        quick, slow = (partition(graph, schedule, quick=q, **arguments) for q in (True, False))
        assert quick.period == pytest.approx(slow.period, rel=DIGITS)
        assert quick.period >= free.period
