"""Results replace regular files only, whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ddg_cli.main import main
from ddg_sim.files import replacing

TRAIN = ("train", "ddg", "--stages", "2", "--model", "mlp")


def fail_after_half(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half")
        raise ArithmeticError


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(words)
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ArithmeticError):
        fail_after_half(path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.txt", "old")]


def test_a_link_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "target.txt", tmp_path / "link.txt"
    target.write_text("old")
    link.symlink_to(target)
    with replacing(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_a_pipe_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="no regular file"), replacing(pipe):
        pass
    code, out, err = run(capsys, "simulate", "ddg", "--stages", "2", "--trace", str(pipe))
    assert (code, out) == (2, "")
    assert "--trace" in err
    assert "device or pipe" in err
    assert pipe.is_fifo()


@pytest.mark.parametrize(
    "words",
    [
        ("--trace", "same.svg", "--plot", "same.svg"),
        ("--profile", "same.svg", "--plot", "./same.svg"),
    ],
)
def test_two_options_must_not_name_one_file(
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "simulate", "ddg", "--stages", "2", *words)
    assert (code, out) == (2, "")
    assert "both name" in err
    assert list(tmp_path.iterdir()) == []


def test_a_diverged_run_is_said_to_be_one(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TRAIN, "--iterations", "6", "--learning-rate", "1e9", "--json"]
    code, out, err = run(capsys, *words)
    assert (code, out) == (1, "")
    assert "stage 1 (of 2), sample" in err
    assert "diverged" in err


@pytest.mark.parametrize("seconds", ["0.001", "0", "inf", "nan"])
def test_a_timeout_must_leave_time_to_meet(
    seconds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TRAIN, "--iterations", "1", "--executor", "distributed"]
    code, out, err = run(capsys, *words, "--timeout", seconds)
    assert (code, out) == (2, "")
    assert "timeout" in err
    assert len(err.strip().splitlines()) == 1
