"""The driver calls behind partitions, with drivers that are made up: no GPU is needed."""

from __future__ import annotations

import ctypes
import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddg_gpu import cuda_partitions
from ddg_gpu.cuda_partitions import (
    CudaCallError,
    LibCuda,
    PartitionsUnavailableError,
    Resource,
    call,
    load_driver,
    partitioned,
    split,
)


class FakeDriver:
    """A driver in the manner of cuda.bindings that records what it is asked.

    Splits are rounded up to ``grain`` SMs. ``codes`` are errors by the function that returns them.
    """

    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM="SM")

    def __init__(self, sms: int = 132, grain: int = 8, **codes: int) -> None:
        self.sms, self.grain, self.codes = sms, grain, codes
        self.asked: list[tuple[Any, ...]] = []
        self.handles = 100

    def answer(self, name: str, arguments: tuple[Any, ...], *values: Any) -> tuple[Any, ...]:
        self.asked.append((name, *arguments))
        code = self.codes.get(name, 0)
        return (code, *(None for _ in values)) if code else (0, *values)

    def handle(self) -> int:
        self.handles += 1
        return self.handles

    def cuInit(self, *a: Any) -> Any:
        return self.answer("cuInit", a)

    def cuDeviceGet(self, *a: Any) -> Any:
        return self.answer("cuDeviceGet", a, 0)

    def cuDeviceGetDevResource(self, *a: Any) -> Any:
        return self.answer("cuDeviceGetDevResource", a, resource(self.sms))

    def cuDevSmResourceSplitByCount(self, groups: int, whole: Any, flags: int, size: int) -> Any:
        size = -(-size // self.grain) * self.grain
        granted = min(groups, self.sms // size)
        return self.answer(
            "cuDevSmResourceSplitByCount",
            (groups, whole.sm.smCount, flags, size),
            [resource(size) for _ in range(groups)],
            granted,
            resource(self.sms - granted * size),
        )

    def cuDevResourceGenerateDesc(self, *a: Any) -> Any:
        return self.answer("cuDevResourceGenerateDesc", a, self.handle())

    def cuGreenCtxCreate(self, *a: Any) -> Any:
        return self.answer("cuGreenCtxCreate", a, self.handle())

    def cuGreenCtxStreamCreate(self, *a: Any) -> Any:
        return self.answer("cuGreenCtxStreamCreate", a, self.handle())

    def cuGreenCtxDestroy(self, *a: Any) -> Any:
        return self.answer("cuGreenCtxDestroy", a)

    def cuStreamDestroy(self, *a: Any) -> Any:
        return self.answer("cuStreamDestroy", a)

    def cuGetErrorName(self, code: int) -> Any:
        return (0, b"CUDA_ERROR_NOT_SUPPORTED") if code == 801 else (1, None)

    def cuGetErrorString(self, code: int) -> Any:
        return (0, b"operation not supported") if code == 801 else (1, None)

    def names(self, start: str) -> list[tuple[Any, ...]]:
        return [entry for entry in self.asked if entry[0].startswith(start)]


def resource(sms: int) -> Any:
    return SimpleNamespace(sm=SimpleNamespace(smCount=sms))


def test_calls_and_their_arguments():
    driver = FakeDriver(sms=16, grain=4)
    with partitioned(2, device=0, driver=driver) as made:
        assert [partition.sms for partition in made] == [8, 8]
        assert driver.names("cuDevSm") == [("cuDevSmResourceSplitByCount", 2, 16, 0, 8)]
        # description 101, context 102, stream 103; then 104, 105, 106
        assert driver.names("cuGreenCtxCreate") == [
            ("cuGreenCtxCreate", 101, 0, 1),
            ("cuGreenCtxCreate", 104, 0, 1),
        ]
        assert driver.names("cuGreenCtxStreamCreate") == [
            ("cuGreenCtxStreamCreate", 102, 1, 0),
            ("cuGreenCtxStreamCreate", 105, 1, 0),
        ]
        assert [partition.stream for partition in made] == [103, 106]
        assert not driver.names("cuStreamDestroy")
    assert driver.asked[-4:] == [
        ("cuStreamDestroy", 106),
        ("cuGreenCtxDestroy", 105),
        ("cuStreamDestroy", 103),
        ("cuGreenCtxDestroy", 102),
    ]
    assert [len(entry[1]) for entry in driver.names("cuDevResourceGenerateDesc")] == [1, 1]


@given(st.integers(1, 200), st.sampled_from([1, 2, 4, 8]), st.integers(1, 16))
def test_the_split_is_the_largest_that_gives_enough_groups(sms: int, grain: int, count: int):
    driver = FakeDriver(sms, grain)
    best = sms // count // grain * grain  # by arithmetic; the code only asks the driver
    if best == 0:
        with pytest.raises(
            PartitionsUnavailableError, match=f"cannot be split into {count} groups"
        ):
            split(driver, 0, count)
    else:
        assert [group.sm.smCount for group in split(driver, 0, count)] == [best] * count


def test_sizes_that_the_hardware_refuses_are_passed_over():
    class Choosy(FakeDriver):
        def cuDevSmResourceSplitByCount(self, *arguments: Any) -> Any:
            if arguments[-1] > 10:
                return 915, None, None, None
            return super().cuDevSmResourceSplitByCount(*arguments)

    assert [group.sm.smCount for group in split(Choosy(grain=1), 0, 4)] == [10] * 4


@pytest.mark.parametrize(
    "name",
    [
        "cuInit",
        "cuDeviceGet",
        "cuDeviceGetDevResource",
        "cuDevSmResourceSplitByCount",
        "cuDevResourceGenerateDesc",
        "cuGreenCtxCreate",
        "cuGreenCtxStreamCreate",
    ],
)
def test_an_error_names_the_call_and_what_was_made_is_given_back(name: str):
    driver = FakeDriver(**{name: 801})
    reason = rf"^{name}: CUDA_ERROR_NOT_SUPPORTED \(801\): operation not supported; .* CUDA 12.4"
    with pytest.raises(PartitionsUnavailableError, match=reason), partitioned(2, driver=driver):
        pytest.fail("entered")
    created = sum(entry[0] == "cuGreenCtxCreate" for entry in driver.asked)
    destroyed = len(driver.names("cuGreenCtxDestroy"))
    assert destroyed == (0 if name == "cuGreenCtxCreate" else created)


def test_partitions_are_given_back_after_an_error_of_their_user():
    driver = FakeDriver()
    with pytest.raises(ZeroDivisionError), partitioned(4, driver=driver):
        raise ZeroDivisionError
    assert len(driver.names("cuGreenCtxDestroy")) == 4


def test_errors_of_giving_back_do_not_hide_the_first_one():
    driver = FakeDriver(cuGreenCtxDestroy=700, cuStreamDestroy=700)
    with pytest.raises(ZeroDivisionError), partitioned(2, driver=driver):
        raise ZeroDivisionError


def test_count_must_be_positive():
    with (
        pytest.raises(ValueError, match="count must be at least 1, got 0"),
        partitioned(0, driver=FakeDriver()),
    ):
        pytest.fail("entered")


def test_what_a_driver_lacks_or_does_not_explain():
    with pytest.raises(CudaCallError, match="cuInit is missing"):
        call(SimpleNamespace(), "cuInit", 0)
    with pytest.raises(CudaCallError, match=r"^cuX: CUDA error \(3\)$") as error:
        call(SimpleNamespace(cuX=lambda: (3,)), "cuX")
    assert error.value.code == 3
    with pytest.raises(CudaCallError, match="cuX returned 2 values where 3 are known"):
        call(SimpleNamespace(cuX=lambda: (0, 1, 2)), "cuX", values=3)


class FakeLibrary:
    """libcuda for ctypes: each function gets C values and pointers, and fills the pointers."""

    def cuInit(self, flags: Any) -> int:
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 13000
        return 0

    def cuDeviceGet(self, device: Any, ordinal: Any) -> int:
        device._obj.value = ordinal.value
        return 0 if ordinal.value == 0 else 101

    def cuDeviceGetDevResource(self, device: Any, found: Any, kind: Any) -> int:
        assert kind.value == 1
        found._obj.type, found._obj.sm.smCount = 1, 132
        return 0

    def cuDevSmResourceSplitByCount(self, found, granted, whole, left, flags, size) -> int:  # type: ignore[no-untyped-def]
        assert (whole._obj.sm.smCount, flags.value) == (132, 0)
        rounded = -(-size.value // 8) * 8
        granted._obj.value = min(granted._obj.value, 132 // rounded)
        for k in range(granted._obj.value):
            found[k].type, found[k].sm.smCount = 1, rounded
        return 0

    def cuDevResourceGenerateDesc(self, description: Any, array: Any, count: Any) -> int:
        assert (len(array), count.value) == (1, 1)
        description._obj.value = 7000 + array[0].sm.smCount
        return 0

    def cuGreenCtxCreate(self, context: Any, description: Any, device: Any, flags: Any) -> int:
        assert (description.value, device.value, flags.value) == (7064, 0, 1)
        context._obj.value = 2**40
        return 0

    def cuGreenCtxStreamCreate(self, stream: Any, context: Any, flags: Any, priority: Any) -> int:
        assert (context.value, flags.value, priority.value) == (2**40, 1, 0)
        stream._obj.value = 2**41
        return 0

    def cuGreenCtxDestroy(self, context: Any) -> int:
        assert context.value == 2**40
        return 0

    def cuStreamDestroy_v2(self, stream: Any) -> int:
        assert stream.value == 2**41
        return 0

    def cuGetErrorName(self, code: Any, text: Any) -> int:
        text._obj.value = b"CUDA_ERROR_INVALID_DEVICE"
        return 0

    def cuGetErrorString(self, code: Any, text: Any) -> int:
        text._obj.value = b"invalid device ordinal"
        return 0


def test_partitions_through_ctypes():
    driver = LibCuda(FakeLibrary())
    assert call(driver, "cuDriverGetVersion") == 13000
    with partitioned(2, driver=driver) as made:  # 66 SMs each would be rounded up to 72
        assert [(partition.sms, partition.stream) for partition in made] == [(64, 2**41)] * 2
    with (
        pytest.raises(PartitionsUnavailableError, match=r"cuDeviceGet: CUDA_ERROR_INVALID_DEVICE"),
        partitioned(2, device=1, driver=driver),
    ):
        pytest.fail("entered")


def test_a_library_without_green_contexts():
    old = LibCuda(SimpleNamespace(cuInit=lambda f: 0, cuDeviceGet=FakeLibrary().cuDeviceGet))
    reason = "cuDeviceGetDevResource is missing .* need a driver of CUDA 12.4 or newer"
    with pytest.raises(PartitionsUnavailableError, match=reason), partitioned(2, driver=old):
        pytest.fail("entered")


def test_resources_lie_as_in_cuda_h():
    assert (ctypes.sizeof(Resource), Resource.sm.offset, Resource.type.offset) == (144, 96, 0)
    assert ctypes.sizeof(Resource * 3) == 3 * 144


def test_without_bindings_libcuda_serves_and_without_both_the_reason_is_told(monkeypatch):
    def no_bindings(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", no_bindings)
    monkeypatch.setattr(cuda_partitions.ctypes, "CDLL", lambda name: FakeLibrary())
    driver, origin = load_driver()
    assert isinstance(driver, LibCuda)
    assert origin.startswith("ctypes on libcuda.so.1 (cuda.bindings: ImportError: No module")

    def no_library(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(cuda_partitions.ctypes, "CDLL", no_library)
    with pytest.raises(PartitionsUnavailableError, match=r"no NVIDIA driver: libcuda.so.1 cannot"):
        load_driver()


def test_bindings_come_first(monkeypatch):
    bindings = SimpleNamespace(cuDriverGetVersion=lambda: (0, 13000), __version__="13.0.1")
    monkeypatch.setattr(importlib, "import_module", lambda name: bindings)
    assert load_driver() == (bindings, "cuda.bindings 13.0.1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_two_partitions_of_this_gpu():
    torch.zeros(1, device="cuda")
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    with partitioned(2) as made:
        assert 2 <= sum(partition.sms for partition in made) <= sms
        for partition in made:
            with torch.cuda.stream(partition.torch_stream()):
                assert float(torch.ones(8, device="cuda").sum()) == 8
        torch.cuda.synchronize()
