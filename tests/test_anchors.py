"""Published measurements against predictions: the arithmetic without the data, the data if there.

The data are no part of the repository; DDG_ANCHORS names another folder than ../shared/anchors.
"""

from __future__ import annotations

import json
import os
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddg_cli.main import main
from ddg_sim.anchors import ANCHORS, compare
from ddg_sim.comparison import Anchor, Comparison, Role, mean_error, read_rows
from ddg_sim.convnets import Work, cifar_resnet, cut_bytes, resnet101, stage_shares, wide_resnet
from ddg_sim.costs import Costs
from ddg_sim.cycletime import cycle_time
from ddg_sim.ddg_anchors import Runs, resnet110_times, wide_resnet_times
from ddg_sim.gpt import FASTEST, GptMachine, GptRun, calibrate, closed_period
from ddg_sim.layers import Layer, LayerGraph
from ddg_sim.pipedream_optimizer import PipeDreamPlan, PlanStage
from ddg_sim.pipeline_anchors import gpipe_period, plan_costs, torchgpipe
from ddg_sim.schedule import Sync
from ddg_sim.synchronous import gpipe

DATA = Path(os.environ.get("DDG_ANCHORS", Path(__file__).parents[1].parent / "shared" / "anchors"))


def data(name: str) -> Path:
    if not (DATA / name).is_file():
        pytest.skip(f"{DATA / name} is absent: DDG_ANCHORS names the folder that has it")
    return DATA / name


# --- networks, counted by hand --------------------------------------------------------------------


def test_resnet101_has_the_published_number_of_operations():
    """7.8 G multiply-adds with torchvision's stride in the 3x3 convolution (fvcore, ptflops)."""
    macs = sum(layer.flops for layer in resnet101()) / 2
    assert macs == pytest.approx(7.801e9, rel=1e-3)


def test_wide_resnet_by_hand():
    """One 3x3 convolution 160 -> 160 on 32x32 is the unit; others follow from their shapes."""
    unit = 2 * 9 * 160 * 160 * 32 * 32
    blocks = [layer.flops / unit for layer in wide_resnet()[1:-1]]
    first = 0.1 + 1 + 16 * 160 / (9 * 160 * 160)  # 16 -> 160, 160 -> 160, 1x1 shortcut
    wider = 2 + 1 + 160 * 320 / 4 / (9 * 160 * 160)  # stride only in the second convolution
    assert blocks == pytest.approx([first, 2, 2, 2, wider, 2, 2, 2, wider, 2, 2, 2])


def test_cifar_resnet_by_hand():
    layers = cifar_resnet(1)
    assert [layer.name for layer in layers] == [
        *("conv", "norm", "relu", "block16", "block32", "block64", "head")
    ]
    assert layers[0].flops == 2 * 27 * 16 * 1024
    assert layers[4].flops == 2 * 9 * 256 * (16 * 32 + 32 * 32)
    floats = 16 * 1024 + 32 * 256 + (2 + 2 * 3 + 2 * 2 + 3) * 32 * 256
    assert layers[4].traffic == 4 * floats
    assert cut_bytes(layers, [4, 5]) == (4 * 16 * 1024, 4 * 32 * 256)


def test_shares_sum_to_one_and_move_with_the_balance():
    layers = resnet101()
    for flops_per_byte in (0, 10, 1000):
        assert sum(stage_shares(layers, [50, 200], flops_per_byte)) == pytest.approx(1)
    assert stage_shares(layers, [26])[0] < stage_shares(layers, [26], 34)[0]


@pytest.mark.parametrize("cuts", [[0], [3], [2, 2], [2, 1], [-1]])
def test_cuts_that_leave_a_stage_empty_are_refused(cuts):
    with pytest.raises(ValueError, match="leave an empty stage"):
        stage_shares([Work("a", 1, 1, 1)] * 3, cuts)


# --- schedules ------------------------------------------------------------------------------------


seconds_of_a_stage = st.floats(0.1, 3)


@given(
    forward=st.lists(seconds_of_a_stage, min_size=1, max_size=4),
    transfer=st.floats(0, 1),
    beyond=st.integers(1, 12),
)
@settings(max_examples=25, deadline=None)
def test_long_gpipe_periods_follow_from_short_ones(forward, transfer, beyond):
    links = (transfer,) * (len(forward) - 1)
    table = Costs(
        tuple(forward),
        tuple(2 * f for f in forward),
        activation_transfer=links,
        gradient_transfer=links,
    )
    chunks = 8 * len(forward) + beyond
    exact = cycle_time(gpipe(len(forward), chunks, replay=True), table).period
    assert gpipe_period(chunks, table) == pytest.approx(exact, rel=1e-9)


def test_costs_of_a_plan_by_hand():
    """Two branches from layer 0: its output crosses once, though both later layers read it."""
    sizes = [(1.0, 2.0, 10), (3.0, 4.0, 20), (5.0, 6.0, 40)]
    layers = tuple(Layer(f"l{n}", f, b, size, 1) for n, (f, b, size) in enumerate(sizes))
    graph = LayerGraph(layers, ((0, 1), (0, 2), (1, 2)))
    stages = tuple(PlanStage(n, n + 1, own, 0.0, 1) for n, own in enumerate([(0,), (1,), (2,)]))
    found = plan_costs(graph, PipeDreamPlan(stages, 0.0, 0.0, 0.0), bandwidth=10.0)
    assert found.forward == (1.0, 3.0, 5.0)
    assert found.backward == (2.0, 4.0, 6.0)
    assert found.activation_transfer == found.gradient_transfer == (1.0, 3.0)


# --- the GPT model --------------------------------------------------------------------------------

POWERS = st.sampled_from([1, 2, 4])


@st.composite
def gpt_runs(draw):
    data, micro, pipeline = draw(POWERS), draw(POWERS), draw(POWERS)
    return GptRun(
        data * micro * draw(st.integers(1, 12)),
        micro,
        draw(st.sampled_from([1024, 2048])),
        16,
        pipeline * draw(st.integers(1, 6)),
        1024,
        draw(POWERS),
        data,
        pipeline,
    )


@given(gpt_runs())
@settings(max_examples=60, deadline=None)
def test_the_closed_form_of_the_fit_is_the_schedules_period(run):
    machine = GptMachine()
    (closed,) = closed_period(machine, [run])
    assert machine.period(run) == pytest.approx(closed, rel=1e-12)


def test_costs_of_one_stage_by_hand():
    """b=2, s=8, h=4, a=2, t=2, d=4, one layer: nothing but arithmetic."""
    machine = GptMachine(1.0, 10.0, 100.0, 0.0, 1000.0, 7.0, 3.0, 5.0)
    found = machine.costs(GptRun(8, 2, 4, 2, 1, 8, tensor=2, data=4, pipeline=1))
    operations = (24 * 2 * 8 * 16 + 4 * 2 * 64 * 4) / 2
    traffic = 2 * 2 * 8 * 4 * (10 + 6) + 12 * 2 * 2 * 64 / 2
    reduce = 2 * (2 * 1000 + 2 * 2 * 8 * 4 * 7)  # (t-1)/t = 1/2 of twice the bytes, two of them
    compute = operations + 10 * traffic + 100
    logits = 3 * 2 * 2 * 8 * 4 * 50257 / 2
    assert found.forward == pytest.approx((compute + reduce + logits,))
    assert found.backward == pytest.approx((2 * compute + reduce + compute + reduce + 2 * logits,))
    parameters = (12 * 16 + 50257 * 4) / 2
    assert found.update == pytest.approx((parameters * (5 + 1.5 * 2 * 7),))  # 2 (d-1)/d of 2 bytes


def test_the_embedding_is_updated_on_the_outer_stages_only():
    found = GptMachine().costs(GptRun(4, 1, 1024, 16, 8, 1024, 1, 1, pipeline=4))
    assert found.update[0] == found.update[3] > found.update[1] == found.update[2]
    assert found.forward[0] == found.forward[2] < found.forward[3]  # the logits are on the last


def test_a_slow_host_sets_the_time_of_small_layers():
    run = GptRun(1, 1, 1024, 16, 4, 1024, 1, 1, 1)
    slow = replace(GptMachine(), host=1.0)
    assert slow.period(run) == pytest.approx(4 * 4.0, rel=0.01)  # forward, again, twice backward


def test_calibration_recovers_a_known_machine():
    truth = GptMachine(1 / 150e12, 1 / 1.0e12, 2e-4, 6e-4, 4e-5, 1 / 60e9, 6.0, 3e-11)
    draw = np.random.default_rng(0)
    runs = [
        GptRun(d * b * m, b, h, 16, 4 * n, 1024, t, d, p)
        for b, m, n, h, t, d, p in zip(
            *(draw.choice(pool, 300) for pool in ([1, 2, 4, 8], [2, 4, 8])),
            *(draw.choice(pool, 300) for pool in ([3, 4, 6], [1024, 2048])),
            *(draw.choice([1, 2, 4], 300) for _ in range(3)),
            strict=True,
        )
    ]
    runs = [GptRun(*map(int, astuple(run))) for run in runs]
    seconds = [truth.period(run) for run in runs]
    found = calibrate(runs[:60], seconds[:60])
    assert astuple(found) == pytest.approx(astuple(truth), rel=0.15)
    errors = [found.period(run) / time - 1 for run, time in zip(runs, seconds, strict=True)]
    assert np.abs(errors[60:]).mean() < 0.005


def test_calibration_never_beats_the_data_sheet():
    runs = [
        GptRun(b, b, 1024, 16, n, 1024, t, 1, 1) for b in (1, 8) for n in (1, 9) for t in (1, 8)
    ]
    runs += [replace(run, hidden=2048) for run in runs]
    found = calibrate(runs, [1e-6] * len(runs))
    assert all(
        value >= least for value, least in zip(astuple(found), astuple(FASTEST), strict=True)
    )


@pytest.mark.parametrize(
    ("count", "seconds", "message"),
    [
        (3, [1.0] * 3, "3 runs cannot calibrate 8 constants"),
        (9, [1.0] * 8, "8 seconds for 9 runs"),
        (9, [1.0] * 8 + [0.0], "seconds must be positive"),
    ],
)
def test_calibration_refuses(count, seconds, message):
    with pytest.raises(ValueError, match=message):
        calibrate([GptRun(1, 1, 8, 2, 2, 8, 1, 1, 1)] * count, seconds)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_batch": 3}, "global_batch 3 must be a multiple of data x micro_batch = 2"),
        ({"layers": 3}, "layers 3 must be a multiple of pipeline 2"),
        ({"tensor": 0}, "tensor must be at least 1, got 0"),
    ],
)
def test_impossible_runs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(GptRun(4, 2, 8, 2, 4, 8, 1, 1, 2), **change)


# --- DDG ------------------------------------------------------------------------------------------


def three_equal_stages(published: dict[int, float]) -> Runs:
    layers = [Work("a", 1, 1, 10.0)] * 12
    cuts = {k: [12 // k * i for i in range(1, k)] for k in (2, 3, 4)}
    return Runs(12.0, published, layers, cuts)


def test_balanced_ddg_takes_the_papers_time():
    runs = three_equal_stages({2: 8.0, 3: 7.0})
    assert [runs.period(k) for k in (2, 3, 4)] == pytest.approx([4 + 8 / k for k in (2, 3, 4)])
    mailbox = runs.period(4, Sync.MAILBOX)
    assert mailbox == pytest.approx((2 * 4 + 8) / 4)
    assert runs.period(4, Sync.NONE) == pytest.approx(12 / 4)


def test_constants_are_found_from_their_row():
    ratio, speed = 1.3, 1e-4
    truth = three_equal_stages({})
    published = {k: truth.period(k, ratio=ratio) for k in (2, 3)}
    assert three_equal_stages(published).ratio_from(3) == pytest.approx(ratio)
    published = {3: truth.period(3, seconds_per_byte=speed * 1e-4)}
    assert three_equal_stages(published).seconds_per_byte_from(3) == pytest.approx(speed * 1e-4)


def test_messages_are_those_of_the_whole_batch():
    found = three_equal_stages({}).costs(3, ratio=3.0, seconds_per_byte=0.5)
    assert found.activation_transfer == found.gradient_transfer == (128 * 10 * 0.5,) * 2
    assert found.forward == pytest.approx((1.0,) * 3)
    assert found.backward == pytest.approx((3.0,) * 3)


def test_a_time_that_no_constant_explains_is_refused():
    with pytest.raises(ValueError, match="no constant between .* explains the published time on 2"):
        three_equal_stages({2: 13.0}).ratio_from(2)


WRN = """# a comment
method,model,K,sec_per_epoch,gpu_util_pct
BP,WRN-28-10,1,{alone},95
DDG,WRN-28-10,2,{two},81/69
DDG,WRN-28-10,3,{three},57/64/51
"""


def test_a_calibrated_row_is_marked_and_not_counted(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text(WRN.format(alone=300, two=220, three=190))
    anchor = wide_resnet_times(file)
    roles = {found.group: found.role for found in anchor.of(anchor.headline)}
    assert roles == {"K=2": Role.PREDICTION, "K=3": Role.CALIBRATED}
    two, three = anchor.of(anchor.headline)
    assert anchor.mean_error(anchor.headline) == abs(two.error)
    assert three.predicted == pytest.approx(190)
    # A published time that did not calibrate the headline leaves its predictions alone.
    file.write_text(WRN.format(alone=300, two=230, three=190))
    other = wide_resnet_times(file)
    assert other.of(other.headline)[0].predicted == two.predicted


def test_a_variant_without_predictions_has_no_error():
    row = Comparison("v", "g", "c", 1.0, 2.0, Role.CALIBRATED)
    assert mean_error([row]) is None
    assert Anchor("n", "t", "s", "v", (row,), ()).mean_error("v") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ("gpus,end_time_s\n1\n", "row 1 does not have one value per column"),
        ("gpus,end_time_s\n1,fast\n", "end_time_s is 'fast', must be a positive number"),
        ("gpus,end_time_s\n1,-3\n", "end_time_s is '-3', must be a positive number"),
        ("gpus\n1\n", "has no column 'end_time_s'"),
        ("gpus,end_time_s\n2,10\n", "needs the row of 1 GPU"),
    ],
)
def test_damaged_files_are_named(tmp_path, text, message):
    file = tmp_path / "ddg.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        resnet110_times(file)
    assert str(file) in str(caught.value)


def test_all_but_the_last_micro_batch_are_recomputed(tmp_path):
    """On one GPU, by hand: F + B take 1/90 s a sample, F a third of that, half of them twice."""
    file = tmp_path / "t.csv"
    head = "experiment,n,m_chunks,batch,balance,checkpoint,throughput_samples_s\n"
    file.write_text(head + "b,1,1,118,370,none,90\np,1,2,220,370,except_last,80\n")
    base, recomputed = torchgpipe(file).of("P40 roofline")
    assert (base.role, recomputed.role) == (Role.CALIBRATED, Role.APART)
    assert recomputed.predicted == pytest.approx(90 / (1 + 1 / 6))


def test_a_balance_that_is_not_the_network_is_refused(tmp_path):
    file = tmp_path / "t.csv"
    head = "experiment,n,m_chunks,batch,balance,checkpoint,throughput_samples_s\n"
    file.write_text(head + "b,1,1,118,370,none,95\np,2,4,16,100+200,except_last,100\n")
    with pytest.raises(ValueError, match=r"balance \[100, 200\] does not add up to 370"):
        torchgpipe(file)


# --- the command ----------------------------------------------------------------------------------


def run(capsys, *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["anchors", *words])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_a_folder_that_does_not_exist_is_an_error(capsys):
    code, out, err = run(capsys, "--path", "no/such")
    assert code == 2
    assert "no/such" in err
    assert out == ""


def test_absent_files_are_named(capsys, tmp_path):
    code, _, err = run(capsys, "--path", str(tmp_path))
    assert code == 2
    assert all(name in err for name in ANCHORS)


def test_an_absent_default_folder_is_no_error(capsys, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    code, out, _ = run(capsys)
    assert code == 0
    assert "not in ../shared/anchors" in out


def test_what_is_printed_is_what_was_compared(capsys, tmp_path):
    (tmp_path / "ddg_wrn_resnet56.csv").write_text(
        WRN.format(alone=300, two=220, three=190)
        + "BP,ResNet-56,1,30,57\nDDG,ResNet-56,2,29,45/25\n"
    )
    code, out, _ = run(capsys, "--path", str(tmp_path))
    assert code == 0
    anchor = compare(tmp_path)[0][0]
    assert f"{anchor.of(anchor.headline)[0].predicted:.4g}" in out
    assert "190 +0.0%*" in out
    code, out, _ = run(capsys, "--path", str(tmp_path), "--json")
    found = json.loads(out)
    assert [entry["file"] for entry in found["anchors"]] == ["ddg_wrn_resnet56.csv"] * 2
    assert len(found["anchors"][0]["rows"]) == len(anchor.comparisons)
    assert set(found["missing"]) == set(ANCHORS) - {"ddg_wrn_resnet56.csv"}


# --- the data -------------------------------------------------------------------------------------


def test_ddg_is_predicted():
    for name, limit in (("ddg_wrn_resnet56.csv", 0.03), ("ddg_resnet110_cifar10.csv", 0.02)):
        anchor = ANCHORS[name][0](data(name))
        error = anchor.mean_error(anchor.headline)
        assert error is not None
        assert error <= limit
        assert [found.role for found in anchor.of(anchor.headline)].count(Role.CALIBRATED) == 1


def test_vtrain_is_predicted_better_than_by_vtrain():
    anchor = ANCHORS["vtrain_a100_single_node.csv"][0](data("vtrain_a100_single_node.csv"))
    for variant in anchor.variants:
        comparisons = anchor.of(variant)
        calibrated = [found for found in comparisons if found.role is Role.CALIBRATED]
        assert len(comparisons) == 726
        assert len(calibrated) <= 72
        error, pipelined = mean_error(comparisons), mean_error(anchor.of(variant, "pp >= 2"))
        assert error is not None
        assert error < 0.0837
        assert pipelined is not None
        assert pipelined < 0.0837


def test_torchgpipe_is_predicted():
    anchor = ANCHORS["torchgpipe_resnet101.csv"][0](data("torchgpipe_resnet101.csv"))
    counted = [found for found in anchor.of(anchor.headline) if found.role is Role.PREDICTION]
    assert [found.group for found in counted] == ["n=2", "n=4", "n=8"]
    assert max(abs(found.error) for found in counted) < 0.12


def test_pipedreams_plans_are_reproduced():
    anchor = ANCHORS["pipedream_optimizer.csv"][0](data("pipedream_optimizer.csv"))
    planned, simulated = (anchor.of(variant) for variant in anchor.variants)
    assert len(planned) == 5
    assert max(abs(found.error) for found in planned) < 1e-4
    assert {found.role for found in simulated} == {Role.APART}
    assert min(found.error for found in simulated) > -1e-4  # no schedule beats its slowest stage


def test_every_file_that_is_there_is_read():
    found = [name for name in ANCHORS if (DATA / name).is_file()]
    if not found:
        pytest.skip(f"{DATA} has none of {', '.join(ANCHORS)}")
    assert all(read_rows(DATA / name) for name in found)
