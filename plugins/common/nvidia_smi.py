"""The NVIDIA GPUs of this machine, from nvidia-smi. Imports no torch."""

from __future__ import annotations

import functools
import shutil
import subprocess
from dataclasses import dataclass

_GPU = "name,compute_cap,memory.total,memory.free,driver_version"
_TIMEOUT = 20  # seconds: a driver that hangs must not hang us


@dataclass(frozen=True)
class Gpu:
    """One GPU. `sm` is its compute capability times ten (H100: 90), memory is in bytes."""

    name: str
    sm: int
    memory_total: int
    memory_free: int
    driver: str


@functools.cache
def gpus() -> tuple[Gpu, ...]:
    """All GPUs, in the driver's order. Empty where there is no driver, or it does not respond."""
    return parse(query(_GPU))


def query(fields: str, device: str | None = None) -> str:
    """nvidia-smi's lines for `fields`, comma-separated, of one device or of all; empty where there is no answer."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    options = [f"--query-gpu={fields}", "--format=csv,noheader,nounits", *([f"--id={device}"] if device else [])]
    try:
        return subprocess.run([command, *options], capture_output=True, text=True, timeout=_TIMEOUT, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def parse(text: str) -> tuple[Gpu, ...]:
    """The GPUs in nvidia-smi's output; lines of another form are skipped."""
    rows = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        try:
            name, capability, total, free, driver = fields
            major, minor = capability.split(".")
            rows.append(Gpu(name, 10 * int(major) + int(minor), int(total) << 20, int(free) << 20, driver))
        except ValueError:  # "[N/A]", or a GPU that fell off the bus
            continue
    return tuple(rows)
