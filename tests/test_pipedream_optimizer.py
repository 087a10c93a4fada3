"""PipeDream's optimizer: the figures that its authors' code prints, and brute force on chains."""

import csv
import os
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddg_sim.layers import Layer, LayerGraph
from ddg_sim.pipedream import read_graph
from ddg_sim.pipedream_optimizer import pipedream_plan


def anchors():
    if "DDG_ANCHORS" in os.environ:
        return Path(os.environ["DDG_ANCHORS"])
    here = Path(__file__).resolve()
    found = [parent / "shared" / "anchors" for parent in here.parents]
    return next((folder for folder in found if folder.exists()), Path("../shared/anchors"))


def printed():
    """Rows of the published run, by network and machines."""
    path = anchors() / "pipedream_optimizer.csv"
    if not path.exists():
        return []
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return list(csv.reader(lines))[1:]


ROWS = printed()
#: States are numbered along a topological order, which the original takes from a Python set.
NUMBERED_OTHERWISE = {"gnmt_large"}
#: Only the first stage bounds this pipeline: the other boundaries are a tie.
TIED = {("vgg16", "--straight_pipeline")}


@pytest.mark.skipif(
    not ROWS, reason="needs ../shared/anchors beside the repository, or DDG_ANCHORS"
)
def test_all_printed_rows_are_compared():
    assert len(ROWS) == 5


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}{row[3]}")
def test_the_printed_digits(row):
    name, machines, bandwidth, extra, stages, *figures = row
    plan = pipedream_plan(
        read_graph(anchors() / "pipedream" / f"{name}.graph.txt"),
        int(machines),
        float(bandwidth.partition("(")[0]),
        straight="--straight_pipeline" in extra,
    )
    ours = (
        plan.single_seconds,
        plan.stage_time,
        plan.speedup,
        plan.data_parallel_speedup,
        plan.speedup_over_data_parallel,
    )
    for figure, found in zip(figures, ours, strict=True):
        digits = len(figure.partition(".")[2])
        assert f"{found:.{digits}f}" == figure
    theirs = [stage.split(":") for stage in stages.split("|")]
    if (name, extra) in TIED:
        assert max(float(seconds) for _, seconds in theirs) == pytest.approx(plan.stage_time)
        return
    assert [f"{stage.seconds:.6f}" for stage in plan.stages] == [
        f"{float(seconds):.6f}" for _, seconds, *_ in theirs
    ]
    assert [stage.replicas for stage in plan.stages] == [
        int(replicas[0]) if replicas else 1 for _, _, *replicas in theirs
    ]
    assert str(plan.stages[-1].last) == theirs[-1][0].split("-")[1]  # the number of states
    if name not in NUMBERED_OTHERWISE:
        assert [f"{stage.first}-{stage.last}" for stage in plan.stages] == [s for s, *_ in theirs]


def shares(machines, stages):
    """All ways to give so many stages at least one of the machines each."""
    for bounds in combinations(range(1, machines), stages - 1):
        yield [b - a for a, b in pairwise([0, *bounds, machines])]


def brute_force(layers, machines, bandwidth, straight):
    """The least stage time of all ways to cut a chain and to give its stages machines."""
    best = float("inf")
    for stages in range(1, machines + 1):
        for cuts in combinations(range(1, len(layers)), stages - 1):
            parts = [layers[i:j] for i, j in pairwise([0, *cuts, len(layers)])]
            for replicas in shares(machines, stages):
                if straight and max(replicas) > 1:
                    continue
                times = []
                for part, r in zip(parts, replicas, strict=True):
                    weights = sum(layer.parameter_bytes for layer in part)
                    compute = sum(layer.forward + layer.backward for layer in part)
                    times.append((compute + 4 * (r - 1) * weights / (bandwidth * r)) / r)
                for k, cut in enumerate(cuts):
                    sent = 2 * layers[cut - 1].output_bytes / bandwidth
                    # Into a stage and out of it, except that what leaves the first is free there.
                    times.append(sent / replicas[k + 1])
                    if k > 0:
                        times.append(sent / replicas[k])
                best = min(best, max(times))
    return best


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.builds(
            Layer,
            st.just("layer"),
            st.floats(0, 5),
            st.floats(0, 5),
            st.integers(0, 1000),
            st.integers(0, 1000),
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 4),
    st.sampled_from([100.0, 500.0, 1e9]),
    st.booleans(),
)
def test_chains_against_brute_force(layers, machines, bandwidth, straight):
    graph = LayerGraph(tuple(layers), tuple(pairwise(range(len(layers)))))
    least = brute_force(layers, machines, bandwidth, straight)
    if least == float("inf"):
        with pytest.raises(ValueError, match=f"^machines is {machines}: a straight pipeline"):
            pipedream_plan(graph, machines, bandwidth, straight=straight)
        return
    plan = pipedream_plan(graph, machines, bandwidth, straight=straight)
    assert plan.stage_time == pytest.approx(least, rel=1e-9)
    assert sum(stage.replicas for stage in plan.stages) == machines
    assert [n for stage in plan.stages for n in stage.layers] == list(range(len(layers)))


def test_a_branch_may_be_cut_in_any_order_that_its_edges_allow():
    """Layer 2 is heavy and may go before or after layer 1, which `partition` may not choose."""
    seconds = [1.0, 1.0, 4.0, 4.0]
    layers = tuple(Layer(f"l{n}", s, 0.0, 1) for n, s in enumerate(seconds))
    graph = LayerGraph(layers, ((0, 1), (0, 2), (1, 3), (2, 3)))
    plan = pipedream_plan(graph, 2, straight=True)
    assert [stage.layers for stage in plan.stages] == [(0, 2), (1, 3)]
    assert plan.stage_time == 5.0


def test_a_state_sends_what_one_of_its_ends_does_not_lead_through():
    """Layer 0 is read by 1 and by 2 only, yet it counts where all three lie before a boundary."""
    layers = tuple(Layer(f"l{n}", s, 0.0, b) for n, (s, b) in enumerate([(1, 1000), (1, 1)] * 2))
    graph = LayerGraph(
        (*layers[:2], layers[1], replace(layers[1], forward=3.0)), ((0, 1), (0, 2), (1, 3), (2, 3))
    )
    assert pipedream_plan(graph, 2, 100.0, straight=True).stage_time == 2 * 1000 / 100
    chain = LayerGraph(graph.layers, ((0, 1), (1, 2), (2, 3)))
    assert pipedream_plan(chain, 2, 100.0, straight=True).stage_time == 3.0


@pytest.mark.parametrize(
    ("machines", "bandwidth", "message"),
    [(0, 1e9, "^machines is 0: give at least 1"), (2, 0.0, "^bandwidth is 0.0: give bytes")],
)
def test_what_makes_no_sense_is_refused(machines, bandwidth, message):
    graph = LayerGraph((Layer("a", 1, 2),), ())
    with pytest.raises(ValueError, match=message):
        pipedream_plan(graph, machines, bandwidth)


def test_a_layer_that_the_first_does_not_lead_to_is_named():
    graph = LayerGraph((Layer("a", 1, 2), Layer("b", 1, 2)), ())
    with pytest.raises(ValueError, match="leads to 'b'"):
        pipedream_plan(graph, 1)
