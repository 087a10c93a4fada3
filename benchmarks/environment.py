"""What a timing was taken on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path


def environment() -> dict[str, str]:
    """Processor, cores and versions; no names of machines or paths."""
    found = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                found = line.partition(":")[2].strip()
                break
    return {
        "cpu": found,
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "torch": version("torch"),
        "numpy": version("numpy"),
    }
