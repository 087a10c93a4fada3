"""The `ddg` command as its users see it: figures, files, exit codes, and one line per mistake."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from ddg_cli.main import main
from ddg_cli.output import progress_bar, seconds
from ddg_gpu import checkpoint, data, models
from ddg_gpu.data import Batches
from ddg_gpu.train import evaluate

ROOT = Path(__file__).parents[1]


class Result(NamedTuple):
    """What a command left behind."""

    code: int | None
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        assert self.code in (0, None), self.err
        return json.loads(self.out)


Ddg = Callable[[str], Result]


@pytest.fixture
def ddg(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ddg:
    """Run a command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # a relative one would no longer lead workers here
    monkeypatch.delenv("DDG_PORT", raising=False)

    def run(line: str) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(shlex.split(line))
        return Result(ended.value.code, *capsys.readouterr())

    return run


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "ddg_cli", *words]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def process(folder: Path, *words: str, **options: Any) -> Result:
    """Run a command line in a process of its own."""
    finished = subprocess.run(
        command(*words),
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=200,
        **options,
    )
    return Result(finished.returncode, finished.stdout, finished.stderr)


# --- simulate -----------------------------------------------------------------------------------

FORWARD, BACKWARD = (1.0, 2.0, 3.0, 4.0), 2.0
SIMULATE_KEYS = {
    "method",
    "stages",
    "sync",
    "period",
    "speedup_over_bp",
    "makespan",
    "utilisation",
    "staleness",
    "peak_activations",
    "weight_versions",
    "critical_cycle",
}


def test_barrier_costs_all_forwards_and_the_slowest_backward(ddg: Ddg):
    words = "simulate ddg --stages 4 --forward 1,2,3,4 --backward 2 --sync barrier --json"
    found = ddg(words).json
    assert found.keys() >= SIMULATE_KEYS
    assert (found["method"], found["stages"], found["sync"]) == ("ddg", 4, "barrier")
    assert found["period"] == sum(FORWARD) + BACKWARD
    assert found["speedup_over_bp"] == (sum(FORWARD) + 4 * BACKWARD) / (sum(FORWARD) + BACKWARD)
    assert found["utilisation"] == [(f + BACKWARD) / found["period"] for f in FORWARD]
    assert found["staleness"] == [3, 2, 1, 0]
    assert found["peak_activations"] == found["weight_versions"] == [4, 3, 2, 1]
    assert found["makespan"] > 100 * found["period"]


@pytest.mark.parametrize(
    ("words", "period"),
    [
        ("bp --stages 4 --forward 1,2,3,4 --backward 2", 18.0),
        ("bp --stages 3 --comm 0.5", 9.0 + 2 * 2 * 0.5),
        ("bp --stages 1 --update 0.25", 3.25),
        ("ddg --stages 4 --forward 1,2,3,4 --backward 2", 6.0),
        ("ddg --stages 4 --forward 1,2,3,4 --backward 2 --sync none", 6.0),
        ("ddg --stages 4", 3.0),
        ("ddg --stages 4 --comm 1", (4 * 3.0 + 2 * 3 * 1.0) / 4),
        ("ddg --stages 3 --sync mailbox", 4.0),
        ("ddg --stages 3 --update 0,0,0.5", 3.5),
        ("ddg --stages 1", 3.0),
    ],
)
def test_closed_forms(ddg: Ddg, words: str, period: float):
    found = {e: ddg(f"simulate {words} --engine {e} --json").json for e in ("des", "cycle")}
    assert found["des"]["period"] == pytest.approx(period, rel=1e-12)
    assert found["cycle"]["period"] == pytest.approx(period, rel=1e-12)
    assert found["cycle"]["makespan"] == pytest.approx(found["des"]["makespan"], rel=1e-12)
    assert found["cycle"]["utilisation"] == pytest.approx(found["des"]["utilisation"], rel=1e-12)
    for key in ("staleness", "weight_versions", "peak_activations", "critical_cycle"):
        assert found["cycle"][key] == found["des"][key]


@pytest.mark.parametrize("engine", ["des", "cycle"])
def test_sixty_four_stages(ddg: Ddg, engine: str):
    found = ddg(f"simulate ddg --stages 64 --engine {engine} --json").json
    assert (found["period"], found["speedup_over_bp"]) == (3.0, 64.0)
    assert found["staleness"] == list(range(63, -1, -1))


def test_the_makespan_grows_by_the_period(ddg: Ddg):
    spans = [
        ddg(f"simulate ddg --stages 3 --iterations {n} --json").json["makespan"] for n in (20, 21)
    ]
    assert spans[1] - spans[0] == pytest.approx(3.0)


def test_nothing_takes_any_time(ddg: Ddg):
    found = ddg("simulate ddg --stages 2 --forward 0 --backward 0 --json").json
    assert (found["period"], found["speedup_over_bp"]) == (0.0, None)
    assert "–" in ddg("simulate ddg --stages 2 --forward 0 --backward 0").out


def test_the_table_holds_the_figures(ddg: Ddg):
    words = "simulate ddg --stages 4 --forward 1,2,3,4 --backward 2 --sync barrier"
    result = ddg(words)
    assert (result.code, result.err) == (None, "")
    for figure in ("25.0 %", "50.0 %", "period 12 s", "1.50×", "for 100 iterations", "bounds you"):
        assert figure in result.out
    rows = [re.findall(r"[\d.]+", line) for line in result.out.splitlines() if line[:1] == "│"]
    assert rows == [
        ["1", "25.0", "3", "4", "4"],
        ["2", "33.3", "2", "3", "3"],
        ["3", "41.7", "1", "2", "2"],
        ["4", "50.0", "0", "1", "1"],
    ]


def test_random_times_give_an_interval_and_the_same_one_again(ddg: Ddg):
    words = "simulate ddg --stages 3 --sync barrier --jitter gamma(1,0.3) --precision 0.005"
    found = ddg(f"{words} --json").json
    low, high = found["period_interval"]
    assert 5.0 < low < found["period"] < high
    assert (high - low) / 2 <= 0.005 * found["period"]
    assert found["speedup_interval"][0] < found["speedup_over_bp"] < 9 / 5
    assert not found["period_is_exact"]
    assert ddg(f"{words} --json").json == found
    assert ddg(f"{words} --seed 1 --json").json["period"] != found["period"]
    assert "runs, 95 %" in ddg(words).out


def test_both_engines_agree_on_random_times(ddg: Ddg):
    words = "simulate 1f1b --stages 3 --forward lognormal(1,0.2),1,normal(2,0.1) --json --engine"
    des, cycle = (ddg(f"{words} {engine}").json for engine in ("des", "cycle"))
    assert des["period"] == cycle["period"]
    assert des["makespan"] == pytest.approx(cycle["makespan"], rel=1e-12)


@pytest.mark.parametrize(
    ("words", "period"),
    [
        ("ddg --stages 2 --overhead 0.1", 3.3),  # three operations
        ("ddg --stages 2 --message 0.1", 3.2),  # one message sent, one received
        ("ddg --stages 2 --forward 3,1 --comm 0.5 --blocking", 5.5),
        ("ddg --stages 2 --sync barrier --barrier 0.25", 4.5),
        ("ddg --stages 2 --semantics replay --recompute 0.5", 3.5),
        ("dp --stages 1 --replicas 4 --all-reduce 0.5", 3.5),
        ("gpipe --stages 4 --micro-batches 8", (8 + 3) * 3.0),
        ("ddg --stages 2 --slowdown 2,1", 6.0),
    ],
)
def test_what_else_costs_time(ddg: Ddg, words: str, period: float):
    assert ddg(f"simulate {words} --json").json["period"] == pytest.approx(period, rel=1e-12)


def test_data_parallel_copies_count_as_more_samples(ddg: Ddg):
    found = ddg("simulate dp --stages 1 --replicas 4 --all-reduce 0.5 --json").json
    assert found["speedup_over_bp"] == pytest.approx(4 * 3.0 / 3.5)


def test_what_would_help_most(ddg: Ddg):
    found = ddg("simulate ddg --stages 2 --comm 2 --what-if --json").json
    best = found["what_if"][0]
    assert best["what"] == "one more iteration of delay at stage 1"
    assert best["period"] == pytest.approx(10 / 3)
    assert best["gain"] == pytest.approx(1 / 3)
    out = ddg("simulate ddg --stages 2 --comm 2 --what-if").out
    assert "what would help most" in out
    assert "33.3 %" in out
    assert ddg("simulate ddg --stages 2 --json").json["what_if"] is None


def test_trace_and_pictures_are_written(ddg: Ddg, tmp_path: Path):
    result = ddg("simulate ddg --stages 2 --comm 0.5 --trace run.json --plot run.png")
    events = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    operations = [event for event in events if event["ph"] == "X"]
    assert {event["name"] for event in operations} >= {"F0", "B0", "activation 0", "gradient 0"}
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert "wrote run.json" in result.out
    assert "wrote run.png" in result.out
    ddg("simulate bp --stages 2 --plot RUN.SVG")
    assert "<svg" in (tmp_path / "RUN.SVG").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "run.png", "RUN.SVG"}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0 s"), (0.9999, "1 s"), (999.4, "999 s"), (1e5, "100,000 s"), (2e12, "2e+12 s")],
)
def test_seconds_are_readable(value: float, text: str):
    assert seconds(value) == text


# --- verify -------------------------------------------------------------------------------------

VERIFY_KEYS = {
    "statement",
    "status",
    "hypotheses",
    "measured",
    "bound",
    "tightness",
    "verdict",
    "nonvacuous",
    "paths",
}


def test_lemma_1_is_violated(ddg: Ddg):
    words = "verify lemma1 --problem kuramoto --stages 2 --gamma 0.01 --iterations 8"
    found = ddg(f"{words} --json").json
    assert found.keys() >= VERIFY_KEYS
    assert (found["statement"], found["verdict"], found["paths"]) == ("lemma1", "VIOLATED", 256)
    assert found["status"] == "refuted as stated"
    assert found["measured"] > found["bound"]
    assert found["tightness"] is None
    assert found["nonvacuous"]
    assert len(found["hypotheses"]) == 5
    table = ddg(words).out
    for figure in ("VIOLATED", "256", f"{found['measured']:.6g}", f"{found['bound']:.6g}"):
        assert figure in table


@pytest.mark.parametrize(
    ("words", "verdict", "nonvacuous"),
    [
        ("theorem-a --problem rotation-chain --stages 2 --gamma 0.05", "VERIFIED", True),
        ("theorem-a --problem geman-mcclure --stages 3 --gamma 0.1", "VERIFIED", False),
        ("theorem1 --problem kuramoto --stages 2 --gamma 0.01", "VERIFIED", False),
        ("theorem2 --problem rotation-chain --stages 2 --gamma 0.01", "VERIFIED", False),
        ("theorem1 --problem kuramoto --stages 2 --gamma 2", "NOT APPLICABLE", False),
        ("theorem1 --problem kuramoto --stages 1 --gamma 0.1", "VERIFIED", False),
    ],
)
def test_verdicts(ddg: Ddg, words: str, verdict: str, nonvacuous: bool):
    found = ddg(f"verify {words} --iterations 6 --json").json
    assert (found["verdict"], found["paths"]) == (verdict, 64)
    if verdict == "VERIFIED":
        assert found["measured"] <= found["bound"]
        assert found["tightness"] == found["measured"] / found["bound"]
    assert bool(found["hypotheses_failing"]) == (verdict == "NOT APPLICABLE")
    assert verdict in ddg(f"verify {words} --iterations 6").out


def test_the_list_of_statements(ddg: Ddg):
    found = ddg("verify --list --json").json["statements"]
    assert {"lemma1", "theorem1", "theorem2", "theorem-a"} <= {item["key"] for item in found}
    table = ddg("verify --list").out
    assert all(item["key"] in table and item["status"] in table for item in found)
    assert "…" not in table


def test_a_violation_is_written_and_computed_again(ddg: Ddg, tmp_path: Path):
    file = tmp_path / "found.json"
    found = ddg(f"verify search lemma1 --certificate {file} --json").json
    assert (found["verdict"], found["found"]) == ("VIOLATED", True)
    again = ddg(f"verify --recheck {file} --json").json
    assert (again["verdict"], again["holds"]) == ("VIOLATED", True)
    assert "the certificate holds" in ddg(f"verify --recheck {file}").out
    edited = json.loads(file.read_text())
    file.write_text(json.dumps(edited | {"left": edited["left"] + 1e-3}))
    result = ddg(f"verify --recheck {file}")
    assert result.code == 1
    assert "FAILED" in result.out
    assert "left is" in result.out
    file.write_text("{")
    result = ddg(f"verify --recheck {file}")
    assert result.code == 2
    assert "not valid JSON" in result.err
    assert len(result.err.splitlines()) == 1


def test_verify_takes_delays_methods_and_random_paths(ddg: Ddg):
    words = "verify theorem-a --problem cauchy --gamma 0.05"
    found = ddg(f"{words} --delays 2,0 --iterations 6 --json").json
    assert (found["method"], found["stages"], found["verdict"]) == ("delays 2,0", 2, "VERIFIED")
    found = ddg(f"{words} --stages 3 --method bp --iterations 6 --json").json
    assert (found["method"], found["sampling"]) == ("bp", None)
    words += " --stages 2 --iterations 40 --alpha 0.01 --seed 3"
    found = ddg(f"{words} --json").json
    assert (found["sampling"]["seed"], found["sampling"]["alpha"]) == (3, 0.01)
    assert found["interval"][0] < found["measured"] < found["interval"][1] < found["bound"]
    assert "confidence limits" in ddg(words).out


def test_the_table_of_verify(ddg: Ddg):
    words = "verify table --statements theorem-a,lemma1 --problems kuramoto --stages 1,2 --jobs 1"
    found = ddg(f"{words} --json").json
    assert len(found["cells"]) == 10
    assert found["correction"] == "Bonferroni"
    table = ddg(words).out
    assert "10 checks" in table
    assert "Bonferroni" in table


# --- profile, train, validate -------------------------------------------------------------------


@pytest.mark.slow
def test_simulate_uses_what_profile_wrote(ddg: Ddg, tmp_path: Path):
    words = "profile --model mlp --stages 2 --batch-size 32 --iterations 2 -o p.json"
    shown = ddg(f"{words} --json").json
    written = json.loads((tmp_path / "p.json").read_text())
    assert shown == {"output": "p.json", **written}
    assert (written["model"], written["batch_size"], len(written["stages"])) == ("mlp", 32, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]

    found = ddg("simulate bp --stages 2 --profile p.json --json").json
    spent = sum(
        stage[name] + stage["overhead"]
        for stage in written["stages"]
        for name in ("forward", "backward", "update")
    ) + sum(2 * stage["message"] for stage in written["stages"])
    links = sum(link["activation"] + link["gradient"] for link in written["links"])
    # The last stage's update may overlap the way back, so this is only an upper bound.
    slowest = max(
        factor
        for stage in written["stages"]
        for factors in stage["contention"].values()
        for factor in factors.values()
    )
    assert 0.5 * spent < found["period"] <= (spent + links) * slowest

    wrong = ddg("simulate ddg --stages 3 --profile p.json")
    assert wrong.code == 2
    assert "--stages 3: the profile p.json has 2 stages" in wrong.err
    for other in ("--batch-size 64", "--batch-size 32 --stages 3", "--batch-size 32 --cuts 1"):
        refused = ddg(f"validate --model mlp --profile p.json {other}")
        assert refused.code == 2
        assert refused.err.count("\n") == 1
        assert "profile" in refused.err


TRAIN = "train {method} --model mlp --data digits --iterations 6 --batch-size 32 --json"
TRAIN_KEYS = {"loss_first", "loss_last", "test_accuracy", "period", "weights_sha256"}


def test_weights_do_not_depend_on_executor_or_synchronisation(ddg: Ddg):
    words = TRAIN.format(method="ddg --stages 2")
    runs = [
        ddg(f"{words} {extra}").json
        for extra in (
            "--executor serial",
            "--executor serial --sync barrier",
            "--executor serial --sync mailbox",
            "--executor distributed",
        )
    ]
    for run in runs:
        assert run.keys() >= TRAIN_KEYS
        assert (run["iterations"], run["stages"], run["data"]) == (6, 2, "digits")
        assert run["period"] > 0
    for key in ("weights_sha256", "loss_first", "loss_last", "test_accuracy"):
        assert len({run[key] for run in runs}) == 1, key
    assert {run["sync"] for run in runs} == {"none", "barrier", "mailbox"}


def test_backpropagation_does_not_depend_on_the_number_of_stages(ddg: Ddg):
    hashes = {
        ddg(f"{TRAIN.format(method='bp')} --stages {k}").json["weights_sha256"] for k in (1, 2, 5)
    }
    hashes.add(ddg(f"{TRAIN.format(method='ddg')} --stages 1").json["weights_sha256"])
    assert len(hashes) == 1


def test_delay_semantics_seed_and_optimizer_matter(ddg: Ddg):
    words = TRAIN.format(method="ddg --stages 3")
    extras = (
        "",
        "--semantics current",
        "--semantics replay",
        "--seed 1",
        "--optimizer adam",
        "--learning-rate 0.01",
    )
    hashes = [ddg(f"{words} {extra}").json["weights_sha256"] for extra in extras]
    assert len(set(hashes)) == len(extras)
    again = ddg(words).json["weights_sha256"]
    assert again == hashes[0]


def test_methods_train_with_their_options(ddg: Ddg):
    runs = {
        words: ddg(f"{TRAIN.format(method=words)} --stages 3").json
        for words in (
            "gpipe --micro-batches 2",
            "zb-h1 --micro-batches 2",
            "pb",
            "pb --spike --predict",
            "pipemare --anneal 5 --decay 0.5 --micro-batches 2",
            "dgl --buffer 1",
            "pipedream --vertical-sync",
            "ddg --delays 3,1,0",
        )
    }
    whole, halves, *others = (run["weights_sha256"] for run in runs.values())
    assert whole == halves
    assert len({whole, *others}) == 1 + len(others)
    assert runs["zb-h1 --micro-batches 2"]["samples_per_iteration"] == 2
    assert runs["ddg --delays 3,1,0"]["options"] == {"delays": [3, 1, 0]}
    assert all(run["iterations"] == 6 for run in runs.values())


def test_epochs_count_passes_over_the_data(ddg: Ddg):
    words = "train bp --stages 1 --model mlp --epochs 2 --batch-size 500 --json"
    assert ddg(words).json["iterations"] == 2 * 3


def test_saved_weights_are_those_that_load_continues_from(ddg: Ddg, tmp_path: Path):
    first = ddg(f"{TRAIN.format(method='ddg')} --stages 2 --save w.pt --trace t.json").json
    digits = data.load("digits")
    model = models.build("mlp", digits.input_shape, digits.classes, seed=5)
    checkpoint.load_into(model, tmp_path / "w.pt")
    assert checkpoint.weights_sha256(model) == first["weights_sha256"]
    assert evaluate(model, digits) == first["test_accuracy"]

    # However the next run is cut and executed, it starts from these weights.
    words = f"{TRAIN.format(method='ddg')} --load w.pt"
    more = [
        ddg(f"{words} {extra}").json
        for extra in ("--stages 2", "--stages 2 --executor distributed")
    ]
    more.append(ddg(f"{TRAIN.format(method='bp')} --stages 3 --load w.pt").json)
    assert more[0]["weights_sha256"] == more[1]["weights_sha256"] != first["weights_sha256"]
    inputs, targets = Batches(digits, 32, seed=0).inputs(0), Batches(digits, 32, seed=0).targets(0)
    loss = torch.nn.functional.cross_entropy(model.train()(inputs), targets)
    assert [run["loss_first"] for run in more] == [pytest.approx(loss.item(), rel=1e-6)] * 3
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" and event["name"].startswith("F") for event in events) == 12
    assert {path.name for path in tmp_path.iterdir()} == {"w.pt", "t.json"}
    wrong = ddg("train bp --stages 1 --model resnet8 --iterations 1 --load w.pt")
    assert wrong.code == 2
    assert "w.pt: is of another model" in wrong.err


def test_the_table_of_a_run_holds_its_figures(ddg: Ddg):
    words = "train ddg --stages 2 --model mlp --iterations 6 --batch-size 32"
    found, table = ddg(f"{words} --json").json, ddg(words).out
    for figure in (
        f"{found['loss_first']:.4f}, {found['loss_last']:.4f}",
        f"{100 * found['test_accuracy']:.1f} %",
        found["weights_sha256"],
        "ddg on 2 stages",
    ):
        assert figure in table


@pytest.mark.slow
def test_validate_reports_both_sides(ddg: Ddg, tmp_path: Path):
    found = ddg(
        "validate --model mlp --stages 2 --methods bp,ddg --iterations 12 --rounds 1"
        " --batch-size 32 --trace v.json --plot v.svg --json"
    ).json
    assert list(found["methods"]) == ["bp", "ddg"]
    for row in found["methods"].values():
        assert row["error"] == pytest.approx(row["predicted_period"] / row["measured_period"] - 1)
    bp, fast = found["methods"].values()
    assert bp["predicted_speedup"] == bp["measured_speedup"] == 1.0
    assert fast["predicted_speedup"] == bp["predicted_period"] / fast["predicted_period"]
    assert fast["measured_speedup"] == bp["measured_period"] / fast["measured_period"]
    assert found["profile"]["model"] == "mlp"
    for both in found["timelines"].values():
        for side in ("predicted", "measured"):
            forwards = [span for span in both[side] if span["label"].startswith("F")]
            assert len(forwards) == 2 * 12
            assert all(span["end"] >= span["start"] for span in both[side])
    names = {
        event["args"]["name"]
        for event in json.loads((tmp_path / "v.json").read_text())["traceEvents"]
        if event["name"] == "process_name"
    }
    assert names == {"bp, predicted", "bp, measured", "ddg, predicted", "ddg, measured"}
    assert "<svg" in (tmp_path / "v.svg").read_text()


@pytest.mark.slow
def test_demo_writes_its_report(ddg: Ddg, tmp_path: Path):
    found = ddg("demo -o report --model mlp --iterations 12 --rounds 1 --batch-size 32 --json").json
    assert found["report"] == "report"
    assert list(found["methods"]) == ["bp", "ddg/barrier", "ddg/none"]
    assert found["verified"]["verdict"] == "VERIFIED"
    rows = found["methods"]
    assert rows["ddg/barrier"]["weights_sha256"] == rows["ddg/none"]["weights_sha256"]
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "result.json",
        "profile.json",
        "trace.json",
        "timelines.png",
        "losses.png",
    }
    written = json.loads((tmp_path / "report" / "result.json").read_text())
    assert {**written, "report": "report"} == found


# --- wrong input: one line, exit code 2, no file ------------------------------------------------

SIM = "simulate ddg --stages 2"
VER = "verify lemma1 --problem kuramoto --stages 2"
FIT = "train ddg --stages 2 --model mlp --iterations 2"
VAL = "validate --model mlp"
PRO = "profile --model mlp --stages 2 -o p.json"

WRONG = [
    ("", ["Missing command"]),
    ("simulat ddg", ["simulat"]),
    ("simulate", ["method"]),
    ("simulate ddg", ["--stages"]),
    ("simulate ddg --stages", ["--stages"]),
    ("simulate ddg --stages 0", ["--stages", "0"]),
    ("simulate ddg --stages=-1", ["--stages", "-1"]),
    ("simulate ddg --stages two", ["--stages", "two", "integer"]),
    ("simulate ddg --stages 2.5", ["--stages", "2.5", "integer"]),
    ("simulate ddg --stages nan", ["--stages", "nan"]),
    ("simulate ddg --stages ''", ["--stages", "''"]),
    ("simulate ddg --stages 2 --barrier 1", ["--barrier '1'", "sync none", "has no barriers"]),
    ("simulate ddg --stages 2 --recompute 1", ["--recompute '1'", "recomputes nothing"]),
    ("simulate ddg --stages 2 --all-reduce 1", ["--all-reduce '1'", "has no replicas"]),
    ("simulate ddg --stages 1 --comm 1", ["--comm '1'", "1 stage,", "sends no messages"]),
    ("simulate pd-asgd --stages 4 --stages-per-device 2", ["pd-asgd", "stages on two workers"]),
    (
        "simulate gpipe --stages 4 --chunks 2",
        ["--chunks 2 does not apply to gpipe", "--micro-batches"],
    ),
    ("simulate interleaved --stages 3", ["num_stages must be a multiple of chunks=2, got 3"]),
    (f"{FIT.replace('ddg', 'petra', 1)}", ["model 'mlp'", "petra can reverse", "revnet16"]),
    (
        f"{FIT.replace('ddg', 'dp', 1)} --executor distributed",
        ["dp", "replicas 2", "serial executor"],
    ),
    (
        f"{FIT.replace('ddg', 'pd-asgd', 1)} --executor distributed",
        ["pd-asgd", "two workers of stage 0", "serial executor"],
    ),
    (f"{FIT.replace('ddg', 'ouroboros', 1)}", ["tied", "share no parameter", "gpt-tiny-tied"]),
    (f"{FIT} --data text", ["'mlp' reads images", "gpt-tiny"]),
    (f"{FIT} --data no.txt", ["no.txt: cannot be read", "No such file"]),
    (f"{FIT} --spike", ["spike True does not apply to ddg"]),
    (f"{FIT} --delays 0,1", ["delays must be 2 numbers that do not grow"]),
    (f"{FIT.replace('ddg', 'pb', 1)} --spike --optimizer adam", ["spike=2", "Adam", "take sgd"]),
    (
        "train sideways --stages 2 --model mlp --iterations 40",
        ["batch_size 64", "29 examples", "sideways"],
    ),
    ("simulate sgd --stages 2", ["method", "'sgd'", "bp, ddg"]),
    (f"{SIM} --sync lock", ["--sync", "'lock'", "none, barrier, mailbox"]),
    ("simulate bp --stages 2 --sync barrier", ["sync", "'barrier'", "bp"]),
    (f"{SIM} --forward -1", ["forward", "-1"]),
    (f"{SIM} --forward nan", ["forward", "nan"]),
    (f"{SIM} --forward inf", ["forward", "inf"]),
    (f"{SIM} --forward ''", ["--forward", "''"]),
    (f"{SIM} --forward 1,", ["--forward", "'1,'"]),
    (f"{SIM} --forward 1,x", ["--forward", "'x'"]),
    (f"{SIM} --forward 1,2,3", ["forward", "3 values", "2 stages"]),
    (f"{SIM} --backward 1,-2", ["backward[1]", "-2"]),
    (f"{SIM} --backward 1e308", ["backward", "1e+308"]),
    (f"{SIM} --update 1,2,3", ["update", "3 values"]),
    (f"{SIM} --comm 1,2", ["comm", "2 values", "1 link"]),
    ("simulate ddg --stages 1 --comm nan", ["comm", "nan"]),
    (f"{SIM} --iterations 0", ["--iterations", "0"]),
    (f"{SIM} --engine gpu", ["engine", "'gpu'", "des, cycle"]),
    (f"{SIM} --profile missing.json", ["missing.json", "No such file"]),
    (f"{SIM} --profile folder", ["folder", "directory"]),
    (f"{SIM} --forward 1 --profile p.json", ["--forward", "--profile"]),
    (f"{SIM} --trace nowhere/t.json", ["--trace", "nowhere/t.json", "does not exist"]),
    (f"{SIM} --trace folder", ["--trace", "folder", "is a folder"]),
    (f"{SIM} --plot p.pdf", ["--plot", "p.pdf", ".png or .svg"]),
    (f"{SIM} --plot p", ["--plot", ".png or .svg"]),
    (f"{SIM} --plot nowhere/p.png", ["--plot", "nowhere"]),
    (f"{SIM} --bogus 3", ["--bogus"]),
    (f"{SIM} extra", ["extra"]),
    ("verify", ["STATEMENT", "--problem", "--stages", "--gamma", "--iterations", "--list"]),
    ("verify lemma1 --stages 2", ["--problem", "--gamma", "--iterations"]),
    ("verify lemma2 --problem kuramoto --stages 2 --gamma 1 --iterations 4", ["'lemma2'"]),
    ("verify lemma1 --problem lasso --stages 2 --gamma 1 --iterations 4", ["'lasso'", "kuramoto"]),
    ("verify lemma1 --problem kuramoto --stages 0 --gamma 1 --iterations 4", ["--stages", "0"]),
    (f"{VER} --gamma 0 --iterations 4", ["gamma", "0"]),
    (f"{VER} --gamma 0.1 --iterations 4 --delays 9,0", ["delays", "9"]),
    (f"{VER} --gamma 0.1 --iterations 4 --delays 1,0 --method bp", ["--method", "--delays"]),
    (f"{VER} --gamma 0.1 --iterations 4 --alpha 3", ["--alpha", "3"]),
    (f"{VER} --gamma 0.1 --iterations 4 --certificate no/c.json", ["--certificate", "no"]),
    ("verify --recheck no/such.json", ["no/such.json"]),
    ("verify search lemma9", ["'lemma9'"]),
    ("verify table --statements lemma9", ["'lemma9'"]),
    ("verify table --problems lasso", ["'lasso'"]),
    (f"{VER} --gamma -0.5 --iterations 4", ["gamma", "-0.5"]),
    (f"{VER} --gamma nan --iterations 4", ["gamma", "nan"]),
    (f"{VER} --gamma inf --iterations 4", ["gamma", "inf"]),
    (f"{VER} --gamma x --iterations 4", ["--gamma", "'x'", "number"]),
    (f"{VER} --gamma 0.1 --iterations 0", ["--iterations", "0"]),
    (f"{VER} --gamma 0.1 --iterations 40", ["40", "2^40 sample paths", "at most 23"]),
    (f"{VER} --gamma 0.1 --iterations 4000", ["4000", "2^4000 sample paths", "at most 23"]),
    ("profile --model vgg --stages 2 -o p.json", ["--model", "'vgg'", "resnet8"]),
    ("profile --model mlp --stages 9 -o p.json", ["stages", "9", "8 layers"]),
    ("profile --model mlp --stages 0 -o p.json", ["--stages", "0"]),
    ("profile --model mlp --stages 2", ["--output"]),
    ("profile --model mlp --stages 2 -o folder", ["--output", "folder"]),
    ("profile --model mlp --stages 2 -o nowhere/p.json", ["--output", "nowhere/p.json"]),
    (f"{PRO} --iterations 0", ["--iterations", "0"]),
    (f"{PRO} --batch-size 0", ["--batch-size", "0"]),
    (f"{PRO} --batch-size 1438", ["batch_size", "1438", "1437"]),
    (f"{PRO} --data nowhere", ["nowhere", "no such file"]),
    (f"{PRO} --data folder", ["folder", "holds no dataset"]),
    (f"{PRO} --data ./text", ["text", "not a tar archive"]),
    (f"{PRO} --data text", ["mlp", "reads images", "gpt-tiny"]),
    (f"{PRO} --data cut.tar.gz", ["cut.tar.gz", "damaged"]),
    (f"{PRO} --cuts 0", ["cuts", "[0]", "1..7"]),
    (f"{PRO} --cuts 8", ["cuts", "[8]", "1..7"]),
    (f"{PRO} --cuts 1,2", ["cuts", "[1, 2]", "stages 2"]),
    (f"{PRO} --cuts a", ["--cuts", "'a'"]),
    (f"{PRO} --cuts 1,", ["--cuts", "'1,'"]),
    ("profile --model mlp --stages 3 -o p.json --cuts 5,2", ["cuts", "[5, 2]"]),
    ("train ddg --stages 2 --model mlp", ["iterations", "epochs"]),
    (f"{FIT} --epochs 1", ["iterations", "epochs"]),
    ("train ddg --stages 2 --model mlp --iterations 0", ["--iterations", "0"]),
    ("train ddg --stages 2 --model mlp --epochs 0", ["--epochs", "0"]),
    ("train ddg --stages 9 --model mlp --iterations 2", ["stages", "9", "8 layers"]),
    (
        "train ddg --stages 9 --model mlp --iterations 2 --executor distributed",
        ["stages", "9", "8 layers"],
    ),
    ("train ddg --stages 0 --model mlp --iterations 2", ["--stages", "0"]),
    ("train sgd --stages 2 --model mlp --iterations 2", ["method", "'sgd'"]),
    ("train ddg --stages 2 --model vgg --iterations 2", ["--model", "'vgg'"]),
    ("train bp --stages 2 --model mlp --iterations 2 --sync mailbox", ["'mailbox'", "bp"]),
    (f"{FIT} --executor gpu", ["executor", "'gpu'", "serial, distributed"]),
    (f"{FIT} --data nowhere", ["nowhere"]),
    (f"{FIT} --sync x", ["--sync", "'x'"]),
    (f"{FIT} --semantics x", ["--semantics", "'x'", "stash, current, replay"]),
    (f"{FIT} --optimizer x", ["optimizer", "'x'", "sgd, adam"]),
    (f"{FIT} --learning-rate 0", ["learning_rate", "0"]),
    (f"{FIT} --learning-rate nan", ["learning_rate", "nan"]),
    (f"{FIT} --momentum 1", ["momentum", "1"]),
    (f"{FIT} --weight-decay -1", ["weight_decay", "-1"]),
    (f"{FIT} --batch-size 1438", ["batch_size", "1438"]),
    (f"{FIT} --seed -1", ["--seed", "-1"]),
    (f"{FIT} --seed 9223372036854775808", ["--seed", "9223372036854775808"]),
    (f"{FIT} --seed x", ["--seed", "'x'"]),
    (f"{FIT} --cuts 9", ["cuts", "[9]"]),
    (f"{FIT} --save folder", ["--save", "folder"]),
    (f"{FIT} --save nowhere/w.pt", ["--save", "nowhere/w.pt"]),
    (f"{FIT} --trace nowhere/t.json", ["--trace", "nowhere/t.json"]),
    (f"{FIT} --load nowhere.pt", ["nowhere.pt", "no such checkpoint"]),
    (f"{FIT} --load text", ["text", "no readable checkpoint"]),
    (f"{FIT} --load empty", ["empty", "no readable checkpoint"]),
    (f"{FIT} --timeout 0", ["--timeout", "0"]),
    (f"{FIT} --executor distributed --timeout -1", ["--timeout", "-1"]),
    (f"{FIT} --executor distributed --timeout nan", ["--timeout", "nan"]),
    (f"{FIT} --executor distributed --timeout inf", ["--timeout", "inf"]),
    (f"{FIT} --executor distributed --port 0", ["--port", "0"]),
    (f"{FIT} --executor distributed --port 70000", ["--port", "70000"]),
    (f"{VAL} --methods bp,bp", ["--methods", "'bp,bp'"]),
    (f"{VAL} --methods ''", ["--methods", "''"]),
    (f"{VAL} --methods bp,sgd", ["method", "'sgd'"]),
    (f"{VAL} --methods bp,ddg/x", ["sync", "'x'"]),
    (f"{VAL} --methods bp/barrier", ["'barrier'", "bp"]),
    (f"{VAL} --stages 9", ["stages", "9", "8 layers"]),
    (f"{VAL} --stages 0", ["--stages", "0"]),
    (f"{VAL} --iterations 0", ["--iterations", "0"]),
    (f"{VAL} --rounds 0", ["--rounds", "0"]),
    (f"{VAL} --timeout nan", ["--timeout", "nan"]),
    (f"{VAL} --profile missing.json", ["missing.json"]),
    (f"{VAL} --plot v.gif", ["--plot", "v.gif"]),
    (f"{VAL} --trace nowhere/t.json", ["--trace", "nowhere/t.json"]),
    ("demo -o text", ["--output", "text", "is a file"]),
    ("demo -o nowhere/report", ["--output", "nowhere"]),
    ("demo --iterations 0", ["--iterations", "0"]),
    ("demo --model vgg", ["--model", "'vgg'"]),
]


def assert_one_line(result: Result, fragments: list[str]) -> None:
    assert result.code == 2, result
    assert result.out == ""
    assert result.err.startswith("ddg: ")
    assert result.err.endswith("\n")
    assert result.err.count("\n") == 1
    assert "Traceback" not in result.err
    for fragment in fragments:
        assert fragment in result.err


@pytest.mark.parametrize(("words", "fragments"), WRONG, ids=[words for words, _ in WRONG])
def test_wrong_input_gets_one_line(ddg: Ddg, tmp_path: Path, words: str, fragments: list[str]):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("nothing that any command could read\n")
    (tmp_path / "cut.tar.gz").write_bytes(b"\x1f\x8b\x08\x00abc")
    before = sorted(tmp_path.rglob("*"))
    assert_one_line(ddg(words), fragments)
    assert sorted(tmp_path.rglob("*")) == before


STAGE = {
    "layers": ["fc"],
    "forward": 0.1,
    "backward": 0.2,
    "update": 0.0,
    "recompute": 0.1,
    "overhead": 0.0,
    "output_bytes": 0,
    "parameter_bytes": 0,
}
PROFILE = {
    "version": 1,
    "model": "mlp",
    "data": "digits",
    "batch_size": 8,
    "device": "cpu",
    "threads": 1,
    "torch": "2",
    "cuts": [4],
    "stages": [STAGE, STAGE],
    "links": [{"activation": 0.0, "gradient": 0.0, "bytes": 8}],
}
BROKEN_PROFILES = {
    "negative": (json.dumps({**PROFILE, "stages": [{**STAGE, "forward": -1}, STAGE]}), "-1"),
    "not a number": (
        json.dumps({**PROFILE, "stages": [STAGE, {**STAGE, "backward": float("nan")}]}),
        "stages[1].backward",
    ),
    "text": (json.dumps({**PROFILE, "batch_size": "x"}), "batch_size"),
    "missing field": (json.dumps({**PROFILE, "stages": [{"layers": []}, STAGE]}), "forward"),
    "unknown field": (json.dumps({**PROFILE, "colour": 1}), "colour"),
    "version": (json.dumps({**PROFILE, "version": 2}), "version"),
    "links": (json.dumps({**PROFILE, "links": []}), "links"),
    "cuts": (json.dumps({**PROFILE, "cuts": [0]}), "cuts[0]"),
    "no stages": (json.dumps({**PROFILE, "stages": []}), "stages"),
    "a list": ("[]", "object"),
    "nothing": ("", "JSON"),
    "cut short": (json.dumps(PROFILE)[:100], "JSON"),
}
# Sound files, which describe something else than what is asked for.
OTHER_PROFILES = {
    "model": ({"model": "resnet8"}, "resnet8"),
    "data": ({"data": "cifar10"}, "cifar10"),
    "batch size": ({"batch_size": 9}, "batch_size"),
    "cuts beyond the model": ({"cuts": [99]}, "[99]"),
}


@pytest.mark.parametrize(("text", "fragment"), BROKEN_PROFILES.values(), ids=BROKEN_PROFILES)
def test_broken_profiles(ddg: Ddg, tmp_path: Path, text: str, fragment: str):
    (tmp_path / "p.json").write_text(text)
    assert_one_line(ddg(f"{SIM} --profile p.json"), ["p.json", fragment])
    assert_one_line(ddg(f"{VAL} --batch-size 8 --profile p.json"), ["p.json", fragment])


@pytest.mark.parametrize(("change", "fragment"), OTHER_PROFILES.values(), ids=OTHER_PROFILES)
def test_profiles_of_something_else(
    ddg: Ddg, tmp_path: Path, change: dict[str, Any], fragment: str
):
    (tmp_path / "p.json").write_text(json.dumps({**PROFILE, **change}))
    assert_one_line(ddg(f"{VAL} --batch-size 8 --profile p.json"), [fragment])


def test_a_good_profile_is_read(ddg: Ddg, tmp_path: Path):
    (tmp_path / "p.json").write_text(json.dumps(PROFILE))
    assert ddg(f"{SIM} --profile p.json --json").json["period"] == pytest.approx(0.3)
    (tmp_path / "p.json").write_bytes(b"\xff\xfe\x00")
    assert_one_line(ddg(f"{SIM} --profile p.json"), ["p.json", "not a text file"])


@pytest.mark.parametrize(
    "content",
    [
        [1],
        {"a": 1},
        {"format": 1},
        {"format": 1, "weights": 3},
        {"format": 1, "weights": {"0.1.weight": 3}},
        {"format": 1, "weights": {"0.1.weight": torch.zeros(1)}},
        {"format": 2, "weights": {}},
        os.path.join,
    ],
    ids=lambda content: getattr(content, "__name__", None) or repr(content),
)
def test_other_files_of_torch_are_no_checkpoints(ddg: Ddg, tmp_path: Path, content: object):
    torch.save(content, tmp_path / "w.pt")
    assert_one_line(ddg(f"{FIT} --load w.pt"), ["w.pt", "is "])


def test_a_port_in_use(ddg: Ddg, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = f"{FIT} --executor distributed"
        assert_one_line(ddg(f"{words} --port {port}"), ["port", str(port), "in use"])
        monkeypatch.setenv("DDG_PORT", str(port))
        assert_one_line(ddg(words), ["port", str(port), "in use"])
    monkeypatch.setenv("DDG_PORT", "many")
    assert_one_line(ddg(words), ["DDG_PORT", "'many'"])


def test_an_explicit_port_works(ddg: Ddg):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = f"{FIT} --batch-size 32 --json"
    apart = ddg(f"{words} --executor distributed --port {port}").json
    assert apart["weights_sha256"] == ddg(words).json["weights_sha256"]


# --- around the commands ------------------------------------------------------------------------


def test_help_fits_eighty_columns(ddg: Ddg, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    overview = ddg("--help").out
    assert "..." not in overview.partition("Commands:")[2]
    for name in ("simulate", "verify", "profile", "train", "validate", "demo"):
        assert re.search(rf"^  {name} +[A-Z].*[.?]$", overview, re.MULTILINE)
        result = ddg(f"{name} --help")
        assert result.err == ""
        assert max(map(len, result.out.splitlines())) <= 80


def test_version(ddg: Ddg):
    assert re.fullmatch(r"ddg \d+\.\d+\.\d+\n", ddg("--version").out)


def test_no_progress_bar_where_nobody_looks(capsys: pytest.CaptureFixture[str]):
    with progress_bar("train") as progress:
        progress(1, 2)
    assert capsys.readouterr() == ("", "")


def test_json_is_all_there_is_on_stdout(tmp_path: Path):
    words = ("train", "ddg", "--stages", "2", "--model", "mlp", "--iterations", "3", "--json")
    result = process(tmp_path, *words, "--save", "w.pt")
    assert result.json["iterations"] == 3
    assert result.err == ""


def test_the_module_runs_as_a_command(tmp_path: Path):
    help_page = process(tmp_path, "--help")
    assert (help_page.code, help_page.err) == (0, "")
    assert "simulate" in help_page.out
    wrong = process(tmp_path, "simulate", "ddg", "--stages", "x")
    assert_one_line(wrong, ["--stages", "'x'"])


@pytest.mark.slow
def test_ctrl_c_ends_a_run_at_once(tmp_path: Path):
    words = "train ddg --stages 2 --model mlp --executor distributed --iterations 1000000"
    with subprocess.Popen(
        command(*words.split(), "--save", "w.pt"),
        cwd=tmp_path,
        env={**ENVIRONMENT, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        try:
            deadline = time.monotonic() + 60
            while not list(tmp_path.glob("ddg-*")) and time.monotonic() < deadline:
                time.sleep(0.1)  # until the workers' folder is there
            time.sleep(1)
            running.send_signal(signal.SIGINT)
            out, err = running.communicate(timeout=60)
        finally:
            running.kill()
    assert running.returncode == 130
    assert (out, err) == ("", "ddg: interrupted\n")
    assert [path for path in tmp_path.iterdir() if path.name.startswith(("ddg-", "w.pt"))] == []


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cannot bind to one core here")
def test_one_core_is_warned_of(tmp_path: Path):
    core = min(os.sched_getaffinity(0))
    words = "train bp --stages 2 --model mlp --executor distributed --iterations 2 --json"
    result = process(tmp_path, *words.split(), preexec_fn=lambda: os.sched_setaffinity(0, {core}))
    assert_warned_of_one_core(result)


def test_validate_warns_of_one_core(ddg: Ddg, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ddg_gpu.validate.available_cores", lambda: 1)
    (tmp_path / "p").write_text(json.dumps(PROFILE))
    words = "validate --model mlp --methods bp --iterations 2 --rounds 1 --batch-size 8 --profile p"
    assert_warned_of_one_core(ddg(f"{words} --json"))


def assert_warned_of_one_core(result: Result):
    assert result.code in (0, None)
    assert result.err.startswith("ddg: warning: only 1 core for 2 processes")
    assert result.err.count("\n") == 1
    [warning] = result.json["warnings"]
    assert "means nothing" in warning


@pytest.mark.parametrize("name", ["interleaved", "ouroboros", "pd-asgd", "gpipe", "dgl"])
def test_every_kind_of_method_is_predicted(ddg: Ddg, name: str):
    text = ddg(f"simulate {name} --stages 4 --iterations 5").out
    assert f"{name} on 4 stages" in text
    assert "bounds you" in text
