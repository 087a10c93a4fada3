"""Importers: what they read, and that whatever else they are given ends in one clear line."""

from __future__ import annotations

import copy
import gzip
import json
import math
import os
import re
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddg_sim import kineto
from ddg_sim.importers import read_layers
from ddg_sim.kineto import parse_trace, read_trace
from ddg_sim.layers import LayerError, LayerGraph
from ddg_sim.pipedream import parse_graph, read_graph
from ddg_sim.profile import LinkProfile, Profile, StageProfile

# --- PipeDream ------------------------------------------------------------------------------------


def node(name: str, kind: str = "Conv2d(3, 64)", **changes: object) -> str:
    sizes = {
        "forward_compute_time": 1.5,
        "backward_compute_time": 2.25,
        "activation_size": 4096.0,
        "parameter_size": 128.0,
    }
    sizes |= changes  # type: ignore[arg-type]
    return f"{name} -- {kind} -- " + ", ".join(f"{field}={size}" for field, size in sizes.items())


BRANCHES = "\n".join(
    [
        node("node10", "Concat(1)", activation_size="[4096.0; 8.0]") + " -- stage_id=1",
        node("node9", "Linear(in_features=4, out_features=2)") + " -- stage_id=1",
        node("node2") + " -- stage_id=0",
        node("node1", "Input", forward_compute_time=99.0) + " -- stage_id=0",
        "\tnode9 -- node10",
        "\tnode1 -- node2",
        "\tnode2 -- node9",
        "\tnode2 -- node10",
        "",
    ]
)


def test_a_branching_graph() -> None:
    graph = parse_graph(BRANCHES)
    assert [layer.name for layer in graph.layers] == [
        "node2 Conv2d",
        "node9 Linear",
        "node10 Concat",
    ]
    assert set(graph.edges) == {(0, 1), (0, 2), (1, 2)}
    assert {(layer.forward, layer.backward) for layer in graph.layers} == {(0.0015, 0.00225)}
    assert [layer.output_bytes for layer in graph.layers] == [4096, 4096, 4104]
    assert [layer.parameter_bytes for layer in graph.layers] == [128] * 3
    assert graph.crossings == (0, 4096, 8192, 0)


@given(st.data())
def test_every_graph_is_read_whatever_the_order_of_its_lines(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 8))
    ids = data.draw(st.permutations([f"node{3 * number}" for number in range(count)]))
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    edges = data.draw(st.sets(st.sampled_from(pairs), min_size=1)) if pairs else set()
    times = data.draw(st.lists(st.integers(0, 10**6), min_size=count, max_size=count))
    lines = [node(name, "X", forward_compute_time=ms) for name, ms in zip(ids, times, strict=True)]
    lines += [f"\t{ids[a]} -- {ids[b]}" for a, b in edges]
    graph = parse_graph("\n".join(data.draw(st.permutations(lines))))
    names = [layer.name.removesuffix(" X") for layer in graph.layers]
    assert sorted(names) == sorted(ids)
    assert {(names[a], names[b]) for a, b in graph.edges} == {(ids[a], ids[b]) for a, b in edges}
    assert {name: layer.forward for name, layer in zip(names, graph.layers, strict=True)} == {
        name: ms / 1000 for name, ms in zip(ids, times, strict=True)
    }
    assert graph == parse_graph("\n".join(lines + lines[count:]))  # an edge said twice counts once


def test_the_order_follows_the_numbers_where_the_edges_leave_a_choice() -> None:
    names = ["node10", "node9", "node008", "node1", "other2"]
    lines = [node(name, "X") for name in [*names, "zlast"]]
    graph = parse_graph("\n".join([*lines, "\tother2 -- zlast"]))
    found = [layer.name for layer in graph.layers]
    assert found == ["node1 X", "node008 X", "node9 X", "node10 X", "other2 X", "zlast X"]


def test_an_input_that_something_feeds_is_a_layer() -> None:
    graph = parse_graph("\n".join([node("a"), node("b", "InputNorm()"), "\ta -- b"]))
    assert [layer.name for layer in graph.layers] == ["a Conv2d", "b InputNorm"]


RING = [node("a"), node("b"), node("c"), "\ta -- b", "\tb -- c", "\tc -- a"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], ": holds no nodes: write one per line"),
        ([node("a"), node("b")], ": has 2 nodes but no edge"),
        ([node("a", "Input")], ": holds only Input nodes: nothing in it computes"),
        (RING, ":6: edges form a cycle: 'a' -> 'b' -> 'c' -> 'a'"),
        ([node("a"), "\ta -- a"], ":2: edges form a cycle: 'a' -> 'a'"),
        ([node("a"), "\ta -- b"], ":2: the edge names 'b', which is no node"),
        ([node("a"), "\ta -- b -- c"], ":2: an indented line is an edge, 'node1 -- node2', got"),
        ([node("a"), node("a")], ":2: node 'a' is there twice"),
        (["a -- b"], ":1: a node is 'name -- description -- forward_compute_time=..."),
        ([node("a").rpartition(",")[0]], ":1: node 'a' has no parameter_size"),
        ([node("a", colour=1)], ":1: node 'a': give forward_compute_time, backward_compute_time,"),
        (
            ["", node("a", forward_compute_time=-1)],
            ":2: node 'a': forward_compute_time is '-1': give a finite number that is at least 0",
        ),
        ([node("a", activation_size="nan")], ":1: node 'a': activation_size is 'nan': give a"),
        ([node("a", activation_size="[1; inf]")], ":1: node 'a': activation_size is '[1; inf]'"),
        ([node("a", activation_size="[]")], ":1: node 'a': activation_size is '[]': give a finite"),
        ([node("a", parameter_size="many")], ":1: node 'a': parameter_size is 'many': give a"),
        (
            [node("a", parameter_size=1e40)],
            ":1: layer 'a Conv2d': parameter_bytes is 10000000000000000",
        ),
        ([node("a", backward_compute_time=1e20)], ":1: layer 'a Conv2d': backward is 1e+17: give"),
    ],
)
def test_one_line_says_what_is_wrong_with_a_graph(lines: list[str], message: str) -> None:
    with pytest.raises(LayerError) as error:
        parse_graph("\n".join(lines), "some/graph.txt")
    assert str(error.value).startswith("some/graph.txt" + message)
    assert "\n" not in str(error.value)


def test_a_long_cycle_is_cut_short() -> None:
    names = [f"n{number}" for number in range(50)]
    edges = [f"\t{a} -- {b}" for a, b in zip(names, names[1:] + names[:1], strict=True)]
    with pytest.raises(
        LayerError, match=r":100: edges form a cycle: .* -> \(44 more\) -> "
    ) as error:
        parse_graph("\n".join([*map(node, names), *edges]))
    assert str(error.value).count("->") == 7


def anchor(name: str) -> Path:
    """A published measurement, from DDG_ANCHORS or from ../shared/anchors of a parent folder."""
    folders = [parent / "shared" / "anchors" for parent in Path(__file__).resolve().parents]
    if "DDG_ANCHORS" in os.environ:
        folders = [Path(os.environ["DDG_ANCHORS"])]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    pytest.skip(f"needs {name} in ../shared/anchors beside the repository, or in DDG_ANCHORS")


@pytest.mark.parametrize(
    ("network", "layers", "seconds"),
    [  # seconds: single_s that PipeDream's own optimizer printed, pipedream_optimizer.csv
        ("vgg16", 40, 0.672535),
        ("resnet50", 176, 0.443419),
        ("alexnet", 22, 0.085321),
        ("gnmt_large", 93, 0.520453),
    ],
)
def test_published_profiles_add_up_to_what_pipedream_prints(
    network: str, layers: int, seconds: float
) -> None:
    path = anchor(f"pipedream/{network}.graph.txt")
    graph = read_layers(path)
    assert graph == read_graph(path)
    whole = graph.stages([])
    assert whole.forward[0] + whole.backward[0] == pytest.approx(seconds, abs=1e-9)
    assert len(graph.layers) == layers
    text = path.read_text()
    parameters = sum(map(float, re.findall("parameter_size=([0-9.]+)", text)))
    assert whole.parameter_bytes == (parameters,)


def test_a_chain_of_thousands_of_layers_is_read_at_once() -> None:
    names = [f"node{number}" for number in range(5000)]
    edges = [f"\t{a} -- {b}" for a, b in zip(names, names[1:], strict=False)]
    graph = parse_graph("\n".join([*map(node, reversed(names)), *edges]))
    assert graph.edges == tuple((index, index + 1) for index in range(4999))


# --- torch.profiler -------------------------------------------------------------------------------


def span(name: str, ts: float, dur: float, cat: str = "user_annotation", **more: Any) -> Any:
    return {"ph": "X", "cat": cat, "name": name, "pid": 7, "tid": 7, "ts": ts, "dur": dur} | more


def steps(durations: list[float]) -> list[Any]:
    """Per step two layers: forward takes d and 2d, backward 3d (second layer first) and 4d."""
    events, now = [], 1e6
    for d in durations:
        for name, factor in (
            ("forward:a output_bytes=8", 1),
            ("forward:b output_bytes=4 parameter_bytes=2", 2),
            ("backward:b", 3),
            ("backward:a parameter_bytes=16", 4),
        ):
            events.append(span(name, now, factor * d))
            now += factor * d + 5
    return events


def trace(events: list[Any]) -> Any:
    noise = [
        {"ph": "M", "name": "process_name", "pid": "Spans", "args": {"name": "python"}},
        span("ProfilerStep#3", 0, 1e9),
        span("aten::linear", "?", None, "cpu_op"),  # type: ignore[arg-type]
    ]
    return {"schemaVersion": 1, "traceEvents": noise + events}


def test_layers_of_a_trace_take_the_median_over_the_steps() -> None:
    graph = parse_trace(trace(steps([500.0, 10.0, 11.0])[::-1]))  # events come in any order
    assert [layer.name for layer in graph.layers] == ["a", "b"]
    assert [layer.forward for layer in graph.layers] == pytest.approx([11e-6, 22e-6])
    assert [layer.backward for layer in graph.layers] == pytest.approx([44e-6, 33e-6])
    assert [layer.output_bytes for layer in graph.layers] == [8, 4]
    assert [layer.parameter_bytes for layer in graph.layers] == [16, 2]
    assert graph.edges == ((0, 1),)


def on_gpu(events: list[Any]) -> list[Any]:
    """Every range launches two kernels, a backward one from another thread; they run later."""
    found = list(events)
    for index, each in enumerate(events):
        thread = 8 if each["name"].startswith("backward") else 7
        for half in (0, 1):
            number = {"correlation": 2 * index + half}
            launch = span("cudaLaunchKernel", each["ts"] + half, 1.0, "cuda_runtime", args=number)
            found.append(launch | {"tid": thread})
            # The second kernel starts 90 after the first: with 10 more, the range takes 100.
            found.append(span("gemm", 5e6 + 200 * index + 90 * half, 10.0, "kernel", args=number))
    return found


def test_on_a_gpu_a_range_takes_as_long_as_the_kernels_it_launched() -> None:
    # Kineto's own projection covers only what the range's thread launched; it must not be used.
    wrong = [span(e["name"], 4 + e["ts"], 1.0, "gpu_user_annotation") for e in steps([20.0, 30.0])]
    graph = parse_trace(trace(on_gpu(steps([20.0, 30.0])) + wrong))
    assert {(layer.forward, layer.backward) for layer in graph.layers} == {(1e-4, 1e-4)}


def test_without_kernels_the_projected_ranges_count() -> None:
    projected = [{**e, "cat": "gpu_user_annotation", "dur": 7.0} for e in steps([20.0])]
    graph = parse_trace(trace(steps([20.0]) + projected))
    assert {(layer.forward, layer.backward) for layer in graph.layers} == {(7e-6, 7e-6)}


def test_a_layer_that_launches_nothing_takes_no_time_on_a_gpu() -> None:
    events = on_gpu(steps([20.0]))
    view = [span("forward:view output_bytes=8", 9e6, 5), span("backward:view", 9.1e6, 5)]
    layer = parse_trace(trace(events + view)).layers[-1]
    assert (layer.name, layer.forward, layer.backward) == ("view", 0.0, 0.0)


STEPS = steps([10.0, 10.0])
OTHER = [span(f"step {number}", number, 1) for number in range(7)]
BARE = [span(name, 8e6 + 2 * k, 1) for k, name in enumerate(["forward:c", "backward:c"] * 2)]
KERNEL = span("gemm", 0, 1, "kernel", args={"correlation": 5})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "is no trace: a JSON object with a list of traceEvents is"),
        ({"traceEvents": {}}, "is no trace: a JSON object with a list of traceEvents is"),
        ({"traceEvents": [3]}, "traceEvents[0] is no object"),
        (
            {"traceEvents": []},
            'has no ranges around layers: record record_function("forward:NAME") and'
            ' record_function("backward:NAME") (ranges found: none)',
        ),
        (
            {"traceEvents": OTHER},
            'has no ranges around layers: record record_function("forward:NAME") and'
            " record_function(\"backward:NAME\") (ranges found: 'step 0', 'step 1', 'step 2',"
            " 'step 3', 'step 4', ...)",
        ),
        (trace(STEPS[:2]), "'forward:a' has no 'backward:a': put both ranges around every layer,"),
        (trace(STEPS[3:4]), "'backward:a' has no 'forward:a': put both ranges around every layer"),
        (
            trace([*STEPS, span("forward:a", 9e9, 1)]),
            "'forward:a' is there 3 times, 'forward:b' 2: give every layer a name of its own",
        ),
        (
            trace([*STEPS, span("forward:model", 1e6 - 1, 16)]),
            "range 'forward:a output_bytes=8' starts within 'forward:model': time either the",
        ),
        (trace([span("forward:", 0, 1)]), "range 'forward:' names no layer: record record_func"),
        (
            trace([span("forward:my layer", 0, 1)]),
            "range 'forward:my layer': after the layer's name, which has no spaces, may only come",
        ),
        (
            trace([span("forward:a output_bytes=-1", 0, 1)]),
            "range 'forward:a output_bytes=-1': aft",
        ),
        (
            trace([*STEPS[:4], STEPS[4] | {"name": "forward:a output_bytes=9"}, *STEPS[5:]]),
            "layer 'a' has output_bytes=8 and output_bytes=9: record mini-batches of one size",
        ),
        (
            trace([*STEPS, *BARE]),
            "layer 'c' has no output_bytes=N, but others have",
        ),
        (
            trace([*STEPS, KERNEL]),
            "has kernels, but none that a range around a layer launched: record",
        ),
        (trace([span("forward:a", 0, -1)]), "traceEvents[3].dur: input should be greater than or"),
        (trace([span("forward:a", "1", 1)]), "traceEvents[3].ts: input should be a valid number"),  # type: ignore[arg-type]
        (trace([span("forward:a", 0, math.nan)]), "traceEvents[3].dur: input should be a finite"),
        (trace([span("forward:a", 0, 10**400)]), "traceEvents[3].dur: input should be a"),
        (trace([span(5, 0, 1)]), "traceEvents[3].name: input should be a valid string (got 5)"),  # type: ignore[arg-type]
        (trace([span("forward:a", 0, 1, args=[1])]), "traceEvents[3].args: input should be"),
        (trace([KERNEL | {"args": {"correlation": "x"}}]), "traceEvents[3].args.correlation: inp"),
        (trace(steps([1e25])), "layer 'a': forward is 1e+19: give seconds from 0 to 1e+12"),
    ],
)
def test_one_line_says_what_is_wrong_with_a_trace(data: Any, message: str) -> None:
    with pytest.raises(LayerError) as error:
        parse_trace(data, "t.json")
    assert str(error.value).startswith("t.json: " + message)
    assert "\n" not in str(error.value)


class Slow(torch.autograd.Function):
    """The identity, which takes 10 ms forward and 20 ms backward."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return gradients[0]


def recipe() -> Callable[..., None]:
    """The function that the documentation gives to users."""
    source = (kineto.__doc__ or "").partition("def trace_layers")
    body = source[2].partition("\n\nSeconds are")[0]
    scope: dict[str, Any] = {"torch": torch}
    exec(textwrap.dedent(f"    def trace_layers{body}"), scope)
    made: Callable[..., None] = scope["trace_layers"]
    return made


@pytest.mark.parametrize("suffix", ["json", "json.gz"])
def test_a_real_trace_made_as_documented(tmp_path: Path, suffix: str) -> None:
    labels = torch.tensor([0, 1, 1, 0])
    layers = {
        "flatten": torch.nn.Flatten(),
        "fc1": torch.nn.Linear(6, 5),
        "slow": Slow.apply,
        "fc2": torch.nn.Linear(5, 2, bias=False),
        "loss": lambda value: torch.nn.functional.cross_entropy(value, labels),
    }
    path = tmp_path / f"trace.{suffix}"
    recipe()(layers, torch.ones(4, 2, 3), str(path), steps=4)
    graph = read_trace(path)
    assert graph == read_layers(path)
    assert [layer.name for layer in graph.layers] == list(layers)
    assert [layer.output_bytes for layer in graph.layers] == [96, 80, 80, 32, 4]
    assert [layer.parameter_bytes for layer in graph.layers] == [0, 140, 0, 40, 0]
    slow = graph.layers[2]
    assert slow.forward >= 0.01
    assert slow.backward >= 0.02
    opened = gzip.open if suffix == "json.gz" else open
    with opened(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    for layer in graph.layers:
        for direction, found in (("forward", layer.forward), ("backward", layer.backward)):
            label = f"{direction}:{layer.name}"
            raw = [e["dur"] for e in events if e.get("name", "").split(" ")[0] == label]
            assert len(raw) == 4
            assert found == pytest.approx(median(raw) / 1e6)  # the file has microseconds


# --- any file -------------------------------------------------------------------------------------


def profile() -> Profile:
    stages = [
        StageProfile(
            layers=["Linear", "ReLU"],
            forward=0.1,
            backward=0.2 + k,
            update=0.01,
            recompute=0.1,
            overhead=0.001,
            output_bytes=40,
            parameter_bytes=400,
        )
        for k in range(2)
    ]
    link = LinkProfile(activation=0.5, gradient=0.6, bytes=40)
    return Profile(
        version=1, model="mlp", data="digits", batch_size=8, device="cpu", threads=1,
        torch="2.11", cuts=[2], stages=stages, links=[link],
    )  # fmt: skip


def test_a_profile_has_one_layer_per_stage(tmp_path: Path) -> None:
    profile().write(tmp_path / "profile.json")
    graph = read_layers(tmp_path / "profile.json")
    assert [layer.name for layer in graph.layers] == ["stage 0", "stage 1"]
    assert [layer.forward for layer in graph.layers] == pytest.approx([0.101, 0.101])
    assert [layer.backward for layer in graph.layers] == pytest.approx([0.201, 1.201])
    assert graph.crossings == (0, 40, 0)
    assert [layer.parameter_bytes for layer in graph.layers] == [400, 400]


def test_the_content_tells_the_format(tmp_path: Path) -> None:
    path = tmp_path / "no-extension"
    for content in (BRANCHES, json.dumps(trace(STEPS)), profile().model_dump_json()):
        path.write_text(content)
        plain = read_layers(path)
        path.write_bytes(gzip.compress(content.encode()))
        assert read_layers(path) == plain
    path.write_bytes(b"\xef\xbb\xbf" + BRANCHES.replace("\n", "\r\n").encode())  # from Windows
    assert read_layers(path) == parse_graph(BRANCHES)


KNOWN = "give a profile of `ddg profile`, a trace of torch.profiler or a graph.txt of PipeDream"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", f": is empty: {KNOWN}"),
        (b" \n", f": is empty: {KNOWN}"),
        (b"hello", f": is no known format: {KNOWN}"),
        (b"a -- b", ":1: a node is 'name -- description -- forward_compute_time=..., ...', got"),
        (b"[1, 2]", f": is JSON of no known format (it has no keys): {KNOWN}"),
        (b'{"a": 1, "b": 2}', f": is JSON of no known format (it has 'a', 'b'): {KNOWN}"),
        (b'{"traceEvents": [{"ph": "X"', ": not valid JSON: EOF while parsing"),
        (b"[" * 100_000, ": not valid JSON: recursion limit exceeded"),
        (b'{"stages": [' + b"9" * 5000, ": not valid JSON: "),
        (b'{"stages": []}', ": version: field required"),
        (b"node1\x00", ": cannot be read: not a text file"),
        (b"\xff\xfe", ": cannot be read: not a text file"),
        (gzip.compress(b"x" * 99, mtime=0)[:-9], ": cannot be read: the gzip file is cut off"),
        (gzip.compress(b"", mtime=0)[:10] + b"\xff" * 9, ": cannot be read: Error -3 while"),
        (
            profile().model_dump_json().replace("0.2", "1e30").encode(),
            ": layer 'stage 0': backward is 1e+30: give seconds from 0 to 1e+12",
        ),
    ],
)
def test_one_line_says_what_is_wrong_with_a_file(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(LayerError) as error:
        read_layers(path)
    assert str(error.value).startswith(f"{path}{message}")
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    for read in (read_layers, read_graph, read_trace):
        with pytest.raises(LayerError, match="nowhere: cannot be read: No such file or directory"):
            read(tmp_path / "nowhere")
        with pytest.raises(LayerError, match="cannot be read: Is a directory"):
            read(tmp_path)
        with pytest.raises(LayerError, match="cannot be read: embedded null byte"):
            read("a\0b")


# --- fuzzing: a whole graph or one line, never a traceback, never nothing -------------------------

GOOD = [BRANCHES, json.dumps(trace(on_gpu(STEPS))), profile().model_dump_json()]
SNIPPETS = [
    *(" -- ", "\n", "\t", "=", "nan", "-", "1e999", "9" * 30, "[", "]", ";", "{", "}", '"'),
    *("node2", "Input", "forward:a", "null", "true", "\0", "\u2028", "é", "stage_id=", "\ud800"),
]


def outcome(read: Callable[[Path], LayerGraph]) -> LayerGraph | str:
    try:
        return read(FUZZED)
    except LayerError as error:
        return str(error)


def reads_or_says_why(content: bytes) -> None:
    FUZZED.write_bytes(content)
    for read in (read_layers, read_graph, read_trace):
        found = outcome(read)
        if isinstance(found, LayerGraph):
            assert found.layers
            assert all(math.isfinite(layer.forward + layer.backward) for layer in found.layers)
        else:
            assert found.startswith(str(FUZZED))
            assert "\n" not in found
            assert len(found) < 1000


@pytest.fixture(autouse=True, scope="module")
def _fuzzed(tmp_path_factory: pytest.TempPathFactory) -> None:
    global FUZZED
    FUZZED = tmp_path_factory.mktemp("fuzz") / "fuzzed"


FUZZED = Path()
EXAMPLES = settings(max_examples=300, deadline=None)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["X", "user_annotation", "kernel", "forward:a", "backward:a"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["traceEvents", "stages", "ph", "cat", "name", "ts", "dur", "args", "x"]),
        inner,
        max_size=4,
    ),
)  # fmt: skip


@EXAMPLES
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode()))
def test_fuzz_any_content(content: bytes) -> None:
    reads_or_says_why(content)
    reads_or_says_why(gzip.compress(content))


@EXAMPLES
@given(st.sampled_from(GOOD), st.data())
def test_fuzz_mutated_files(good: str, data: st.DataObject) -> None:
    text = good
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 20)))
        piece = data.draw(st.sampled_from(SNIPPETS) | st.text(max_size=3) | st.just(text[:40]))
        text = text[:start] + piece + text[end:]
    reads_or_says_why(text.encode(errors="surrogatepass"))


@EXAMPLES
@given(st.lists(st.sampled_from(BRANCHES.split("\n")), max_size=12))
def test_fuzz_shuffled_and_repeated_lines(lines: list[str]) -> None:
    reads_or_says_why("\n".join(lines).encode())


@EXAMPLES
@given(JSON)
def test_fuzz_any_json(value: Any) -> None:
    reads_or_says_why(json.dumps(value).encode())
    reads_or_says_why(json.dumps({"traceEvents": [value, value]}).encode())


@EXAMPLES
@given(st.sampled_from(GOOD[1:]), JSON, st.data())
def test_fuzz_one_value_of_a_good_file_replaced(good: str, value: Any, data: st.DataObject) -> None:
    whole = json.loads(good)
    inner, depth = whole, data.draw(st.integers(1, 4))
    for _ in range(depth):
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(inner[key], dict | list) or not inner[key]:
            break
        outer, inner = inner, inner[key]
    else:
        inner = outer
    inner[key] = copy.deepcopy(value)
    reads_or_says_why(json.dumps(whole).encode())
