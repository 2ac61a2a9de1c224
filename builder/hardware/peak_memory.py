"""The most memory that this process held during a block of code."""

from __future__ import annotations

import contextlib
import re
import resource
from pathlib import Path
from types import TracebackType

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """`with PeakMemory() as peak: ...` then `peak.bytes`.

    Resets Linux's high-water mark; without the permission the peak is that of the whole process.
    """

    bytes: int = 0

    def __enter__(self) -> PeakMemory:
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")
        return self

    def __exit__(self, kind: object, error: object, trace: TracebackType | None) -> None:
        self.bytes = _high_water_mark()


def _high_water_mark() -> int:
    try:
        match = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        match = None
    return int(match[1]) * 1024 if match else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
