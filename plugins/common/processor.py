"""The processor of this machine. Imports no torch."""

from __future__ import annotations

import platform
from pathlib import Path

CACHE_BYTES = 32 << 20  # assumed where the system gives none
UNITS = {"K": 10, "M": 20, "G": 30}


def processor() -> str:
    """The processor's name, as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def last_level_cache_bytes() -> int:
    """Bytes of the largest cache that the first processor reads through."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << UNITS[size[-1]] for size in sizes if size[-1:] in UNITS), default=CACHE_BYTES)
