"""The facts of this machine that a measurement or an engine depends on. Imports no torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from functools import cache
from pathlib import Path
from typing import Any

from plugins.common.nvidia_smi import gpus
from plugins.common.processor import processor

TOOLS = ("torch", "transformers", "safetensors", "numpy", "nvidia-modelopt", "tensorrt-llm", "tensorrt", "twofour")


@cache
def device() -> dict[str, Any]:
    """The GPU where there is one (name, sm, driver, memory), else the CPU (name, cores)."""
    return _gpu() or {"type": "cpu", "name": processor(), "cores": len(os.sched_getaffinity(0))}


def gpu() -> dict[str, Any] | None:
    """The same, where it is a GPU."""
    return device() if device()["type"] == "gpu" else None


def sm() -> int | None:
    """The GPU's compute capability as TensorRT writes it (90 for 9.0), or None without a GPU."""
    capability = device().get("sm")
    return int(capability) if capability else None


def versions(*names: str) -> dict[str, str]:
    """Installed versions of `names` (all of TOOLS where none is given); missing packages are left out."""
    installed = {}
    for name in names or TOOLS:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def environment() -> dict[str, Any]:
    """For the report: the machine, its software, and the threads of the CPU's figures."""
    return {
        "device": device(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": versions(),
    }


def main_memory() -> tuple[int, int]:
    """(total, available) bytes."""
    values = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE))
    return int(values["MemTotal"]) * 1024, int(values["MemAvailable"]) * 1024


def _gpu() -> dict[str, Any] | None:
    present = gpus()
    if not present:
        return None
    first = present[0]
    return {
        "type": "gpu",
        "name": first.name,
        "sm": first.sm,
        "driver": first.driver,
        "memory_bytes": first.memory_total,
        "count": len(present),
    }
