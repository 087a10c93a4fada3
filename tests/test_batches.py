"""Many batches at once, against brute force over all cuts of each."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from ddg_sim.batches import partitions
from ddg_sim.cutcosts import CutCosts
from ddg_sim.cycletime import cycle_time
from ddg_sim.layers import Layer, LayerGraph
from ddg_sim.methods import bp, data_parallel, ddg, gpipe
from ddg_sim.partition import partition
from ddg_sim.schedule import Schedule, Sync

SCHEDULES = [bp(3), ddg(3), ddg(3, Sync.BARRIER), gpipe(3, 2), data_parallel(ddg(3), 2)]
BATCHES = [0.1, 0.2, 0.5, 1.0, 1.5, 3.0, 7.0]


def chain(seed: int, count: int, scale: float = 1.0) -> LayerGraph:
    """A chain of layers, all sizes proportional to ``scale`` but those of the parameters."""
    draw = np.random.default_rng(seed)
    layers = tuple(
        Layer(
            f"layer{n}",
            *(scale * draw.uniform(0, 3, 2)),
            output_bytes=round(scale * 10 * int(draw.integers(0, 1000))),
            parameter_bytes=int(draw.integers(0, 1000)),
        )
        for n in range(count)
    )
    return LayerGraph(layers, tuple(pairwise(range(count))))


def devices(schedule: Schedule) -> dict[str, object]:
    """Links and all-reduces of which different parts count for small and for large batches."""
    return {
        "latency": [0.5 + 0.9 * link for link in range(schedule.num_stages - 1)],
        "bandwidth": 3e4,
        "overhead": 0.05,
        "all_reduce_latency": 0.1,
        "all_reduce_rate": 1e-3,
    }


@pytest.mark.parametrize("few", [0, 20_000])
@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda each: f"{each.method}{each.sync.value}")
def test_every_batch_is_cut_as_brute_force_cuts_it(schedule, quick, few, monkeypatch):
    monkeypatch.setattr("ddg_sim.partition.FEW", few)
    changes = set()
    for seed in range(2):
        costs = CutCosts(chain(seed, 9), schedule, **devices(schedule))
        for batch, cut in partitions(costs, BATCHES, quick).items():
            found, here = cut.partition, costs.at(batch)
            every = combinations(range(1, 9), schedule.num_stages - 1)
            least = min(cycle_time(schedule, here.costs(cuts)).period for cuts in every)
            # What it says about these cuts is true, whether or not it asked for this batch.
            truth = cycle_time(schedule, here.costs(found.cuts))
            assert found.period == pytest.approx(truth.period, rel=1e-9)
            assert sum(found.cycle.durations) == pytest.approx(found.period * found.cycle.tokens)
            assert found.lower_bound <= least * (1 + 1e-9)
            if few or not quick:
                assert found.exact
            if found.exact:
                assert found.period == pytest.approx(least, rel=1e-8)
            changes.add((found.cuts, found.cycle.critical_cycle))
    assert len(changes) > (3 if schedule == ddg(3) else 1)  # else all batches were alike


def test_a_batch_is_the_same_network_with_other_sizes():
    for batch in (0.5, 2.0):  # sizes that rounding leaves alone
        grown = chain(3, 9, batch)
        alone = partition(grown, ddg(3), **devices(ddg(3)))
        costs = CutCosts(chain(3, 9), ddg(3), **devices(ddg(3)))
        found = partitions(costs, [0.5, 1.0, 2.0])[batch].partition
        assert (found.cuts, found.period) == (alone.cuts, pytest.approx(alone.period))
        assert found.memory == pytest.approx(alone.memory)


@pytest.mark.parametrize("few", [0, 20_000])
def test_batches_that_do_not_fit_are_told_apart(few, monkeypatch):
    monkeypatch.setattr("ddg_sim.partition.FEW", few)
    schedule = ddg(3)
    costs = CutCosts(chain(5, 9), schedule, capacities=120_000, **devices(schedule))
    found = partitions(costs, BATCHES)
    fits = {}
    for batch in BATCHES:
        here, allowed = costs.at(batch), []
        for cuts in combinations(range(1, 9), 2):
            if max(here.memory(cuts)) <= 120_000:
                allowed.append(cycle_time(schedule, here.costs(cuts)).period)
        fits[batch] = bool(allowed)
        assert (found[batch].missing is None) == bool(allowed)
        if allowed:
            assert max(found[batch].partition.memory) <= 120_000
            least = min(allowed)
            assert least * (1 - 1e-9) <= found[batch].partition.period <= least * 1.001
        else:
            assert str(found[batch].missing).startswith("does not fit: stage")
    assert set(fits.values()) == {True, False}
