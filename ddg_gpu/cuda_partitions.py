"""One GPU as K devices: disjoint sets of its multiprocessors (SMs), by CUDA's green contexts.

All K sets come from *one* call of ``cuDevSmResourceSplitByCount``: a context of its own per set
(as in ``torch.cuda.green_contexts``) splits the whole device anew each time, and they overlap.
Nothing here has met hardware yet; ``ddg_gpu.first_contact`` is what finds out.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

#: cuda.h: CU_GREEN_CTX_DEFAULT_STREAM and CU_STREAM_NON_BLOCKING; the driver demands both.
DEFAULT_STREAM, NON_BLOCKING = 1, 1
#: cuda.h: CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION, a split that the hardware cannot do.
INVALID_CONFIGURATION = 915


class PartitionsUnavailableError(RuntimeError):
    """This machine cannot be partitioned; the message says which call refused, and why."""


class CudaCallError(RuntimeError):
    """A function of the driver or of NVRTC is missing or failed.

    Args:
        message: names the function and the error.
        code: the error's number; 0 if there is none.
    """

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Partition:
    """A set of multiprocessors with a stream of its own.

    Args:
        sms: number of multiprocessors granted.
        stream: handle of a non-blocking stream whose kernels run on them alone (a CUstream).
    """

    sms: int
    stream: int

    def torch_stream(self) -> torch.cuda.Stream:
        """The stream for ``with torch.cuda.stream(...)``, valid while the partitions are."""
        return torch.cuda.ExternalStream(self.stream)


@contextmanager
def partitioned(count: int, device: int = 0, driver: Any = None) -> Iterator[list[Partition]]:
    """Split a device into ``count`` disjoint partitions of equal size, for the block's duration.

    What was captured or queued on their streams must have ended before the block does. L2 cache
    and memory bandwidth stay shared.

    Args:
        count: number of partitions.
        device: the device's ordinal; its primary context must exist (any tensor on it will do).
        driver: ``cuda.bindings.driver`` or what has its functions; None takes `load_driver`'s.

    Raises:
        ValueError: if count < 1.
        PartitionsUnavailableError: if the driver, its version or the device cannot do it.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if driver is None:
        driver = load_driver()[0]
    with contextlib.ExitStack() as made:
        try:
            call(driver, "cuInit", 0)
            handle = call(driver, "cuDeviceGet", device)
            partitions = [
                _partition(driver, handle, group, made) for group in split(driver, handle, count)
            ]
        except CudaCallError as error:
            raise PartitionsUnavailableError(
                f"{error}; green contexts need a driver of CUDA 12.4 or newer"
            ) from error
        yield partitions


def _partition(driver: Any, device: Any, group: Any, made: contextlib.ExitStack) -> Partition:
    """A context and a stream on a group of multiprocessors; ``made`` is to give them back."""
    description = call(driver, "cuDevResourceGenerateDesc", [group], 1)
    context = call(driver, "cuGreenCtxCreate", description, device, DEFAULT_STREAM)
    # Codes of tear-down are not looked at: in a broken context all calls fail, and the first
    # error, which has been raised, is the one that tells.
    made.callback(driver.cuGreenCtxDestroy, context)
    stream = call(driver, "cuGreenCtxStreamCreate", context, NON_BLOCKING, 0)
    made.callback(driver.cuStreamDestroy, stream)
    return Partition(int(group.sm.smCount), int(stream))


def sm_resource(driver: Any, device: Any) -> Any:
    """The device's multiprocessors as a CUdevResource (``.sm.smCount`` of them).

    Raises:
        CudaCallError: if the driver refuses.
    """
    kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
    return call(driver, "cuDeviceGetDevResource", device, kind)


def split(driver: Any, device: Any, count: int) -> list[Any]:
    """The largest ``count`` equal, disjoint groups of multiprocessors that one split can give.

    The driver rounds sizes up to a granularity that depends on the device (8 on Hopper, by its
    manual), and may then have room for fewer groups; so sizes are tried from the largest down.

    Raises:
        PartitionsUnavailableError: if no size gives that many groups.
        CudaCallError: if the driver refuses.
    """
    whole = sm_resource(driver, device)
    total = int(whole.sm.smCount)
    for size in range(total // count, 0, -1):
        try:
            groups, granted, _ = call(
                driver, "cuDevSmResourceSplitByCount", count, whole, 0, size, values=3
            )
        except CudaCallError as error:
            if error.code == INVALID_CONFIGURATION:
                continue
            raise
        if granted >= count:
            return list(groups[:count])
    raise PartitionsUnavailableError(
        f"the {total} multiprocessors of this device cannot be split into {count} groups: "
        "take fewer stages"
    )


def call(driver: Any, name: str, *arguments: Any, values: int = 1) -> Any:
    """Call a driver function in the manner of cuda.bindings, which return (code, values...).

    Args:
        driver: has the function.
        name: the function.
        arguments: the inputs only.
        values: how many values it is taken to return beside the code.

    Returns:
        The value, or a tuple of several; None if the function has none.

    Raises:
        CudaCallError: naming the function and the driver's error.

    >>> call(SimpleNamespace(cuDeviceGet=lambda ordinal: (0, "device 0")), "cuDeviceGet", 0)
    'device 0'
    """
    try:
        code, *rest = getattr(driver, name)(*arguments)
    except (AttributeError, RuntimeError) as error:  # bindings raise RuntimeError for it
        raise CudaCallError(f"{name} is missing ({error})") from error
    if int(code):
        raise CudaCallError(f"{name}: {explain(driver, code)}", int(code))
    if rest and len(rest) != values:
        raise CudaCallError(
            f"{name} returned {len(rest)} values where {values} are known: another version of "
            "cuda-bindings than this was written for"
        )
    return tuple(rest) if values > 1 else rest[0] if rest else None


def explain(driver: Any, code: Any) -> str:
    """Name, number and text of a driver's error code, as far as the driver knows them."""
    words = []
    for name in ("cuGetErrorName", "cuGetErrorString"):
        with contextlib.suppress(Exception):  # a message about an error must not be another one
            failed, text = getattr(driver, name)(code)
            if not int(failed) and text:
                words.append(text.decode() if isinstance(text, bytes) else str(text))
    number = f"({int(code)})"
    return f"{words[0]} {number}: {words[1]}" if len(words) == 2 else f"CUDA error {number}"


def load_driver() -> tuple[Any, str]:
    """The driver's functions and where they come from: cuda.bindings, or ctypes on libcuda.

    Raises:
        PartitionsUnavailableError: if there is no NVIDIA driver.
    """
    try:
        bindings = importlib.import_module("cuda.bindings.driver")
        bindings.cuDriverGetVersion()  # finds libcuda only now
        version = getattr(importlib.import_module("cuda.bindings"), "__version__", "")
        return bindings, f"cuda.bindings {version}".strip()
    except Exception as error:  # not installed, too old, no libcuda: many types
        # What the bindings raise is kept; a working libcuda without them is as good.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise PartitionsUnavailableError(
            f"no NVIDIA driver: libcuda.so.1 cannot be loaded ({error})"
        ) from error
    return LibCuda(library), f"ctypes on libcuda.so.1 (cuda.bindings: {reason})"


class _Sm(ctypes.Structure):
    _fields_ = [
        ("smCount", ctypes.c_uint),
        # These two are of CUDA 13 on; older drivers leave them 0.
        ("minSmPartitionSize", ctypes.c_uint),
        ("smCoscheduledAlignment", ctypes.c_uint),
    ]


class Resource(ctypes.Structure):
    """CUdevResource of cuda.h: 144 bytes, in CUDA 12.4 as in 13.

    >>> ctypes.sizeof(Resource), Resource.sm.offset
    (144, 96)
    """

    _fields_ = [
        ("type", ctypes.c_int),
        ("_padding", ctypes.c_ubyte * 92),
        ("sm", _Sm),
        ("_rest", ctypes.c_ubyte * (48 - ctypes.sizeof(_Sm))),
    ]


class LibCuda:
    """The few driver functions that are needed, on ctypes, called and answering as cuda.bindings.

    Args:
        library: libcuda, loaded.
    """

    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM=1)

    def __init__(self, library: Any) -> None:
        self._library = library

    def cuInit(self, flags: int) -> tuple[int]:
        """Initialise the driver."""
        return (self._library.cuInit(ctypes.c_uint(flags)),)

    def cuDriverGetVersion(self) -> tuple[int, int]:
        """The newest CUDA version that the driver knows, as 1000 major + 10 minor."""
        version = ctypes.c_int()
        return self._library.cuDriverGetVersion(ctypes.byref(version)), version.value

    def cuDeviceGet(self, ordinal: int) -> tuple[int, int]:
        """A device by its number."""
        device = ctypes.c_int()
        code = self._library.cuDeviceGet(ctypes.byref(device), ctypes.c_int(ordinal))
        return code, device.value

    def cuDeviceGetDevResource(self, device: int, kind: int) -> tuple[int, Resource]:
        """What the device has of a resource."""
        resource = Resource()
        code = self._library.cuDeviceGetDevResource(
            ctypes.c_int(device), ctypes.byref(resource), ctypes.c_int(kind)
        )
        return code, resource

    def cuDevSmResourceSplitByCount(
        self, groups: int, whole: Resource, flags: int, size: int
    ) -> tuple[int, list[Resource], int, Resource]:
        """Groups, how many there are of them, and what is left."""
        found, granted, left = (Resource * groups)(), ctypes.c_uint(groups), Resource()
        code = self._library.cuDevSmResourceSplitByCount(
            found,
            ctypes.byref(granted),
            ctypes.byref(whole),
            ctypes.byref(left),
            ctypes.c_uint(flags),
            ctypes.c_uint(size),
        )
        return code, list(found), granted.value, left

    def cuDevResourceGenerateDesc(self, resources: list[Resource], count: int) -> tuple[int, Any]:
        """A description to make a context of."""
        description, array = ctypes.c_void_p(), (Resource * count)(*resources)
        code = self._library.cuDevResourceGenerateDesc(
            ctypes.byref(description), array, ctypes.c_uint(count)
        )
        return code, description.value

    def cuGreenCtxCreate(self, description: Any, device: int, flags: int) -> tuple[int, Any]:
        """A green context."""
        context = ctypes.c_void_p()
        code = self._library.cuGreenCtxCreate(
            ctypes.byref(context),
            ctypes.c_void_p(description),
            ctypes.c_int(device),
            ctypes.c_uint(flags),
        )
        return code, context.value

    def cuGreenCtxStreamCreate(self, context: Any, flags: int, priority: int) -> tuple[int, Any]:
        """A stream of a green context."""
        stream = ctypes.c_void_p()
        code = self._library.cuGreenCtxStreamCreate(
            ctypes.byref(stream),
            ctypes.c_void_p(context),
            ctypes.c_uint(flags),
            ctypes.c_int(priority),
        )
        return code, stream.value

    def cuGreenCtxDestroy(self, context: Any) -> tuple[int]:
        """Give a green context back."""
        return (self._library.cuGreenCtxDestroy(ctypes.c_void_p(context)),)

    def cuStreamDestroy(self, stream: Any) -> tuple[int]:
        """Give a stream back."""
        return (self._library.cuStreamDestroy_v2(ctypes.c_void_p(stream)),)

    def cuGetErrorName(self, code: int) -> tuple[int, bytes | None]:
        """An error's name in cuda.h."""
        text = ctypes.c_char_p()
        return self._library.cuGetErrorName(ctypes.c_int(code), ctypes.byref(text)), text.value

    def cuGetErrorString(self, code: int) -> tuple[int, bytes | None]:
        """An error in words."""
        text = ctypes.c_char_p()
        return self._library.cuGetErrorString(ctypes.c_int(code), ctypes.byref(text)), text.value
