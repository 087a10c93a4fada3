"""Processes: the same bits as in one process, and a bounded, explained end when one fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracles import Toy, ToyHead, toy_stages

from ddg_gpu import distributed
from ddg_gpu.data import load
from ddg_gpu.distributed import run_stages
from ddg_gpu.execute import run_serial
from ddg_gpu.job import Job
from ddg_gpu.processes import WorkerError, run_together
from ddg_gpu.stage import Stage
from ddg_gpu.train import train
from ddg_gpu.transport import GlooTransport
from ddg_sim.dependencies import validate
from ddg_sim.lowering import Message, slots
from ddg_sim.methods import Semantics, bp, ddg, method
from ddg_sim.notation import parse
from ddg_sim.schedule import OpKind, Schedule, Sync

OPTIMIZERS: dict[str, Any] = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": partial(torch.optim.Adam, lr=0.01, weight_decay=1e-3),
}
ITERATIONS = 8
LIMIT = 10.0  # seconds in which a failure must end the whole run


def toy_boundaries(num_stages: int) -> list[torch.Size]:
    value, shapes = Toy().inputs(0), []
    for stage in toy_stages(num_stages):
        value = stage.eval()(value)
        shapes.append(value.shape)
    return shapes


def toy_task(
    schedule: Schedule, optimizer: str, rank: int, given: dict[str, Any], report: Any
) -> dict[str, Any]:
    module = toy_stages(schedule.num_stages)[rank]
    stage = Stage(module, rank, schedule, OPTIMIZERS[optimizer], head=ToyHead())
    boundaries = toy_boundaries(schedule.num_stages)

    def buffer(message: Message) -> torch.Tensor:
        return torch.empty(boundaries[min(message.source, message.target)])

    record = run_stages(schedule, rank, {rank: stage}, Toy(), buffer, ITERATIONS, timeout=30)
    return {
        "state": stage.module.state_dict(),
        "spans": [(str(op), start, end) for op, start, end in record.spans],
        "losses": stage.losses,
        "held": stage.held,
    }


def two_stages_per_worker_task(rank: int, given: dict[str, Any], report: Any) -> dict[str, Any]:
    schedule = parse(TWO_STAGES_PER_WORKER)
    modules = toy_stages(4)
    mine = {k: Stage(modules[k], k, schedule, OPTIMIZERS["sgd"]) for k in (rank, rank + 2)}
    boundaries = toy_boundaries(4)

    def buffer(message: Message) -> torch.Tensor:
        return torch.empty(boundaries[min(message.source, message.target)])

    run_stages(schedule, rank, mine, Toy(), buffer, ITERATIONS, timeout=30)
    return {"state": {k: stage.module.state_dict() for k, stage in mine.items()}}


TWO_STAGES_PER_WORKER = """\
ddg stages=4 sync=none activations=graph jacobian=stashed samples=1
worker 0: F0(t) B2(t-1) U2(t-1) F2(t) B0(t-3) U0(t-3)
worker 1: F1(t) B3(t-1) U3(t-1) F3(t) B1(t-2) U1(t-2)"""


def test_workers_may_hold_several_stages() -> None:
    schedule = parse(TWO_STAGES_PER_WORKER)
    validate(schedule)
    modules = toy_stages(4)
    stages = [Stage(m, k, schedule, OPTIMIZERS["sgd"]) for k, m in enumerate(modules)]
    run_serial(schedule, stages, Toy(), ITERATIONS)
    results = run_together(two_stages_per_worker_task, 2, {})
    states = {k: state for result in results for k, state in result["state"].items()}
    for k, module in enumerate(modules):
        own = module.state_dict()
        assert all(torch.equal(own[name], states[k][name]) for name in own)


def kept_task(rank: int, given: dict[str, Any], report: Any) -> dict[str, Any]:
    """Count how many sent tensors the transport keeps while a run goes on."""
    schedule, kept = ddg(3), []

    class Watched(GlooTransport):
        def send(self, message: Message, tensor: torch.Tensor) -> None:
            super().send(message, tensor)
            kept.append(max(self.kept.values()))

    distributed.GlooTransport = Watched  # type: ignore[misc]
    stage = Stage(toy_stages(3)[rank], rank, schedule, OPTIMIZERS["sgd"])
    boundaries = toy_boundaries(3)

    def buffer(message: Message) -> torch.Tensor:
        return torch.empty(boundaries[min(message.source, message.target)])

    run_stages(schedule, rank, {rank: stage}, Toy(), buffer, 40, timeout=30)
    return {"kept": kept}


def test_no_more_sent_tensors_are_kept_than_there_are_ring_slots() -> None:
    most = max(slots(ddg(3)))
    for result in run_together(kept_task, 3, {}):
        assert len(result["kept"]) >= 40
        assert max(result["kept"]) <= most


CASES = [
    *((ddg(num_stages), name) for num_stages in (1, 2, 3, 4) for name in OPTIMIZERS),
    *((bp(num_stages), "sgd") for num_stages in (2, 4)),
    *((ddg(3, sync, semantics), "sgd") for sync in Sync for semantics in Semantics),
    (method("zb-h1", 3), "sgd"),
    (method("pipedream-2bw", 2), "adam"),
    (method("dgl", 3), "sgd"),
    (method("pb", 3, spike=True, predict=True), "sgd"),
    (method("pipemare", 2, anneal=4.0, decay=0.5), "adam"),
    (method("xpipe", 3), "adam"),
    (method("sideways", 2), "sgd"),
]


@pytest.mark.parametrize(("schedule", "optimizer"), CASES)
def test_processes_give_the_same_bits_as_one_process(schedule: Schedule, optimizer: str) -> None:
    modules = toy_stages(schedule.num_stages)
    stages = [
        Stage(m, k, schedule, OPTIMIZERS[optimizer], head=ToyHead()) for k, m in enumerate(modules)
    ]
    run_serial(schedule, stages, Toy(), ITERATIONS)
    results = run_together(partial(toy_task, schedule, optimizer), schedule.num_stages, {})
    for stage, result in zip(stages, results, strict=True):
        own = stage.module.state_dict()
        assert own.keys() == result["state"].keys()
        assert all(torch.equal(own[name], result["state"][name]) for name in own)
        assert result["held"] == stage.held
        assert result["losses"] == stage.losses
    assert len(results[-1]["losses"]) == ITERATIONS * schedule.samples_per_iteration


@pytest.mark.parametrize("name", ["bp", "ddg", "dgl"])
def test_a_real_network_on_real_data_ends_with_the_same_fingerprint(name: str) -> None:
    job = Job(name, 3, "resnet8", iterations=6)
    digits = load("digits")
    serial, distributed = train(job, digits), train(job, digits, "distributed")
    assert serial is not None
    assert distributed is not None
    assert serial.weights_sha256 == distributed.weights_sha256
    assert serial.losses == distributed.losses
    assert serial.test_accuracy == distributed.test_accuracy


def test_an_epoch_of_micro_batches_ends_with_a_whole_update() -> None:
    # 1437 digits are 15 micro-batches of 100, so that two epochs are 30; 8 updates take 32.
    job = Job("gpipe", 2, "mlp", epochs=2, batch_size=100, options={"micro_batches": 4})
    run = train(job, load("digits"))
    assert run is not None
    assert (run.timeline.iterations, len(run.losses)) == (8, 32)


def test_a_ragged_last_batch_crosses_processes() -> None:
    # 1437 digits in batches of 700 leave a last batch of 37.
    job = Job("ddg", 2, "mlp", epochs=2, batch_size=700)
    digits = load("digits")
    serial, distributed = train(job, digits), train(job, digits, "distributed")
    assert serial is not None
    assert distributed is not None
    assert len(serial.losses) == 6
    assert serial.weights_sha256 == distributed.weights_sha256


def test_measured_timeline_obeys_the_dependencies_across_processes() -> None:
    run = train(Job("ddg", 3, "resnet8", iterations=10), load("digits"), "distributed")
    assert run is not None
    when = {(s.op.kind, s.op.stage, s.op.sample): s for s in run.timeline.spans if s.op is not None}
    assert len(when) == 3 * 3 * 10
    for (kind, stage, sample), span in when.items():
        if kind is OpKind.FORWARD and stage > 0:
            assert when[kind, stage - 1, sample].end <= span.start
        if kind is OpKind.BACKWARD and stage < 2:
            assert when[kind, stage + 1, sample].end <= span.start


def test_progress_reaches_the_parent() -> None:
    seen: list[tuple[int, int]] = []
    job = Job("ddg", 2, "resnet8", iterations=60, batch_size=256)
    train(job, load("digits"), "distributed", progress=lambda *now: seen.append(now))
    assert all(0 <= done <= total == 60 for done, total in seen)
    assert max(done for done, _ in seen) > 0


# --- Faults -------------------------------------------------------------------------------------


def failing_task(how: str, rank: int, given: dict[str, Any], report: Any) -> dict[str, Any]:
    """Rank 1 fails in some way while the others wait for it."""
    if rank == 1:
        if how == "raise":
            raise ArithmeticError("no such number")
        if how == "exit":
            os._exit(3)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if how == "interrupt":
            raise KeyboardInterrupt
    schedule = ddg(3)
    stage = Stage(toy_stages(3)[rank], rank, schedule, OPTIMIZERS["sgd"])
    boundaries = toy_boundaries(3)

    def buffer(message: Message) -> torch.Tensor:
        return torch.empty(boundaries[min(message.source, message.target)])

    run_stages(schedule, rank, {rank: stage}, Toy(), buffer, ITERATIONS, timeout=given["timeout"])
    return {}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "worker 1 failed: ArithmeticError: no such number"),
        ("exit", "worker 1 ended with exit code 3"),
        ("kill", "worker 1 was killed by SIGKILL"),
        ("interrupt", "worker 1 failed: KeyboardInterrupt"),
        ("stop", "did not answer within 2 s|Timed out|timed out"),
    ],
)
def test_a_failed_worker_ends_the_run_and_the_first_cause_is_named(how: str, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(WorkerError, match=message):
        run_together(partial(failing_task, how), 3, {"timeout": 2.0}, timeout=2.0)
    assert time.monotonic() - start < LIMIT


class BrokenAt(Toy):
    """Data that cannot be read any more from some sample on."""

    def inputs(self, sample: int) -> torch.Tensor:
        if sample == 5:
            raise OSError("the disk is gone")
        return super().inputs(sample)


def broken_data_task(rank: int, given: dict[str, Any], report: Any) -> dict[str, Any]:
    schedule = ddg(2)
    stage = Stage(toy_stages(2)[rank], rank, schedule, OPTIMIZERS["sgd"])
    boundaries = toy_boundaries(2)
    run_stages(
        schedule,
        rank,
        {rank: stage},
        BrokenAt(),
        lambda message: torch.empty(boundaries[0]),
        ITERATIONS,
        30,
    )
    return {}


def test_an_error_in_mid_training_is_the_cause_not_its_consequences() -> None:
    start = time.monotonic()
    with pytest.raises(WorkerError, match="worker 0 failed: OSError: the disk is gone"):
        run_together(broken_data_task, 2, {})
    assert time.monotonic() - start < LIMIT


def meeting_task(rank: int, given: dict[str, Any], report: Any) -> dict[str, Any]:
    dist.barrier()
    return {"pid": os.getpid()}


def late(rank: int, given: dict[str, Any], report: Any) -> dict[str, Any]:
    time.sleep(0.7)
    raise ArithmeticError("at last")


def test_a_failure_while_progress_is_shown_is_told() -> None:
    """When it was looked at again, all processes had ended."""
    with pytest.raises(WorkerError, match="worker 0 failed: ArithmeticError: at last"):
        run_together(late, 1, {}, progress=lambda done, total: time.sleep(2.0))


def test_a_port_in_use_is_refused() -> None:
    store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    with pytest.raises(ValueError, match=f"port {store.port} cannot be used"):
        run_together(meeting_task, 2, {}, port=store.port)


def test_a_chosen_free_port_is_used() -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert len({result["pid"] for result in run_together(meeting_task, 2, {}, port=port)}) == 2


# --- As a user runs it --------------------------------------------------------------------------


def ddg_process(*words: str, temporary: Path | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ddg_cli", *words],
        env=os.environ if temporary is None else {**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def descendants(pid: int) -> list[int]:
    """Processes below ``pid``, parents before children."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = list(parents.get(pid, []))
    for child in found:
        found.extend(parents.get(child, []))
    return found


def forked_workers(process: subprocess.Popen[str], count: int) -> list[int]:
    """Wait for the workers: they are children of the fork server."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for child in descendants(process.pid):
            grandchildren = descendants(child)
            if len(grandchildren) >= count:
                return grandchildren
        time.sleep(0.1)
    raise AssertionError("the workers did not start")


LONG_RUN = [
    *("train", "ddg", "--stages", "2", "--executor", "distributed"),
    *("--model", "resnet8", "--data", "digits", "--iterations", "100000"),
]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the workers through /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_killing_a_worker_ends_the_command(rank: int, tmp_path: Path) -> None:
    process = ddg_process(*LONG_RUN, "--save", str(tmp_path / "weights.pt"))
    try:
        workers = forked_workers(process, 2)
        time.sleep(2.0)  # into the training
        os.kill(workers[rank], signal.SIGKILL)
        start = time.monotonic()
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert time.monotonic() - start < LIMIT
    assert process.returncode == 1
    assert out == ""
    assert err.strip().splitlines()[-1].endswith("was killed by SIGKILL")
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the workers through /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_worker_outlives_the_command(how: signal.Signals, tmp_path: Path) -> None:
    process = ddg_process(*LONG_RUN, temporary=tmp_path)
    try:
        workers = forked_workers(process, 2)
        process.send_signal(how)
        process.communicate(timeout=30)
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            if not any(Path(f"/proc/{worker}").exists() for worker in workers):
                break
            time.sleep(0.1)
        else:
            raise AssertionError(f"workers {workers} are still there")
    finally:
        process.kill()
    codes = {signal.SIGINT: 130, signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGKILL: -9}
    assert process.returncode == codes[how]
    if how is not signal.SIGKILL:
        assert list(tmp_path.glob("ddg-*")) == []  # no data set is left behind


@pytest.mark.slow
def test_torchrun_runs_the_same_command(tmp_path: Path) -> None:
    words = ["train", "ddg", "--stages", "2", "--model", "mlp", "--data", "digits", "--json"]
    words += ["--iterations", "5"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    found = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", "-m", "ddg_cli", *words, "--executor", "distributed"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    plain = subprocess.run(
        [sys.executable, "-m", "ddg_cli", *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    import json

    assert json.loads(found.stdout)["weights_sha256"] == json.loads(plain.stdout)["weights_sha256"]
