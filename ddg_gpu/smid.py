"""A tiny kernel that writes down on which multiprocessor (%smid) each of its blocks ran."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from typing import Any

import torch

from ddg_gpu.cuda_partitions import call

#: Put the kernel on the current stream: (int32 output, one per block; cycles that a block waits).
Launch = Callable[[torch.Tensor, int], None]

SOURCE = """
extern "C" __global__ void record_smid(int *seen, int cycles) {
    unsigned int smid;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(smid));
    if (threadIdx.x == 0) seen[blockIdx.x] = (int)smid;
    long long start = clock64();
    while (clock64() - start < cycles) {}
}
"""

# Triton reads a kernel's source and its globals, so it cannot be built from a text.
try:
    triton: Any = importlib.import_module("triton")
    tl: Any = importlib.import_module("triton.language")
except ImportError as reason:
    _without_triton: str | None = f"triton: {reason}"
else:
    _without_triton = None

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _record_smid(seen, cycles):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, RUF100
        smid = tl.inline_asm_elementwise(
            "mov.u32 $0, %smid;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
        tl.store(seen + tl.program_id(0), smid)
        start = tl.inline_asm_elementwise(
            "mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
        )
        now = start
        while now - start < cycles:
            now = tl.inline_asm_elementwise(
                "mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
            )


def smid_kernel() -> tuple[Launch, str]:
    """The kernel and by what it was compiled: torch's NVRTC, cuda.bindings' NVRTC, or triton.

    Raises:
        RuntimeError: if none of them can; says why of each.
    """
    reasons = []
    for way in (_by_torch, _by_nvrtc, _by_triton):
        name = way.__name__.removeprefix("_by_")
        try:
            launch = way()
            seen = torch.full((4,), -1, dtype=torch.int32, device="cuda")
            launch(seen, 0)
            torch.cuda.synchronize()
            if int(seen.min()) < 0:
                raise RuntimeError("blocks wrote nothing")
        except Exception as error:  # whatever it is, the next way may work
            reasons.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
        else:
            return launch, f"{name}" + (f" (not by {'; '.join(reasons)})" if reasons else "")
    raise RuntimeError(f"no way to compile a kernel: {'; '.join(reasons)}")


def _by_torch() -> Launch:
    kernel: Any = torch.cuda._compile_kernel(SOURCE, "record_smid")

    def launch(seen: torch.Tensor, cycles: int) -> None:
        kernel(grid=(seen.numel(), 1, 1), block=(32, 1, 1), args=[seen, cycles])

    return launch


def ptx(architecture: str) -> bytes:
    """The kernel compiled by cuda.bindings' NVRTC; needs no GPU.

    Args:
        architecture: such as "compute_90".

    Raises:
        ImportError: without cuda-bindings.
        RuntimeError: what NVRTC says.
    """
    nvrtc = importlib.import_module("cuda.bindings.nvrtc")
    program = call(nvrtc, "nvrtcCreateProgram", SOURCE.encode(), b"smid.cu", 0, [], [])
    option = f"--gpu-architecture={architecture}".encode()
    call(nvrtc, "nvrtcCompileProgram", program, 1, [option])
    text = b" " * call(nvrtc, "nvrtcGetPTXSize", program)
    call(nvrtc, "nvrtcGetPTX", program, text)
    return bytes(text)


def _by_nvrtc() -> Launch:
    driver = importlib.import_module("cuda.bindings.driver")
    major, minor = torch.cuda.get_device_capability()
    module = call(driver, "cuModuleLoadData", ptx(f"compute_{major}{minor}"))
    function = call(driver, "cuModuleGetFunction", module, b"record_smid")

    def launch(seen: torch.Tensor, cycles: int) -> None:
        arguments = ((seen.data_ptr(), cycles), (ctypes.c_void_p, ctypes.c_int))
        stream = torch.cuda.current_stream().cuda_stream
        shape = (seen.numel(), 1, 1, 32, 1, 1)
        call(driver, "cuLaunchKernel", function, *shape, 0, stream, arguments, 0)

    return launch


def _by_triton() -> Launch:
    if _without_triton is not None:
        raise RuntimeError(_without_triton)

    def launch(seen: torch.Tensor, cycles: int) -> None:
        _record_smid[(seen.numel(),)](seen, cycles)

    return launch
