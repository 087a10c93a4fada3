"""Plans against closed forms and brute force; the command as its users see it."""

from __future__ import annotations

import json
import math
import shlex
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest

from ddg_cli.main import main
from ddg_cli.plan import numbers
from ddg_sim.cluster import Cluster
from ddg_sim.layers import Layer, LayerGraph
from ddg_sim.methods import METHODS
from ddg_sim.plan import EmptyPlanError, Plan, Row, plan
from ddg_sim.plot import heat_maps, plan_picture, speedup_curves
from ddg_sim.profile import LinkProfile, Profile, StageProfile
from ddg_sim.schedule import Sync
from ddg_sim.times import LogNormal

CHAIN = LayerGraph(
    tuple(
        Layer(f"layer{n}", 0.01 * (n % 3 + 1), 0.02 * (n % 4 + 1), 100_000 * (n + 1), 1_000_000)
        for n in range(9)
    ),
    tuple(pairwise(range(9))),
)
EVEN = LayerGraph(
    tuple(Layer(f"layer{n}", 0.01, 0.02, 1000, 5000) for n in range(12)),
    tuple(pairwise(range(12))),
)
TOTAL = sum(layer.forward + layer.backward for layer in CHAIN.layers)


def cluster(count: int = 8, memory: str = "1 TB", **fields: Any) -> Cluster:
    link = {"bandwidth": "100 MB/s", "latency": "1 ms"}
    devices = [{"name": "gpu", "count": count, "memory": memory}]
    return Cluster.model_validate(
        {"version": 1, "devices": devices, "default_link": link, **fields}
    )


def one(graph: LayerGraph, name: str, stages: int, **options: Any) -> Row:
    """The only row of a plan of one point."""
    (row,) = plan(graph, [name], [stages], **options).rows
    return row


def folded(cuts: tuple[int, ...], scale: float) -> tuple[list[float], list[float], list[int]]:
    """Seconds of stages forward and backward, and bytes over cuts, of `CHAIN`."""
    bounds = [0, *cuts, len(CHAIN.layers)]
    parts = [CHAIN.layers[start:end] for start, end in pairwise(bounds)]
    return (
        [scale * sum(layer.forward for layer in part) for part in parts],
        [scale * sum(layer.backward for layer in part) for part in parts],
        [round(scale * CHAIN.layers[cut - 1].output_bytes) for cut in cuts],
    )


# --- Periods ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("batch", [8, 32, 100])
def test_without_links_periods_are_the_closed_forms_of_the_best_cuts(stages: int, batch: int):
    scale = batch / 32
    options = {"batch_sizes": [batch], "profile_batch_size": 32}
    every = [folded(cuts, scale) for cuts in combinations(range(1, 9), stages - 1)]
    assert one(CHAIN, "bp", stages, **options).period.value == pytest.approx(TOTAL * scale)
    ddg = min(max(f + b for f, b in zip(F, B, strict=True)) for F, B, _ in every)
    assert one(CHAIN, "ddg", stages, **options).period.value == pytest.approx(ddg)
    barrier = min(sum(F) + max(B) for F, B, _ in every)
    found = one(CHAIN, "ddg", stages, syncs=[Sync.BARRIER], **options)
    assert found.period.value == pytest.approx(barrier)


@pytest.mark.parametrize("stages", [2, 3])
def test_with_links_and_host_every_part_counts(stages: int):
    host = {"operation": "2 ms", "message": "1 ms"}
    found = one(CHAIN, "bp", stages, cluster=cluster(host=host), batch_sizes=[64],
                profile_batch_size=32)  # fmt: skip
    periods = []
    for cuts in combinations(range(1, 9), stages - 1):
        F, B, crossing = folded(cuts, 2.0)
        transfers = sum(2 * (0.001 + size / 100e6) for size in crossing)
        # The last stage's update is hidden behind the way back; the first stage's is not. Each
        # message is one for its sender and one for its receiver.
        operations, messages = 2 * stages + 1, 2 * 2 * (stages - 1)
        periods.append(sum(F) + sum(B) + transfers + 0.002 * operations + 0.001 * messages)
    assert found.period.value == pytest.approx(min(periods))
    assert "round trip" in found.bound_by
    assert found.bound == f"round trip 1-{stages}"


def test_data_parallelism_divides_the_batch_and_pays_the_ring():
    found = one(CHAIN, "dp", 4, cluster=cluster())
    assert (found.schedule.num_stages, found.schedule.replicas, found.devices) == (1, 4, 4)
    ring = 2 * 3 / 4 * 9_000_000 / 100e6 + 2 * 3 * 0.001
    assert found.period.value == pytest.approx(TOTAL / 4 + ring)
    assert found.over_dp is not None
    assert found.over_dp.value == 1
    assert found.over_bp is not None
    assert found.over_bp.value == pytest.approx(TOTAL / (TOTAL / 4 + ring))


def test_micro_batches_split_the_batch():
    found = one(EVEN, "gpipe", 4, micro_batches=[8], replicas=[2], batch_sizes=[32],
                profile_batch_size=16)  # fmt: skip
    # Each of 8 micro-batches on each of 2 replicas has 2 samples: an eighth of the profile's.
    assert found.period.value == pytest.approx((8 + 4 - 1) * (3 * 0.03) / 8)
    assert found.batch_size == 32
    assert found.throughput == pytest.approx(32 / found.period.value)


def test_speed_factors_move_the_cuts():
    devices = [{"name": "fast", "speed": 3.0}, {"name": "slow"}]
    fast_first = cluster(devices=devices, default_link={"bandwidth": "1 PB/s"})
    found = one(EVEN, "fdg", 2, cluster=fast_first)
    assert found.cuts == (9,)
    assert found.period.value == pytest.approx(3 * 0.03)


def test_what_the_host_spends_does_not_grow_with_the_batch():
    devices = [{"name": "gpu"}]
    alone = Cluster.model_validate(
        {"version": 1, "devices": devices, "host": {"operation": "2 ms"}}
    )
    rows = plan(CHAIN, ["bp"], [1], cluster=alone, **SWEEP | {"replicas": [1]}).rows
    periods = {row.batch_size: row.period.value for row in rows}
    assert periods == {
        16: pytest.approx(TOTAL / 2 + 3 * 0.002),  # forward, backward, update
        64: pytest.approx(TOTAL * 2 + 3 * 0.002),
    }


def test_a_shared_bus_is_never_faster_and_is_said():
    bus = {"bandwidth": "10 kB/s", "latency": "1 ms"}
    shared = cluster(default_link={**bus, "bus": "b"}, buses=[{"name": "b", "sharing": "fifo"}])
    alone = one(EVEN, "ddg", 3, cluster=cluster(default_link=bus))
    together = one(EVEN, "ddg", 3, cluster=shared)
    # Four messages of 1000 bytes per iteration: alone they are part of a round trip of three.
    assert alone.period.value == pytest.approx((0.36 + 4 * 0.101) / 3)
    assert together.period.value >= 4 * 0.101 * (1 - 1e-9)
    assert "; sharing buses adds" in together.bound_by


# --- Memory -------------------------------------------------------------------------------------


def test_what_does_not_fit_says_what_is_missing_and_comes_last():
    found = plan(CHAIN, ["bp", "ddg"], [1, 2, 3], cluster=cluster(memory="15 MB"))
    fits = [row.fits for row in found.rows]
    assert fits == sorted(fits, reverse=True)
    assert any(fits)
    assert not all(fits)
    for row in found.rows:
        assert row.fits == (max(row.memory) <= 15e6)
        assert row.period.value > 0
        assert row.fits == (row.over_bp is not None)
    worst = found.rows[-1]
    assert worst.missing is not None
    assert "of 15 MB" in worst.missing


@pytest.mark.parametrize(("optimizer", "copies"), [("sgd", 2), ("momentum", 3), ("adam", 4)])
def test_memory_is_parameters_optimizer_and_activations(optimizer: str, copies: int):
    for batch in (32, 64):
        found = one(CHAIN, "bp", 1, optimizer=optimizer, batch_sizes=[batch], profile_batch_size=32)
        outputs = sum(layer.output_bytes for layer in CHAIN.layers) * batch / 32
        assert found.memory == (copies * 9_000_000 + outputs,)


# --- The sweep ----------------------------------------------------------------------------------


def test_ranking_is_by_samples_per_second():
    found = plan(CHAIN, ["bp", "ddg", "dp"], range(1, 5), batch_sizes=[32, 64],
                 profile_batch_size=32, cluster=cluster())  # fmt: skip
    speeds = [row.throughput for row in found.rows]
    assert speeds == sorted(speeds, reverse=True)
    assert len(found.rows) == 3 * 4 * 2


def test_what_is_skipped_is_counted_with_its_reason():
    found = plan(CHAIN, ["bp", "gpipe"], [2, 20], micro_batches=[1, 4], batch_sizes=[2, 32],
                 profile_batch_size=32, cluster=cluster(4))  # fmt: skip
    assert found.skipped == {
        "bp does not split a batch: it takes 1 micro-batch": 4,
        "more stages than the network's 9 layers": 6,
        "fewer samples per update than micro-batches times replicas": 1,
    }
    assert len(found.rows) == 5
    odd = plan(CHAIN, ["interleaved"], range(1, 6))
    assert odd.skipped == {"interleaved: num_stages must be a multiple of chunks=2": 3}
    few = plan(CHAIN, ["bp"], [2, 8], cluster=cluster(4))
    assert few.skipped == {"more devices than the cluster's 4": 1}


def test_data_parallelism_with_more_devices_than_samples_is_no_baseline():
    found = one(CHAIN, "bp", 4, batch_sizes=[2], profile_batch_size=2)
    assert found.over_dp is None
    assert found.over_bp is not None


def test_nothing_left_is_an_error():
    with pytest.raises(EmptyPlanError, match=r"no point is possible: more stages than .* \(2\)"):
        plan(CHAIN, ["bp", "ddg"], [10])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_planned(name: str):
    (row,) = plan(EVEN, [name], [4], cluster=cluster()).rows
    assert row.lower_bound <= row.period.value * (1 + 1e-9)
    assert row.over_bp is not None
    assert 0.3 < row.over_bp.value < 4.5
    assert len(row.staleness) == row.schedule.num_stages
    assert len(row.memory) == len(row.schedule.workers)


SWEEP: dict[str, Any] = {"batch_sizes": [16, 64], "profile_batch_size": 32, "replicas": [1, 2]}


@pytest.fixture(scope="module")
def alone() -> Plan:
    return plan(CHAIN, ["bp", "ddg", "gpipe"], range(1, 5), cluster=cluster(), **SWEEP)


def test_the_number_of_jobs_changes_nothing(alone: Plan):
    seen: list[tuple[int, int]] = []
    both = plan(
        CHAIN,
        ["bp", "ddg", "gpipe"],
        range(1, 5),
        cluster=cluster(),
        jobs=2,
        progress=lambda done, total: seen.append((done, total)),
        **SWEEP,
    )
    assert both == alone
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_dask_cluster_can_do_the_work(alone: Plan):
    distributed = pytest.importorskip("distributed", reason="dask's scheduler is not installed")
    local = distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
    )
    with local, distributed.Client(local), joblib.parallel_config(backend="dask"):
        there = plan(CHAIN, ["bp", "ddg", "gpipe"], range(1, 5), cluster=cluster(), **SWEEP)
    assert there == alone


def test_jitter_gives_intervals_and_the_same_luck_to_all():
    jitter = LogNormal(1.0, 0.3)
    found = plan(EVEN, ["bp", "ddg", "dp"], [3], jitter=jitter, precision=0.02, seed=3)
    again = plan(EVEN, ["ddg"], [3], jitter=jitter, precision=0.02, seed=3)
    rows = {row.schedule.method: row for row in found.rows}
    assert again.rows == (rows["ddg"],)  # whatever else is planned
    calm = one(EVEN, "ddg", 3)
    assert rows["ddg"].period.low > calm.period.value  # waiting for the slowest: E max > max E
    assert rows["ddg"].period.relative_width <= 0.02
    assert rows["bp"].period.low < 0.36 < rows["bp"].period.high
    assert rows["bp"].over_bp is not None
    assert (rows["bp"].over_bp.low, rows["bp"].over_bp.high) == (1.0, 1.0)
    assert rows["dp"].period.low > calm.period.value  # replicas wait for one another


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["sgd"]}, "unknown method 'sgd'; known methods: bp, "),
        ({"stages": [0]}, "stages holds 0: give numbers of at least 1"),
        ({"optimizer": "lamb"}, "unknown optimizer 'lamb'; known: sgd, momentum, adam"),
        ({"batch_sizes": [8]}, "batch_sizes needs profile_batch_size"),
        ({"replicas": [-1]}, "replicas holds -1"),
        ({"precision": 0.0, "jitter": LogNormal(1, 0.1)}, "precision is 0.0"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        plan(**{"graph": CHAIN, "names": ["bp"], "stages": [2], **arguments})


# --- Pictures -----------------------------------------------------------------------------------


def test_pictures_are_written_whole_and_the_same_every_time(alone: Plan, tmp_path: Path):
    for draw in (speedup_curves, heat_maps, plan_picture):
        files = [tmp_path / f"{draw.__name__}{n}.svg" for n in range(2)]
        for file in files:
            draw(alone.rows, file)
        text = files[0].read_text()
        assert text.rstrip().endswith("</svg>")
        assert "speedup over" in text
    with pytest.raises(ValueError, match=r"give one that ends in .png or .svg"):
        heat_maps(alone.rows, tmp_path / "picture.pdf")


def test_a_picture_of_what_does_not_fit(tmp_path: Path):
    rows = plan(CHAIN, ["bp", "ddg"], [1, 2], cluster=cluster(memory="1 MB")).rows
    assert not any(row.fits for row in rows)
    plan_picture(rows, tmp_path / "none.png")
    assert (tmp_path / "none.png").stat().st_size > 1000


# --- The command --------------------------------------------------------------------------------

KEYS = {
    "method", "stages", "sync", "period", "speedup_over_bp", "speedup_over_dp", "staleness",
    "peak_memory", "fits", "bound_by", "batch_size", "micro_batches", "replicas", "cuts",
    "period_interval",
}  # fmt: skip
GRAPH = """\
node1 -- Input0 -- forward_compute_time=0.0, backward_compute_time=0.0, activation_size=0.0, \
parameter_size=0.0
node2 -- Conv -- forward_compute_time=10.0, backward_compute_time=20.0, activation_size=4000.0, \
parameter_size=800.0
node3 -- Linear -- forward_compute_time=10.0, backward_compute_time=20.0, activation_size=400.0, \
parameter_size=800.0
\tnode1 -- node2
\tnode2 -- node3
"""


@pytest.fixture
def ddg(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run `ddg plan` in this process, in a folder with a profile and a cluster."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("graph.txt", "other.txt"):
        Path(name).write_text(GRAPH)
    Path("cluster.json").write_text(cluster(4).model_dump_json(exclude_none=True))
    fields = json.loads(Path("cluster.json").read_text())
    fields["devices"] = [{"name": "gpu", "count": 4, "memory": "1 GB"}]
    fields["default_link"] = {"bandwidth": "100 MB/s"}
    fields["host"] = {"operation": "10 us"}
    Path("cluster.json").write_text(json.dumps(fields))
    fields["devices"][0]["memory"] = 1
    Path("unitless.json").write_text(json.dumps(fields))

    def run(words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["plan", *shlex.split(words), "--jobs", "1"])
        code = ended.value.code
        assert isinstance(code, int) or code is None
        return code or 0, *capsys.readouterr()

    return run


def test_json_rows(ddg: Any):
    code, out, err = ddg("--profile graph.txt --methods bp,ddg --stages 1..3 --json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert all(row.keys() >= KEYS for row in found["rows"])
    best = found["rows"][0]
    assert (best["method"], best["stages"], best["sync"], best["cuts"]) == ("ddg", 2, "none", [1])
    assert best["period"] == pytest.approx(0.03)
    assert best["period_interval"] == [best["period"]] * 2
    assert best["speedup_over_bp"] == pytest.approx(2.0)
    assert best["staleness"] == [1, 0]
    assert best["bound_by"].startswith("stage 1's own forward + backward bounds you: 30 ms")
    reason = "more stages than the network's 2 layers"
    assert found["skipped"] == [{"reason": reason, "points": 2}]


def test_the_table_fits_a_terminal_and_ends_with_the_best(ddg: Any):
    words = "--profile graph.txt --cluster cluster.json --stages 1..3 --methods bp,ddg,gpipe,dp"
    code, out, err = ddg(f"{words} --batch-sizes 8,16 --profile-batch-size 8 --top 5")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    table = [line for line in lines if line.startswith(("│", "┃", "┏", "└"))]
    assert len(table) == 3 + 5 + 1 - 1
    assert max(map(len, table)) <= 100
    assert "and 13 more" in out
    assert "skipped 6 points: more stages than the network's 2 layers" in out
    assert lines[-1].startswith("best: ")
    assert "samples/s" in lines[-1]
    assert "on as many devices" in lines[-1]


def test_profiles_know_their_batch(ddg: Any):
    stage = StageProfile(layers=["fc"], forward=0.1, backward=0.2, update=0.0, recompute=0.1,
                         overhead=0.0, output_bytes=400, parameter_bytes=40)  # fmt: skip
    link = LinkProfile(activation=0.0, gradient=0.0, bytes=400)
    known: dict[str, Any] = {"version": 1, "model": "mlp", "data": "digits", "device": "cpu"}
    known |= {"threads": 1, "torch": "2.11", "cuts": [1], "stages": [stage, stage]}
    Profile(**known, batch_size=8, links=[link]).write("own.json")
    code, out, _ = ddg("--profile own.json --methods ddg --stages 2 --batch-sizes 16 --json")
    assert code == 0
    (row,) = json.loads(out)["rows"]
    assert (row["batch_size"], row["period"]) == (16, pytest.approx(0.6))
    code, _, err = ddg("--profile own.json --stages 2 --profile-batch-size 4")
    assert (code, err) == (2, "ddg: --profile-batch-size 4: own.json says 8\n")


def test_pictures_of_the_command(ddg: Any, tmp_path: Path):
    words = "--profile graph.txt --methods bp,ddg --stages 1,2"
    assert ddg(f"{words} --plot plan.png")[0] == 0
    assert ddg(f"{words} --plot .")[0] == 0
    for name in ("plan.png", "speedup.png", "heatmap.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


MISTAKES = {
    "--stages two": "--stages 'two': give numbers such as 1..16 or 2,4,8",
    "--stages 4..2": "--stages '4..2': give numbers from 1 to",
    "--stages 0": "--stages '0': give numbers from 1 to",
    "--stages 2 --methods sgd": "unknown method 'sgd'; known methods: bp, ",
    "--stages 5..9 --methods ddg": "no point is possible: more stages than the network's 2 layers",
    "--stages 2 --batch-sizes 8": "--batch-sizes needs --profile-batch-size: graph.txt does not",
    "--stages 2 --cluster none.json": "none.json: cannot be read: No such file or directory",
    "--stages 2 --cluster other.txt": "other.txt: not valid JSON",
    "--stages 2 --cluster graph.txt": "--profile and --cluster both name graph.txt",
    "--stages 2 --cluster unitless.json": "unitless.json: devices[0].memory: has no unit: write",
    "--stages 2 --sync often": "unknown --sync 'often'; known: none, barrier, mailbox",
    "--stages 2 --optimizer lamb": "unknown optimizer 'lamb'",
    "--stages 2 --jitter much": "--jitter 'much': 'much' is no time",
    "--stages 2 --jitter 1,2": "--jitter '1,2': give one number or distribution",
    "--stages 2 --plot plan.pdf": "--plot plan.pdf: must end in .png or .svg",
    "--stages 2 --plot nowhere/plan.png": "the folder nowhere does not exist",
    "--stages 2 --jitter 2": "--jitter '2' does not vary: give a distribution",
    "--stages 2 --seed 3": "--seed has nothing to draw: give a --jitter that varies",
    "--stages 2 --top 3 --json": "--top is about the table: --json prints all rows",
    "--stages 2 --methods bp --sync barrier": "no point is possible: bp knows no synchronisation",
    "--stages 2 --stages-per-device 4": "no point is possible: fewer stages than were to share",
    "--stages 2 --replicas 0": "--replicas '0': give numbers from 1 to",
}


@pytest.mark.parametrize("words", MISTAKES, ids=str)
def test_mistakes_are_one_line_and_exit_code_2(ddg: Any, words: str):
    code, out, err = ddg(f"--profile graph.txt {words}")
    assert (code, out) == (2, "")
    assert err.startswith("ddg: ")
    assert MISTAKES[words] in err
    assert err.count("\n") == 1


def test_ranges():
    assert numbers("--stages", "2,1..3,8") == (2, 1, 3, 8)


def test_no_time_at_all_is_no_division_by_zero():
    nothing = LayerGraph((Layer("a", 0.0, 0.0), Layer("b", 0.0, 0.0)), ((0, 1),))
    row = one(nothing, "ddg", 2)
    assert (row.period.value, row.throughput, row.over_bp) == (0.0, math.inf, None)
    assert np.isfinite(row.lower_bound)
