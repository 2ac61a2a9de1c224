"""What this machine is, in the few facts that a measurement or an engine depends on. Imports no torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

TOOLS = ("torch", "transformers", "safetensors", "numpy", "nvidia-modelopt", "tensorrt-llm", "tensorrt", "twofour")


@cache
def device() -> dict[str, Any]:
    """The GPU where there is one (name, sm, driver, memory), else the CPU (name, cores)."""
    return _gpu() or {"type": "cpu", "name": _cpu_name(), "cores": len(os.sched_getaffinity(0))}


def gpu() -> dict[str, Any] | None:
    """The same, where it is a GPU."""
    return device() if device()["type"] == "gpu" else None


def sm() -> int | None:
    """The GPU's compute capability as TensorRT writes it (90 for 9.0), or None without a GPU."""
    found = device().get("sm")
    return int(found) if found else None


def versions(*names: str) -> dict[str, str]:
    """Installed versions of `names` (all of TOOLS where none is given); missing packages are left out."""
    found = {}
    for name in names or TOOLS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    """For the report: the machine, its software, and the threads that the CPU's figures stand for."""
    return {
        "device": device(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": versions(),
    }


def _gpu() -> dict[str, Any] | None:
    query = "name,compute_cap,driver_version,memory.total"
    try:
        asked = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
        lines = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
        name, capability, driver, memory = (field.strip() for field in lines[0].split(","))
        return {
            "type": "gpu",
            "name": name,
            "sm": int(capability.replace(".", "")),
            "driver": driver,
            "memory_bytes": int(memory) << 20,
            "count": len(lines),
        }
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
