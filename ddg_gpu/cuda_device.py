"""The check whether there is a CUDA device, and what is known about it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from ddg_gpu.cuda_partitions import CudaCallError, PartitionsUnavailableError, call, load_driver
from ddg_gpu.cuda_timing import start
from ddg_gpu.isolated import Record, RefutedError

_QUERY = (
    "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,"
    "compute_mode,mig.mode.current,temperature.gpu,power.draw"
)


def device(stages: list[int], record: Record) -> None:
    """Versions, the device's properties, its clocks and modes (read only)."""
    record("python", platform.python_version())
    record("torch", torch.__version__)
    record("CUDA of torch", torch.version.cuda)
    record("nvidia-smi", _nvidia_smi())
    missing = []
    if torch.version.cuda is None:
        missing.append(f"torch {torch.__version__} is built without CUDA")
    try:
        driver, origin = load_driver()
        record("driver functions", origin)
        record("CUDA of the driver", call(driver, "cuDriverGetVersion"))
        call(driver, "cuInit", 0)
    except (PartitionsUnavailableError, CudaCallError) as error:
        missing.append(str(error))
    if not missing and not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        missing.append(f"torch sees no CUDA device (CUDA_VISIBLE_DEVICES is {visible!r})")
    if missing:
        raise RefutedError("\n".join(missing))
    start()
    properties = torch.cuda.get_device_properties(0)
    record("name", properties.name)
    record("devices", torch.cuda.device_count())
    record("compute capability", f"{properties.major}.{properties.minor}")
    record("SMs", properties.multi_processor_count)
    record("memory", properties.total_memory)
    record("L2", getattr(properties, "L2_cache_size", None))
    record("cuDNN", torch.backends.cudnn.version())
    mps = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
    record("MPS pipe", mps if Path(mps).exists() else None)


def _nvidia_smi() -> str:
    if shutil.which("nvidia-smi") is None:
        return "nvidia-smi: not on the PATH"
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"
    return (run.stdout or run.stderr).strip()
