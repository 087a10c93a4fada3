"""What the checks conclude, on a made-up GPU whose tensors are on the CPU.

Its times are given, not measured: nothing here says anything about hardware.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from ddg_gpu import cuda_costs, cuda_placement, cuda_steps, cuda_timing
from ddg_gpu.cuda_partitions import PartitionsUnavailableError
from ddg_gpu.isolated import RefutedError

SMS = 16


class Stream:
    """A stream with the multiprocessors that its kernels run on, and a clock of its own."""

    def __init__(self, sms: range = range(SMS)) -> None:
        self.sms = sms

    def wait_event(self, event: Any) -> None:
        pass


class Gpu(TorchFunctionMode):
    """Stands in for torch.cuda; knobs say how it misbehaves."""

    def __init__(self) -> None:
        super().__init__()
        self.current = self.plain = Stream()
        self.shared = 0  # multiprocessors that neighbouring partitions share
        self.graphs_keep = True
        self.refuses: tuple[int, ...] = ()
        self.open = 0  # partitions now
        self.lost = False  # whether replays do nothing

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        args = ["cpu" if isinstance(a, str) and a == "cuda" else a for a in args]
        return function(*args, **kwargs)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def partitioned(self, count: int) -> Iterator[list[Any]]:
        if count in self.refuses:
            raise PartitionsUnavailableError(f"no {count}")
        size, self.open = SMS // count, self.open + count
        parts = []
        for k in range(count):
            part = Part(range(k * size, min(SMS, (k + 1) * size + self.shared)))
            parts.append(part)
        try:
            yield parts
        finally:
            self.open -= count

    def launch(self, seen: torch.Tensor, cycles: int) -> None:
        sms = self.current.sms
        seen.copy_(torch.tensor([sms[i % len(sms)] for i in range(seen.numel())]))

    def capture(self, stream: Stream, work: Callable[[], object], units: int = 1) -> Any:
        return Load(self, stream, work, units)


class Part:
    def __init__(self, sms: range) -> None:
        self.sms, self._stream = len(sms), Stream(sms)

    def torch_stream(self) -> Stream:
        return self._stream


class Load:
    def __init__(self, gpu: Gpu, stream: Stream, work: Callable[[], object], units: int) -> None:
        self.gpu, self.stream, self.work, self.units = gpu, stream, work, units
        self.graph = self
        with gpu.on(stream):
            work()

    def replay(self) -> None:
        if not self.gpu.lost:
            with self.gpu.on(self.stream if self.gpu.graphs_keep else self.gpu.plain):
                for _ in range(self.units):
                    self.work()


class Event:
    """One that never has come by itself, and knows 4 ms between any two."""

    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Any) -> float:
        return 4.0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    gpu = Gpu()
    properties = type("Properties", (), {"multi_processor_count": SMS, "L2_cache_size": 1024})()
    for name, value in {
        "init": lambda: None,
        "synchronize": lambda: None,
        "Stream": Stream,
        "Event": Event,
        "stream": gpu.on,
        "_sleep": lambda cycles: None,
        "get_device_properties": lambda device: properties,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(cuda_timing, "partitioned", gpu.partitioned)
    for module in (cuda_placement, cuda_steps):
        monkeypatch.setattr(module, "capture", gpu.capture)
    monkeypatch.setattr(cuda_timing, "capture", gpu.capture)
    monkeypatch.setattr(cuda_timing, "UNITS", 2)
    monkeypatch.setattr(cuda_costs, "SIZES", (4096,))
    monkeypatch.setattr(cuda_costs, "SIDE", 4)
    monkeypatch.setattr(cuda_placement, "smid_kernel", lambda: (gpu.launch, "made up"))
    driver = (object(), "made up")
    monkeypatch.setattr(cuda_placement, "load_driver", lambda: driver)
    monkeypatch.setattr(cuda_placement, "call", lambda *a: 0)
    whole = type("Resource", (), {"sm": type("Sm", (), {"smCount": SMS})()})()
    monkeypatch.setattr(cuda_placement, "sm_resource", lambda *a: whole)
    with gpu:
        yield gpu
    assert gpu.open == 0


class Notes(dict[str, Any]):
    def __call__(self, name: str, value: Any) -> None:
        self[name] = json.loads(json.dumps(value, allow_nan=False))


def test_partitions_that_are_apart(gpu: Gpu):
    notes = Notes()
    cuda_placement.partitions([2, 4], notes)
    assert notes["SMs at 4"] == [4] * 4
    assert notes["SMs seen at 2"] == [list(range(8)), list(range(8, 16))]
    assert notes["SMs seen without partitions"] == list(range(16))
    assert notes["kernel compiled by"] == "made up"


def test_partitions_that_overlap_are_refuted(gpu: Gpu):
    gpu.shared = 1
    with pytest.raises(RefutedError, match=r"at 2: partitions 0 and 1 share the SMs \[8\]"):
        cuda_placement.partitions([2, 4], Notes())


def test_graphs_that_leave_their_partition_are_refuted(gpu: Gpu):
    notes = Notes()
    cuda_placement.graph_partitions([2], notes)
    assert notes["SMs seen at 2, replayed on its own stream"][1] == list(range(8, 16))
    gpu.graphs_keep = False
    with pytest.raises(RefutedError, match="at 2: "):
        cuda_placement.graph_partitions([2], Notes())


def test_a_graph_that_writes_nothing_is_a_failure(gpu: Gpu):
    gpu.lost = True
    with pytest.raises(RuntimeError, match="blocks of the kernel wrote nothing"):
        cuda_placement.graph_partitions([2], notes := Notes())
    assert "wrote nothing" in notes["error at 2"]


def test_numbers_of_partitions_that_cannot_be_had(gpu: Gpu):
    gpu.refuses = (8,)
    notes = Notes()
    cuda_placement.partitions([2, 8], notes)
    assert notes["unavailable at 8"] == "no 8"
    gpu.refuses = (2, 8)
    with pytest.raises(RefutedError, match="at 2: no 2\nat 8: no 8"):
        cuda_placement.partitions([2, 8], Notes())


@pytest.mark.parametrize(("together", "refuted"), [(1.2, False), (1.9, True)])
def test_concurrency_is_the_ratio(gpu: Gpu, monkeypatch, together: float, refuted: bool):
    times = {1: 1.0, 2: together}
    monkeypatch.setattr(cuda_costs, "wall_time", lambda queue, repeats: times[len(queue)])
    notes = Notes()
    if refuted:
        with pytest.raises(RefutedError, match="at 2: together they take 1.90 times as long"):
            cuda_costs.concurrency([2], notes)
    else:
        cuda_costs.concurrency([2], notes)
    assert notes["seconds alone at 2"] == [1, 1]
    assert notes["ratio at 2"] == together


def test_interference_of_each_kind_with_each(gpu: Gpu):
    notes = Notes()
    cuda_costs.interference([2], notes)
    assert notes["memory at 2, seconds alone"] == 4e-3
    beside = {name: value["ratio"] for name, value in notes.items() if "beside" in name}
    assert len(beside) == 4
    assert set(beside.values()) == {1}


def test_transfers_count_every_hop(gpu: Gpu, monkeypatch):
    notes = Notes()
    cuda_costs.transfers([2], notes)
    seconds = 4e-3 / cuda_costs.HOPS
    assert notes["4096 bytes at 2"] == pytest.approx(
        {"seconds per hop": seconds, "bytes per second": 4096 / seconds}
    )
    add = torch.add

    def early(source: torch.Tensor, one: int, out: torch.Tensor) -> None:  # reads before it may
        add(source - 1 if float(source[0]) == 50 else source, one, out=out)

    monkeypatch.setattr(torch, "add", early)
    with pytest.raises(RefutedError, match="4096 bytes: a partition read before"):
        cuda_costs.transfers([2], Notes())


def test_transfers_that_began_too_early_are_no_figure(gpu: Gpu, monkeypatch):
    monkeypatch.setattr(Event, "query", lambda self: True)
    with pytest.raises(RuntimeError, match="hops began before all were queued"):
        cuda_costs.transfers([2], Notes())


@pytest.mark.parametrize(("eager", "refuted"), [(1.1, False), (2.0, True)])
def test_streams_overlap_or_not(gpu: Gpu, monkeypatch, eager: float, refuted: bool):
    both = iter([1.0, 1.0, 1.0, eager, 1.0, 1.0])  # one and both, for each case
    monkeypatch.setattr(cuda_costs, "wall_time", lambda queue, repeats: next(both))
    notes = Notes()
    if refuted:
        with pytest.raises(RefutedError, match="take 2.00 times as long as on one"):
            cuda_costs.streams([2], notes)
    else:
        cuda_costs.streams([2], notes)
    assert notes["small eager kernels"]["ratio"] == eager


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_graph_gives_the_gradients_of_eager_code(gpu: Gpu, monkeypatch):
    monkeypatch.setattr(cuda_steps, "REPEATS", 1)
    monkeypatch.setattr(cuda_steps, "wall_time", lambda queue, repeats: 1.0)
    notes = Notes()
    cuda_steps.graphs([2], notes)
    assert float(notes["largest relative difference"]) == 0
    assert "kernels and copies per step" in notes
    gpu.lost = True
    with pytest.raises(RefutedError, match="replayed graph differ by nan"):
        cuda_steps.graphs([2], Notes())


def test_determinism_compares_replays_and_streams(gpu: Gpu, monkeypatch):
    monkeypatch.setattr(cuda_steps, "STEPS", 2)
    notes = Notes()
    cuda_steps.determinism([2, 4], notes)
    assert notes["same bits, default"] == {
        "on the same stream": True,
        "on the other stream": True,
        "largest difference": 0,
    }
    gpu.refuses = (2,)
    cuda_steps.determinism([2], notes)
    assert notes["streams"] == "two plain ones"
    train_twice, drift = cuda_steps._train_twice, iter(range(100))
    monkeypatch.setattr(
        cuda_steps, "_train_twice", lambda s: [ends + next(drift) for ends in train_twice(s)]
    )
    with pytest.raises(RefutedError, match="not the same bits"):
        cuda_steps.determinism([2], Notes())


def test_the_small_stage_is_the_same_each_time():
    first, second = (cuda_steps.small_stage("cpu") for _ in range(2))
    assert len(first[1]()) == 1 + len(first[0]) == 13
    assert all(map(torch.equal, first[1](), second[1]()))


def test_the_kernel_compiles_where_the_compiler_is():
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings")
    from ddg_gpu.smid import ptx

    assert b"%smid" in ptx("compute_90")
