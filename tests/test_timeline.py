"""Timelines: period of exact and of noisy runs, utilisation, traces, pictures."""

import dataclasses
import json
import random
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import PATIENT, costed

from ddg_sim.costs import costs
from ddg_sim.cycletime import evaluate
from ddg_sim.decoupled import pd_asgd
from ddg_sim.dependencies import Relation
from ddg_sim.lowering import Message, StageMemory, memory
from ddg_sim.methods import METHODS, bp, ddg, method
from ddg_sim.plot import gantt, window
from ddg_sim.schedule import OpKind, Sync
from ddg_sim.simulate import simulate
from ddg_sim.steady import Regime, find_regime
from ddg_sim.timeline import Timeline, message_span, worker_lane
from ddg_sim.trace import chrome_trace, write_trace


def test_a_run_that_repeats_itself_every_other_iteration():
    run = simulate(ddg(2), costs(2, comm=2.0), 30)
    assert run.regime is not None
    assert run.period == pytest.approx(5.0, rel=1e-12)
    assert run.regime.iterations == 2
    assert simulate(bp(2), costs(2), 30).regime == Regime(iterations=1, seconds=6.0)


def test_a_growing_backlog_on_a_link_is_not_yet_steady():
    """Operations look periodic while gradients pile up on a slow link that nobody waits for yet."""
    prices = costs(2, forward=(5.0, 0.1), backward=(5.0, 0.1), gradient_transfer=10.5)
    steady = [evaluate(PATIENT, prices, iterations).regime for iterations in range(10, 151, 10)]
    assert steady[:4] == [None] * 4  # a period of 10 s would be wrong
    assert steady[-1] is not None
    assert {round(regime.period, 9) for regime in steady if regime is not None} == {10.5}


def test_regime_needs_more_iterations_than_its_window():
    assert find_regime(np.array([[0.0], [1.0]]), window=2) is None
    assert find_regime(np.zeros((0, 0)), window=2) is None


def noisy(run, seed, pauses=()):
    """The run as a clock would have seen it: later by a random delay, with pauses of the machine.

    The clock does not start at 0, and does not know that the run is deterministic.
    """
    draw = random.Random(seed)

    def seen(time):
        return 1000.0 + time + sum(length for when, length in pauses if time >= when)

    spans = []
    for span in run.spans:
        start, end = seen(span.start), seen(span.end)
        late = draw.expovariate(1 / (0.02 * max(1e-3, span.duration)))
        spans.append(dataclasses.replace(span, start=start, end=end + late))
    return Timeline.of(run.schedule, run.iterations, spans)


@pytest.mark.parametrize("sync", list(Sync))
@pytest.mark.parametrize("seed", range(3))
def test_period_of_a_noisy_run(sync, seed):
    run = evaluate(ddg(4, sync), costs(4, comm=0.3, update=0.2), 60)
    measured = noisy(run, seed)
    assert measured.regime is None
    assert measured.period == pytest.approx(run.period, rel=0.01)


def test_rare_pauses_do_not_move_the_period_but_the_makespan():
    run = evaluate(ddg(4), costs(4, comm=0.3), 60)
    paused = noisy(run, 1, pauses=[(50.0, 20.0), (120.0, 30.0)])
    assert paused.period == pytest.approx(run.period, rel=0.02)
    assert paused.makespan > run.makespan + 49


def test_a_quantised_clock_does_not_count_as_deterministic():
    run = evaluate(ddg(3), costs(3), 20)
    measured = dataclasses.replace(run, deterministic=False)
    assert measured.regime is None
    assert measured.period == pytest.approx(run.period)


def test_long_measured_runs_are_thinned():
    op_span, op = evaluate(bp(1), costs(1), 1).operations[0]
    spans = tuple(
        dataclasses.replace(
            op_span,
            start=2.0 * t,
            end=2.0 * t + 1,
            op=dataclasses.replace(op, iteration=t, sample=t, version=t),
        )
        for t in range(20_000)
    )
    assert Timeline.of(bp(1), 20_000, spans).period == pytest.approx(2.0)


def test_runs_too_short_for_a_slope():
    assert evaluate(bp(2), costs(2), 1).period == 6.0
    assert Timeline.of(bp(2), 0, ()).period == 0.0
    assert Timeline.of(bp(2), 0, ()).utilisation == (0.0, 0.0)


def test_utilisation_and_bubble():
    run = simulate(bp(4), costs(4, forward=1.0, backward=(2, 2, 3, 2)), 20)
    assert run.utilisation == pytest.approx((3 / 13, 3 / 13, 4 / 13, 3 / 13))
    assert run.bubble == pytest.approx(1 - 13 / 13 / 4)
    full = simulate(ddg(4), costs(4, update=0.5, overhead=0.1), 20)
    assert full.utilisation == pytest.approx((1.0,) * 4)
    assert full.bubble == pytest.approx(0.0)


@settings(max_examples=50, deadline=None)
@given(costed(), st.integers(1, 8))
def test_memory_of_a_run_is_that_of_its_program(pair, iterations):
    schedule, prices = pair
    run = evaluate(schedule, prices, iterations)
    for found, bound in zip(run.memory, memory(schedule), strict=True):
        assert found.activations <= bound.activations
        assert found.weight_versions <= bound.weight_versions


def test_memory_of_ddg():
    assert simulate(ddg(3), costs(3), 10).memory == tuple(StageMemory(k, k) for k in (3, 2, 1))


def test_lanes_are_named_as_in_prose():
    assert worker_lane(ddg(2), 1) == "stage 2"
    shared = dataclasses.replace(bp(2), workers=(sum(bp(2).workers, ()),))
    assert worker_lane(shared, 0) == "worker 1 (stages 1, 2)"


# --- Traces -------------------------------------------------------------------------------------


def assert_well_formed(events):
    tracks, flows = defaultdict(list), defaultdict(list)
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    for event in events:
        assert event["ph"] in "XMsfC"
        if event["ph"] == "X":
            assert {"name", "cat", "pid", "tid", "ts", "dur"} <= event.keys()
            assert (event["pid"], event["tid"]) in named
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            ts, dur = round(event["ts"] * 1000), round(event["dur"] * 1000)  # nanoseconds
            tracks[event["pid"], event["tid"]].append((ts, ts + dur))
        elif event["ph"] in "sf":
            flows[event["id"]].append(event)
        elif event["ph"] == "C":
            assert all(value >= 0 for value in event["args"].values())
    for spans in tracks.values():
        spans.sort()
        for (_, end), (start, _) in zip(spans, spans[1:], strict=False):
            assert start >= end, "events of one track overlap"
    for start, finish in flows.values():
        assert (start["ph"], finish["ph"], finish["bp"]) == ("s", "f", "e")
        assert start["tid"] != finish["tid"]
        for event in (start, finish):  # an arrow needs a slice to hold on to
            at = round(event["ts"] * 1000)
            spans = tracks[event["pid"], event["tid"]]
            assert any(begin <= at <= end for begin, end in spans)
    return flows


@settings(max_examples=50, deadline=None)
@given(costed(), st.integers(1, 5))
def test_traces_are_well_formed(pair, iterations):
    schedule, prices = pair
    run = evaluate(schedule, prices, iterations)
    flows = assert_well_formed(chrome_trace(run)["traceEvents"])
    homes = [schedule.worker_of(stage) for stage in range(schedule.num_stages)]
    crossings = sum(one != other for one, other in zip(homes, homes[1:], strict=False))
    assert len(flows) == 2 * crossings * iterations * schedule.samples_per_iteration


def test_counters_show_the_live_activations():
    events = chrome_trace(simulate(ddg(3), costs(3), 8))["traceEvents"]
    peaks = defaultdict(int)
    for event in events:
        if event["ph"] == "C":
            peaks[event["name"]] = max(peaks[event["name"]], event["args"]["samples"])
    assert peaks == {f"stage {k} live activations": 4 - k for k in (1, 2, 3)}


def test_measured_transfers_that_overlap_get_tracks_of_their_own():
    lane = "link 1→2"
    sent = [Message(Relation.ACTIVATION, 0, 1, sample) for sample in range(3)]
    spans = [message_span(message, 1.0 * n, 1.0 * n + 2) for n, message in enumerate(sent)]
    events = chrome_trace(Timeline.of(ddg(2), 3, spans))["traceEvents"]
    assert_well_formed(events)
    named = [e["args"]["name"] for e in events if e["name"] == "thread_name"]
    assert named == [lane, f"{lane} (2)"]


def test_predicted_above_measured_in_one_file(tmp_path):
    path = tmp_path / "trace.json"
    run = simulate(ddg(3), costs(3, comm=0.5), 6)
    write_trace(path, {"predicted": run, "measured": noisy(run, 0)})
    events = json.loads(path.read_text())["traceEvents"]
    assert_well_formed(events)
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {1: "predicted", 2: "measured"}
    sort = {e["pid"]: e["args"]["sort_index"] for e in events if e["name"] == "process_sort_index"}
    assert sort == {1: 1, 2: 2}
    firsts = [min(e["ts"] for e in events if e["ph"] == "X" and e["pid"] == p) for p in (1, 2)]
    assert firsts == [0.0, 0.0]
    assert [file.name for file in tmp_path.iterdir()] == ["trace.json"]
    with pytest.raises(ValueError, match="timelines is empty"):
        write_trace(path, {})


@pytest.mark.parametrize("name", METHODS)
def test_traces_of_every_method_are_well_formed(name):
    run = evaluate(method(name, 4), costs(4, comm=0.25), 6)
    flows = assert_well_formed(chrome_trace(run)["traceEvents"])
    for start, finish in flows.values():
        assert start["ts"] <= finish["ts"], "an arrow back in time"


def test_arrows_lead_from_one_worker_of_a_stage_to_the_other():
    """PD-ASGD: a forward pass hands its activations on, an update the weights of the next one."""
    run = evaluate(pd_asgd(3), costs(3, update=0.5), 6)
    trace = chrome_trace(run)["traceEvents"]
    flows = assert_well_formed(trace)
    # What the last two of the six updates produce, no forward pass reads.
    named = Counter(start["name"] for start, _ in flows.values())
    assert named == {"local": 3 * 6, "weights": 3 * 4}
    starts = {(e["args"]["op"], e["tid"]): e["ts"] for e in trace if e["ph"] == "X"}
    arrivals = {(f["tid"], f["ts"]) for _, f in flows.values()}
    for (op, tid), ts in starts.items():
        if op.startswith("B"):
            assert (tid, ts) in arrivals, op


def test_a_measured_run_must_be_a_run_of_the_schedule():
    run = evaluate(ddg(2), costs(2), 3)
    span, op = run.operations[0]
    for change, words in (
        ({"version": 7}, "span 0: F0.0.v7@0, but the schedule runs F0.0.v0@0"),
        ({"iteration": 9}, "no such operation"),
        ({"stage": 5}, "no such operation"),
    ):
        wrong = dataclasses.replace(span, op=dataclasses.replace(op, **change))
        with pytest.raises(ValueError, match=words):
            Timeline.of(ddg(2), 3, [wrong])


# --- Pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "svg", "PNG"])
def test_pictures_are_written_whole(tmp_path, suffix):
    run = simulate(ddg(3), costs(3, comm=0.5, update=0.1), 6)
    path = tmp_path / f"gantt.{suffix}"
    gantt({"predicted": run, "measured": noisy(run, 0)}, path, iterations=(2, 4), title="DDG")
    start = path.read_bytes()[:200]
    assert b"PNG" in start if suffix.lower() == "png" else b"<?xml" in start
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_an_svg_says_what_it_shows(tmp_path):
    path = tmp_path / "gantt.svg"
    gantt(
        {"predicted": simulate(ddg(2), costs(2, forward=1e-3, backward=2e-3, comm=1e-3), 3)}, path
    )
    text = path.read_text()
    for words in (
        "stage 1",
        "stage 2",
        "link 1→2",
        "time (ms)",
        "forward",
        "transfer",
        "predicted",
    ):
        assert f"<!-- {words} -->" in text


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("iterations", [1, 3, 40])
def test_the_window_of_a_picture_is_a_part_of_the_run(name, iterations):
    first, last = window(evaluate(method(name, 4), costs(4), iterations))
    assert 0 <= first <= last < iterations


def test_a_picture_of_many_micro_batches_shows_few_periods():
    few, many = (evaluate(method("gpipe", 8, micro_batches=m), costs(8), 9) for m in (2, 32))
    assert window(few)[1] > 0
    assert window(many) == (0, 0)


def drawn_texts(path):
    return re.findall("<!-- (.*?) -->", path.read_text())


def test_a_picture_of_64_stages_names_all_of_them_and_leaves_links_out(tmp_path):
    run = evaluate(ddg(64), costs(64, comm=0.5), 140)
    first, last = window(run)
    assert first >= 2 * 63 - 6  # past the forward passes that the first stages run ahead
    gantt({"run": run}, tmp_path / "gantt.svg", (first, first))
    texts = drawn_texts(tmp_path / "gantt.svg")
    assert {f"stage {k}" for k in range(1, 65)} <= set(texts)
    assert not any(text.startswith("link") for text in texts)


def test_a_sample_is_written_only_where_it_fits(tmp_path):
    run = evaluate(bp(2), costs(2, forward=(1.0, 1e-3)), 2)
    gantt({"run": run}, tmp_path / "gantt.svg")
    texts = Counter(drawn_texts(tmp_path / "gantt.svg"))
    assert texts["1"] == 3  # not into the box of a millisecond


def test_pictures_refuse_what_they_cannot_draw(tmp_path):
    run = simulate(ddg(2), costs(2), 3)
    with pytest.raises(
        ValueError, match=r"path ends in '.txt': give one that ends in .png or .svg"
    ):
        gantt({"run": run}, tmp_path / "gantt.txt")
    with pytest.raises(ValueError, match=r"iterations=\(90, 95\) holds no operation"):
        gantt({"run": run}, tmp_path / "gantt.png", iterations=(90, 95))
    assert list(tmp_path.iterdir()) == []


def test_operations_keep_program_order_although_some_take_no_time():
    run = simulate(ddg(2), costs(2, forward=0.0, backward=0.0), 4)
    order = [str(op) for _, op in run.operations if op.stage == 1]
    assert order == [str(op) for op in ddg(2).program(1, 4)]
    assert {op.kind for _, op in run.operations} == {
        OpKind.FORWARD,
        OpKind.BACKWARD,
        OpKind.UPDATE,
    }
