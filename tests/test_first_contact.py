"""`python -m ddg_gpu.first_contact`: its processes, its table, its file; all without a GPU."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddg_gpu.cuda_checks import CHECKS
from ddg_gpu.facts import Facts, FactsError, read_facts, write_facts
from ddg_gpu.first_contact import NAME, main
from ddg_gpu.isolated import Check, Result, _read, run_check

ROOT = Path(__file__).parents[1]


def check(function: str, *, name: str = "", needs: tuple[str, ...] = ()) -> Check:
    return Check(name or function, f"does it {function}", f"fake_checks:{function}", needs=needs)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))


def test_a_check_that_holds():
    result = run_check(check("fine"), [2, 4], limit=60)
    assert (result.status, result.use, result.error) == ("ok", "yes", ())
    assert result.figures["stages"] == [2, 4]
    assert result.figures["pid"] != os.getpid()


@pytest.mark.parametrize(
    ("function", "status", "first", "figures"),
    [
        ("refuted", "no", "1.9 times as long", {"ratio": 1.9}),
        ("raises", "failed", "RuntimeError: CUDA error: an illegal memory access", {"before": 1}),
        ("segfaults", "failed", "killed by SIGSEGV", {"before": 1}),
        ("exits", "failed", "ended with exit code 0 and no result", {}),
        ("exits_badly", "failed", "ended with exit code 7 and no result", {}),
        ("leaves", "failed", "SystemExit: 0", {}),
        ("nonsense", "failed", "TypeError: a check returns None", {"before": 1}),
        ("no_json", "failed", "ValueError: Out of range float values", {"before": 1}),
        ("missing", "failed", "AttributeError: module 'fake_checks' has no", {}),
    ],
)
def test_whatever_a_check_does_is_told(function: str, status: str, first: str, figures: dict):
    result = run_check(check(function), [2], limit=60)
    assert (result.status, result.use, result.figures) == (status, "no", figures)
    assert result.error[0].startswith(first)


def test_a_report_that_is_torn_or_garbage_is_no_result(tmp_path: Path):
    report = tmp_path / "report"
    whole = '{"figure": "a", "value": 1}\n[1]\n\x00nonsense\n{"figure": "b", "value": 2}\n{"sta'
    report.write_text(whole)
    assert _read(report) == ({"a": 1, "b": 2}, None)
    report.write_text(whole + 'tus": "ok"}\n')
    assert _read(report) == ({"a": 1, "b": 2}, {"status": "ok"})
    assert _read(tmp_path / "none") == ({}, None)


def test_what_a_crashed_check_said_is_kept():
    assert "the driver says goodbye" in run_check(check("exits_badly"), [2], limit=60).error
    trace = "\n".join(run_check(check("segfaults"), [2], limit=60).error)
    assert "in segfaults" in trace


def test_a_hanging_check_ends_in_time_with_all_it_started(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("FAKE_CHILD", str(tmp_path / "pid"))
    began = time.monotonic()
    result = run_check(check("hangs"), [2], limit=3)
    assert time.monotonic() - began < 30
    assert (result.status, result.figures) == ("timed out", {"before": 1})
    assert result.error[0] == "not finished after 3 s"
    assert any("in hangs" in line for line in result.error)
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while alive(child):  # killed, but whoever inherits it has to notice
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_one_bad_check_does_not_stop_the_others(tmp_path: Path):
    checks = [check("fine"), check("segfaults"), check("refuted"), check("fine", name="last")]
    out = io.StringIO()
    assert main(["--output", str(tmp_path), "--stages", "4", "2", "4"], out, checks) == 1
    facts = read_facts(tmp_path / NAME)
    assert facts.complete
    assert facts.stages == (2, 4)
    found = {name: result.status for name, result in facts.results.items()}
    assert found == {"fine": "ok", "segfaults": "failed", "refuted": "no", "last": "ok"}
    assert facts.command.endswith(f"--output {tmp_path} --stages 4 2 4")
    for line in (
        "segfaults: does it segfaults? failed",
        "! killed by SIGSEGV",
        "ratio: 1.9",
        "refuted    no",
        f"Written to {tmp_path / NAME}",
    ):
        assert line in out.getvalue()


def test_an_answer_of_no_is_no_failure_and_spares_what_needs_yes(tmp_path: Path):
    checks = [
        check("fine"),
        check("refuted"),
        check("segfaults", needs=("refuted",)),
        check("fine", name="other", needs=("fine",)),
    ]
    assert main(["--output", str(tmp_path)], io.StringIO(), checks) == 0
    results = read_facts(tmp_path / NAME).results
    assert results["segfaults"] == Result("skipped", "no", error=("needs refuted",))
    assert results["other"].status == "ok"


def test_a_check_that_failed_does_not_spare_others(tmp_path: Path):
    checks = [check("fine"), check("raises"), check("fine", name="other", needs=("raises",))]
    assert main(["--output", str(tmp_path)], io.StringIO(), checks) == 1
    assert read_facts(tmp_path / NAME).results["other"].status == "ok"


def test_no_device_ends_it_and_writes_nothing(tmp_path: Path):
    out = io.StringIO()
    folder = tmp_path / "new"
    assert main(["--output", str(folder)], out, [check("refuted"), check("fine")]) == 3
    assert not folder.exists()
    assert out.getvalue().endswith("nothing else was checked and nothing was written.\n")


def test_a_device_check_that_crashes_is_no_missing_device(tmp_path: Path):
    assert main(["--output", str(tmp_path)], io.StringIO(), [check("raises"), check("fine")]) == 1
    assert read_facts(tmp_path / NAME).results["fine"].status == "ok"


def test_when_it_is_terminated_the_file_is_whole_and_the_check_is_gone(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("FAKE_CHILD", str(tmp_path / "pid"))
    program = (
        "import runpy, sys, ddg_gpu.cuda_checks as catalogue; from ddg_gpu.isolated import Check;"
        "catalogue.CHECKS = (Check('fine', '', 'fake_checks:fine'),"
        " Check('hangs', '', 'fake_checks:hangs'));"
        f"sys.argv = ['first_contact', '--output', {str(tmp_path)!r}];"
        "runpy.run_module('ddg_gpu.first_contact', run_name='__main__')"
    )
    command = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        command.send_signal(signal.SIGTERM)
        assert command.wait(30) == 128 + signal.SIGTERM
    finally:
        command.kill()
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    facts = read_facts(tmp_path / NAME)
    assert not facts.complete
    assert facts.results["fine"].status == "ok"
    assert facts.results["hangs"].error == ("not its turn yet",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "1"], "argument --stages: must be whole numbers from 2 to 1024, got '1'"),
        (["--stages", "two"], "got 'two'"),
        (["--limit", "0"], "argument --limit: must be a number of seconds above 0, got '0'"),
        (["--limit", "nan"], "got 'nan'"),
        (["--output", __file__], "is no folder that can be written to"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_wrong_arguments_are_told_before_anything_runs(arguments, message, capsys):
    assert main(arguments, io.StringIO(), [check("segfaults")]) == 2
    assert message in capsys.readouterr().err


def test_help_tells_the_exit_codes(capsys):
    assert main(["--help"], io.StringIO(), []) == 0
    assert "3 no GPU (nothing is written)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_the_command_without_a_gpu(tmp_path: Path):
    run = subprocess.run(
        [sys.executable, "-m", "ddg_gpu.first_contact", "--output", str(tmp_path / "facts")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert (run.returncode, run.stderr) == (3, "")
    assert "! " in run.stdout
    assert torch.__version__ in run.stdout
    assert not (tmp_path / "facts").exists()


LIGHT = """
import sys, ddg_gpu.first_contact
print(sorted({"torch", "numpy", "pydantic", "simpy", "typer", "rich"} & set(sys.modules)))
import ddg_gpu.cuda_device, ddg_gpu.cuda_placement, ddg_gpu.cuda_costs, ddg_gpu.cuda_steps
print(sorted({"pydantic", "simpy", "typer", "rich"} & set(sys.modules)))
"""


def test_it_needs_torch_and_the_standard_library_only():
    run = subprocess.run(
        [sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert run.stdout.split() == ["[]", "[]"], run.stderr


def test_every_check_has_its_function_and_needs_earlier_ones():
    names: list[str] = []
    for entry in CHECKS:
        module, _, function = entry.function.partition(":")
        assert callable(getattr(__import__(module, fromlist=[function]), function))
        assert set(entry.needs) <= set(names)
        names.append(entry.name)
    assert names[0] == "device"
    assert {"partitions", "graphs"} < set(names)  # what Facts asks by name
    assert next(c for c in CHECKS if c.name == "partitions").yes == "green-contexts"


FACTS = Facts(
    "2026-01-01T00:00:00+00:00",
    "python -m ddg_gpu.first_contact",
    (2, 4),
    120.0,
    {
        "partitions": Result("ok", "green-contexts", 3.5, {"SMs at 2": [8, 8]}),
        "graphs": Result("failed", "no", 1.0, {}, ("CUDA error: ü",)),
    },
    True,
)


def test_facts_come_back_as_written(tmp_path: Path):
    write_facts(FACTS, tmp_path / "f.json")
    facts = read_facts(tmp_path / "f.json")
    assert facts == FACTS
    assert (facts.partitions, facts.graphs) == ("green-contexts", False)
    assert facts.use("streams", "serial") == "serial"
    ok = replace(FACTS, results={"graphs": Result("ok", "yes")})
    assert (ok.partitions, ok.graphs) == ("none", True)


def edited(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "f.json"
    write_facts(FACTS, path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "x"}, "\"format\" must be 'ddg GPU facts, version 1', got 'x'"),
        ({"complete": 1}, '"complete" cannot be 1'),
        ({"stages": [2, "4"]}, "\"stages\" cannot be '4'"),
        ({"limit": True}, '"limit" cannot be True'),
        ({"results": []}, '"results" cannot be []'),
        ({"results": {"graphs": {}}}, "'status' is missing"),
        ({"results": {"graphs": {"status": "fine"}}}, '"status" of graphs must be one of ok, no'),
        ({"results": {"graphs": {"status": "ok", "use": None}}}, '"use" cannot be None'),
    ],
)
def test_wrong_facts_are_refused_in_one_line(tmp_path: Path, changes: dict, message: str):
    path = edited(tmp_path, **changes)
    with pytest.raises(FactsError) as error:
        read_facts(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\0"])
def test_files_that_are_no_facts(tmp_path: Path, text: str):
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(FactsError, match="f.json: "):
        read_facts(tmp_path / "f.json")
    with pytest.raises(FactsError, match="cannot be read: No such file"):
        read_facts(tmp_path / "none.json")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_check_answers_on_this_gpu(tmp_path: Path):
    out = io.StringIO()
    code = main(["--output", str(tmp_path), "--stages", "2", "--limit", "60"], out)
    assert code == 0, out.getvalue()
