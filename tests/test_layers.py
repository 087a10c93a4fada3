"""Networks as measured: what is refused, and what a partition into stages adds up to."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddg_sim.layers import MAX_BYTES, Layer, LayerError, LayerGraph

SECONDS = st.floats(0, 1e3)
BYTES = st.integers(0, 10**12)
LAYERS = st.builds(Layer, st.text(max_size=3), SECONDS, SECONDS, BYTES, BYTES)


@st.composite
def graphs(draw: st.DrawFn) -> LayerGraph:
    layers = draw(st.lists(LAYERS, min_size=1, max_size=12))
    last = len(layers) - 1
    pairs = [(a, b) for a in range(last) for b in range(a + 1, last + 1)]
    edges = draw(st.lists(st.sampled_from(pairs), max_size=20)) if pairs else []
    return LayerGraph(tuple(layers), tuple(edges))


@given(graphs(), st.data())
def test_stages_hold_every_layer_once_and_cuts_what_later_stages_read(
    graph: LayerGraph, data: st.DataObject
) -> None:
    count = len(graph.layers)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, count - 1)), max_size=count - 1)))
    stage_of = [sum(cut <= index for cut in cuts) for index in range(count)]
    stages = graph.stages(cuts)
    for k in range(len(cuts) + 1):
        own = [layer for layer, stage in zip(graph.layers, stage_of, strict=True) if stage == k]
        assert own
        assert math.isclose(stages.forward[k], sum(layer.forward for layer in own))
        assert math.isclose(stages.backward[k], sum(layer.backward for layer in own))
        assert stages.parameter_bytes[k] == sum(layer.parameter_bytes for layer in own)
        assert stages.activation_bytes[k] == sum(layer.output_bytes for layer in own)
    # Link k carries every output of stages <= k that some stage > k reads, once.
    for k, sent in enumerate(stages.cut_bytes):
        read = {a for a, b in graph.edges if stage_of[a] <= k < stage_of[b]}
        assert sent == sum(graph.layers[a].output_bytes for a in read)
    assert graph.crossings == tuple(graph.crossing(cut) for cut in range(count + 1))
    assert graph.crossing(0) == graph.crossing(count) == 0


def test_thousands_of_layers_fold_at_once() -> None:
    count = 20_000
    layers = tuple(Layer("x", 0.1, 0.2, 1, 1) for _ in range(count))
    graph = LayerGraph(layers, tuple((i, i + 1) for i in range(count - 1)))
    stages = graph.stages(range(1, count))
    assert set(stages.cut_bytes) == {1}
    assert len(stages.forward) == count


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"forward": math.nan},
            "layer 'fc': forward is nan: give seconds from 0 to 1e+12",
        ),
        ({"backward": math.inf}, "layer 'fc': backward is inf: give seconds from 0 to 1e+12"),
        ({"forward": 1e13}, "layer 'fc': forward is 10000000000000.0: give seconds from 0"),
        ({"output_bytes": -1}, "layer 'fc': output_bytes is -1: give bytes from 0"),
        ({"parameter_bytes": MAX_BYTES + 1}, "layer 'fc': parameter_bytes is 1152921504606846977"),
    ],
)
def test_a_size_out_of_range_is_refused_and_its_layer_named(
    sizes: dict[str, Any], message: str
) -> None:
    with pytest.raises(LayerError) as error:
        Layer("fc", **({"forward": 1.0, "backward": 2.0} | sizes))
    assert str(error.value).startswith(message)


TWO = (Layer("a", 1, 2), Layer("b", 1, 2))


@pytest.mark.parametrize(
    ("layers", "edges", "message"),
    [
        ((), (), "layers is empty: a network has at least one layer"),
        (TWO, ((0, 2),), "edges[0] is (0, 2), but layers go from 0 to 1"),
        (TWO, ((0, 1), (-1, 1)), "edges[1] is (-1, 1), but layers go from 0 to 1"),
        (TWO, ((1, 1),), "edges[0] is (1, 1), from 'b' back to 'b': order the layers so that"),
    ],
)
def test_edges_that_lead_nowhere_or_back_are_refused(
    layers: tuple[Layer, ...], edges: tuple[tuple[int, int], ...], message: str
) -> None:
    with pytest.raises(LayerError) as error:
        LayerGraph(layers, edges)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("cuts", [[0], [2], [1, 1], [-1]])
def test_cuts_that_leave_a_stage_empty_are_refused(cuts: list[int]) -> None:
    with pytest.raises(LayerError) as error:
        LayerGraph(TWO, ()).stages(cuts)
    assert str(error.value) == (
        f"cuts is {cuts}: give indices that increase strictly between 0 and 2, the number of layers"
    )
    with pytest.raises(LayerError, match="cut is 3: give one from 0 to 2"):
        LayerGraph(TWO, ()).crossing(3)
