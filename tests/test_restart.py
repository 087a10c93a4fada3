"""Snapshots: a run that was ended goes on bit for bit; whatever ends it does so in bounded time."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ddg_gpu.checkpoint import CheckpointError
from ddg_gpu.data import Dataset, load
from ddg_gpu.distributed import connection, dataset_values
from ddg_gpu.job import Job
from ddg_gpu.processes import WorkerError, run_together
from ddg_gpu.snapshots import Snapshots, newest, read
from ddg_gpu.train import Run, train
from ddg_gpu.worker import run_workers
from ddg_sim.methods import METHODS
from ddg_sim.schedule import Op, OpKind

LIMIT = 20.0  # seconds in which a failure must end a run
DIGITS = load("digits")


def job(method: str = "ddg", stages: int = 2, iterations: int = 11, **more: Any) -> Job:
    return Job(method, stages, "mlp", iterations, learning_rate=0.01, batch_size=32, **more)


def trained(*args: Any, **kwargs: Any) -> Run:
    run = train(*args, **kwargs)
    assert run is not None
    return run


#: What a method needs beside the job's usual model and three stages.
NEEDS: dict[str, dict[str, Any]] = {
    "interleaved": {"stages": 4},
    "ddg-replicas": {"method": "ddg", "options": {"replicas": 2}},
    "petra": {"model": "revnet16", "cuts": (1, 2)},
    "ouroboros": {"model": "gpt-tiny-tied", "batch_size": 4, "optimizer": "adam"},
}
TEXT = load("text")


@pytest.mark.parametrize("name", [*METHODS, "ddg-replicas"])
def test_a_resumed_run_equals_an_undisturbed_one(name: str, tmp_path: Path) -> None:
    long = replace(job(name, 3), **NEEDS.get(name, {}))
    data = TEXT if name == "ouroboros" else DIGITS
    whole = trained(long, data)
    at = Snapshots(tmp_path, every=4)
    trained(replace(long, iterations=6), data, snapshots=at)
    rest = trained(long, data, snapshots=at, resume=True)
    assert rest.weights_sha256 == whole.weights_sha256
    assert rest.losses == whole.losses
    # It went on from the snapshot, and did not begin again.
    assert min(op.iteration for _, op in rest.timeline.operations) == 6


@pytest.mark.parametrize("name", ["ddg", "petra", "ouroboros"])
def test_executors_read_one_anothers_snapshots(name: str, tmp_path: Path) -> None:
    long = replace(job(name, 3), **NEEDS.get(name, {}))
    data = TEXT if name == "ouroboros" else DIGITS
    whole = trained(long, data)
    at = Snapshots(tmp_path, every=3)
    trained(replace(long, iterations=4), data, "distributed", snapshots=at)
    trained(replace(long, iterations=8), data, snapshots=at, resume=True)
    last = trained(long, data, "distributed", snapshots=at, resume=True)
    assert last.weights_sha256 == whole.weights_sha256


@pytest.mark.parametrize(
    "more",
    [
        {"optimizer": "adam"},
        {"milestones": (3, 8), "clip_norm": 0.5},
        {"recompute": True, "precision": "bf16"},
    ],
)
def test_optimizers_and_schedules_go_on(more: dict[str, Any], tmp_path: Path) -> None:
    whole = trained(job(**more), DIGITS)
    trained(job(iterations=5, **more), DIGITS, snapshots=Snapshots(tmp_path))
    rest = trained(job(**more), DIGITS, snapshots=Snapshots(tmp_path), resume=True)
    assert rest.weights_sha256 == whole.weights_sha256


@pytest.mark.parametrize(
    ("name", "parts"), [("bp", {}), ("gpipe", {"micro_batches": 2}), ("dp", {"replicas": 2})]
)
def test_after_a_flush_other_stages_and_another_method_go_on(
    name: str, parts: dict[str, object], tmp_path: Path
) -> None:
    """Without delay, flushes change nothing: so bp on 3 stages after bp on 1 is bp on 1.

    Two micro-batches, or the mini-batches of two replicas, are the same samples.
    """
    whole = trained(job(name, 1, options=parts), DIGITS)
    at = Snapshots(tmp_path, every=3, flush=True)
    trained(job(name, 1, 5, options=parts), DIGITS, snapshots=at)
    trained(job(name, 3, 8, options=parts), DIGITS, snapshots=at, resume=True)
    other = job("gpipe", 2, options={"micro_batches": 2 if parts else 1})
    rest = trained(other, DIGITS, snapshots=at, resume=True)
    assert rest.weights_sha256 == whole.weights_sha256


def test_two_optimizers_of_one_weight_are_not_given_to_one(tmp_path: Path) -> None:
    at = Snapshots(tmp_path, flush=True)
    tied = replace(job("ouroboros", 2, 3), **NEEDS["ouroboros"])
    train(tied, TEXT, snapshots=at)
    with pytest.raises(CheckpointError, match="was made with tied True, this run has False"):
        train(replace(tied, method="bp", stages=1), TEXT, snapshots=at, resume=True)
    more = replace(tied, stages=4, iterations=6)
    assert trained(more, TEXT, snapshots=at, resume=True).iterations == 6


def test_flushed_runs_resume_where_they_were_flushed(tmp_path: Path) -> None:
    at = Snapshots(tmp_path / "whole", every=4, flush=True)
    whole = trained(job(), DIGITS, snapshots=at)
    assert whole.weights_sha256 != trained(job(), DIGITS).weights_sha256
    parts = replace(at, folder=tmp_path / "parts")
    trained(job(iterations=8), DIGITS, snapshots=parts)
    rest = trained(job(), DIGITS, "distributed", snapshots=parts, resume=True)
    assert rest.weights_sha256 == whole.weights_sha256


@pytest.mark.parametrize(
    ("before", "more"),
    [
        ("dgl", {"milestones": (2, 9)}),
        ("ddg", {"optimizer": "adam"}),
        ("ddg", {"precision": "bf16"}),
    ],
)
def test_new_heads_learn_as_the_rest_does(
    before: str, more: dict[str, Any], tmp_path: Path
) -> None:
    at = Snapshots(tmp_path, every=4, flush=True)
    first = trained(job(before, 2, 4, **more), DIGITS, snapshots=at)
    rest = trained(job("dgl", 3, **more), DIGITS, snapshots=at, resume=True)
    assert rest.losses[:4] == first.losses
    assert len(rest.losses) == 11
    path = newest(tmp_path)
    assert path is not None
    for index in range(3):
        records = read(path).values[f"stage {index}"]["trained"]["parameters"].values()
        rates = {record["options"]["lr"] for record in records}
        assert list(rates) == [pytest.approx(0.01 * 0.1 ** len(more.get("milestones", ())))]


def test_after_a_flush_ragged_batches_cross_processes(tmp_path: Path) -> None:
    """Of 1437 digits in batches of 300, the fifth is smaller: in each epoch, not of each flush."""
    ragged = Job("ddg", 2, "mlp", epochs=2, batch_size=300, learning_rate=0.01)
    found = {
        executor: trained(
            ragged, DIGITS, executor, snapshots=Snapshots(tmp_path / executor, 3, flush=True)
        ).weights_sha256
        for executor in ("serial", "distributed")
    }
    assert found["serial"] == found["distributed"]


def test_samples_in_flight_are_not_given_to_other_stages(tmp_path: Path) -> None:
    trained(job(iterations=4), DIGITS, snapshots=Snapshots(tmp_path))
    with pytest.raises(CheckpointError, match="has samples in flight.*--flush"):
        train(job(stages=3), DIGITS, snapshots=Snapshots(tmp_path), resume=True)
    with pytest.raises(CheckpointError, match="made with batch_size 32, this run has 16"):
        train(replace(job(), batch_size=16), DIGITS, snapshots=Snapshots(tmp_path), resume=True)
    with pytest.raises(CheckpointError, match="after iteration 4, this run ends with 3"):
        train(job(iterations=3), DIGITS, snapshots=Snapshots(tmp_path), resume=True)


def test_as_many_are_kept_as_was_said_and_nobody_overwrites_them(tmp_path: Path) -> None:
    train(job(), DIGITS, snapshots=Snapshots(tmp_path, every=2, keep=3))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iteration-10",
        "iteration-11",
        "iteration-8",
    ]
    with pytest.raises(ValueError, match="holds snapshots of a run: resume it"):
        train(job(), DIGITS, snapshots=Snapshots(tmp_path))


# --- Faults ---------------------------------------------------------------------------------------


def dying_task(
    how: str, kind: OpKind, at: Snapshots, rank: int, given: dict[str, Any], report: Any
) -> dict[str, Any]:
    """A worker that comes to grief in iteration 7, if it is its turn and has not done so before."""
    marker = Path(given["marker"])

    def watch(op: Op, _seconds: float) -> None:
        if rank != given["victim"] or op.kind is not kind or op.iteration != 7 or marker.exists():
            return
        marker.touch()
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "hang":
            time.sleep(3600)
        elif how == "disconnect":
            for name in os.listdir("/proc/self/fd"):
                if stat.S_ISSOCK(os.stat(f"/proc/self/fd/{name}").st_mode):
                    with socket.socket(fileno=os.dup(int(name))) as connection_:
                        connection_.shutdown(socket.SHUT_RDWR)

    outcome = run_workers(
        job(stages=3),
        Dataset(**given["dataset"]),
        connection(rank, given["timeout"]),
        [rank],
        watch,
        at,
        newest(at.folder),
    )
    return {"weights": outcome.weights}


@pytest.mark.parametrize(
    ("how", "victim", "kind"),
    [
        ("kill", 0, OpKind.FORWARD),
        ("kill", 1, OpKind.BACKWARD),
        ("kill", 2, OpKind.UPDATE),
        ("hang", 1, OpKind.FORWARD),
        ("disconnect", 1, OpKind.BACKWARD),
    ],
)
def test_a_fault_ends_the_run_soon_and_it_goes_on_bit_for_bit(
    how: str, victim: int, kind: OpKind, tmp_path: Path
) -> None:
    at = Snapshots(tmp_path / "snapshots", every=3)
    given = {
        "dataset": dataset_values(DIGITS),
        "marker": str(tmp_path / "marker"),
        "victim": victim,
        "timeout": 3.0,
    }
    task = partial(dying_task, how, kind, at)
    with pytest.raises(WorkerError, match="worker"):
        run_together(task, 3, given, timeout=3.0)
    assert time.time() - (tmp_path / "marker").stat().st_mtime < LIMIT
    found = newest(at.folder)
    assert found is not None
    assert read(found).iteration == 6
    results = run_together(task, 3, given)
    whole = trained(job(stages=3), DIGITS).model.state_dict()
    resumed = {name: tensor for result in results for name, tensor in result["weights"].items()}
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())


@pytest.mark.parametrize("how", ["missing", "truncated", "changed", "not JSON", "no manifest"])
def test_a_damaged_snapshot_is_named_and_the_one_before_is_taken(how: str, tmp_path: Path) -> None:
    train(job(iterations=6), DIGITS, snapshots=Snapshots(tmp_path, every=3))
    bad = tmp_path / "iteration-6"
    data = next(bad.glob("*.distcp"))
    if how == "missing":
        data.unlink()
    elif how == "truncated":
        data.write_bytes(data.read_bytes()[:-100])
    elif how == "no manifest":
        (bad / "manifest.json").unlink()
    elif how == "changed":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    else:
        (bad / "manifest.json").write_text("{")
    told: list[str] = []
    whole = trained(job(), DIGITS)
    rest = trained(job(), DIGITS, snapshots=Snapshots(tmp_path), resume=True, warn=told.append)
    assert rest.weights_sha256 == whole.weights_sha256
    assert len(told) == 1
    assert "iteration-6" in told[0]


def test_a_snapshot_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    train(job(iterations=3), DIGITS, snapshots=Snapshots(tmp_path / "run"))
    path = tmp_path / "run" / "iteration-3"
    (path / ".metadata").write_bytes(pickle.dumps(Evil()))
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"][".metadata"]  # as who makes the file would
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        read(path)
    assert not (tmp_path / "executed").exists()


def ddg(*words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ddg_cli", *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **more,
    )


def test_a_full_disk_ends_the_command_with_one_line(tmp_path: Path) -> None:
    """The limit on a file's size stands for the full disk."""
    words = (
        *("train", "ddg", "--stages", "2", "--model", "mlp", "--iterations", "6"),
        *("--checkpoints", str(tmp_path), "--every", "3"),
    )
    found = ddg(*words, preexec_fn=_small_files)
    assert found.returncode == 2
    assert (
        "iteration-3: cannot be written: a file could not be written whole: is the disk full?"
        in " ".join(found.stderr.split())
    )
    assert "Traceback" not in found.stderr
    assert list(tmp_path.iterdir()) == []


def _small_files() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


# --- As a user runs it ----------------------------------------------------------------------------

RUN = [
    *("train", "ddg", "--stages", "2", "--model", "mlp", "--data", "digits", "--json"),
    *("--executor", "distributed", "--iterations", "600", "--learning-rate", "0.005"),
]


def descendants(pid: int) -> list[int]:
    """Processes below ``pid``."""
    parents: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = status.read_text().rsplit(")", 1)[1].split()
            parents.setdefault(int(fields[1]), []).append(int(status.parent.name))
    found = list(parents.get(pid, []))
    for child in found:
        found.extend(parents.get(child, []))
    return found


def disturbed(command: list[str], folder: Path, how: signal.Signals, victims: int) -> Any:
    """Run a command, and send a signal to a worker once there is a checkpoint."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 90
        while newest_name(folder) is None and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        leaves = [pid for pid in descendants(process.pid) if not descendants(pid)]
        os.kill(sorted(leaves)[-victims], how)
        out, err = process.communicate(timeout=90)
    finally:
        for pid in [*descendants(process.pid), process.pid]:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
    assert process.returncode == 0, err
    return json.loads(out), err


def newest_name(folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob("iteration-*/manifest.json"))), None)


@pytest.fixture(scope="module")
def undisturbed() -> str:
    words = [word for word in RUN if word not in ("--executor", "distributed")]
    found = ddg(*words)
    assert found.returncode == 0, found.stderr
    return str(json.loads(found.stdout)["weights_sha256"])


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_run_goes_on_by_itself(how: signal.Signals, tmp_path: Path, undisturbed: str) -> None:
    more = ["--checkpoints", str(tmp_path), "--every", "40", "--restarts", "1", "--timeout", "3"]
    command = [sys.executable, "-m", "ddg_cli", *RUN, *more]
    found, err = disturbed(command, tmp_path, how, victims=1)
    assert found["weights_sha256"] == undisturbed
    assert "going on from" in " ".join(err.split())


@pytest.mark.slow
def test_torchrun_restarts_and_the_run_goes_on(tmp_path: Path, undisturbed: str) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "2"),
        *("--nproc-per-node", "2", "-m", "ddg_cli", *RUN),
        *("--checkpoints", str(tmp_path), "--every", "40", "--timeout", "10"),
    ]
    found, _ = disturbed(command, tmp_path, signal.SIGKILL, victims=1)
    assert found["weights_sha256"] == undisturbed


def test_tied_stages_log_their_own_updates_only(tmp_path: Path) -> None:
    text, at = load("text"), Snapshots(tmp_path / "run", every=2)
    for iterations in (3, 5):  # the first run goes on to drain what the second one repeats
        tied = Job("ouroboros", 3, "gpt-tiny-tied", iterations, batch_size=4)
        train(tied, text, snapshots=at, resume=True, log=tmp_path / "log")
    for stage in (1, 2, 3):
        lines = (tmp_path / "log" / f"stage-{stage}.jsonl").read_text().splitlines()
        assert [json.loads(line)["update"] for line in lines] == [1, 2, 3, 4, 5]


def test_what_was_just_written_stays_beside_a_damaged_later_one(tmp_path: Path) -> None:
    at = Snapshots(tmp_path, every=2)
    train(job(iterations=4), DIGITS, snapshots=at)
    next((tmp_path / "iteration-4").glob("*.distcp")).unlink()
    at = replace(at, every=1, keep=1)
    train(job(iterations=3), DIGITS, snapshots=at, resume=True, warn=lambda text: None)
    assert newest(tmp_path) == tmp_path / "iteration-3"
    assert [path.name for path in tmp_path.iterdir()] == ["iteration-3"]


def test_options_that_need_checkpoints_say_so(tmp_path: Path) -> None:
    for option in (["--resume"], ["--restarts", "1"], ["--flush"]):
        found = ddg(*RUN[:8], "--iterations", "2", *option)
        assert found.returncode == 2
        assert f"{option[0]} needs --checkpoints FOLDER" in found.stderr


def test_the_log_has_a_line_per_update_and_goes_on(tmp_path: Path) -> None:
    at = Snapshots(tmp_path / "run", every=4)
    train(job(iterations=6), DIGITS, snapshots=at, log=tmp_path / "log")
    shutil.rmtree(tmp_path / "run" / "iteration-6")  # so it goes on from 4
    run = trained(job(), DIGITS, snapshots=at, resume=True, log=tmp_path / "log")
    for stage, staleness in ((1, 1), (2, 0)):
        text = (tmp_path / "log" / f"stage-{stage}.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        assert [row["update"] for row in rows] == list(range(1, 12))
        assert rows[-2]["staleness"] == staleness
        assert rows[5]["seconds"].keys() == {"forward", "backward", "update"}
        assert rows[5]["peak_rss"] > 1e6
        assert [row["loss"] for row in rows] == (
            [None] * 11 if stage == 1 else [pytest.approx(loss) for loss in run.losses]
        )


def test_a_loss_that_is_not_finite_ends_the_run_or_is_skipped(tmp_path: Path) -> None:
    words = ("train", "ddg", "--stages", "2", "--model", "mlp", "--iterations", "12", "--json")
    found = ddg(*words, "--learning-rate", "1e30")
    assert found.returncode == 1
    assert "stage 1 (of 2), sample" in found.stderr
    assert "the loss is" in found.stderr
    found = ddg(*words, "--learning-rate", "1e30", "--non-finite", "skip")
    assert found.returncode == 0
    assert json.loads(found.stdout)["skipped"] > 0
    found = ddg(*words, "--learning-rate", "1e30", "--non-finite", "skip", "--log", str(tmp_path))
    assert '"loss": null' in (tmp_path / "stage-2.jsonl").read_text()
    assert "NaN" not in (tmp_path / "stage-2.jsonl").read_text()
