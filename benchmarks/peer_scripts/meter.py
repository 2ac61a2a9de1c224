"""Seconds and memory of a stretch of a process (Linux)."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path


def _status(key: str) -> int:
    """A figure of /proc/self/status, bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def load_code(model: str) -> None:
    """Imports what transformers imports only when a model is first made."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))


@contextmanager
def meter(out: str, packages: list[str]) -> Iterator[None]:
    """Writes `out`: seconds, and the peak of resident memory, absolute and above what was resident at the start."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, started = _status("VmRSS"), time.perf_counter()
    yield
    seconds, peak = time.perf_counter() - started, _status("VmHWM")
    found = {"seconds": seconds, "peak_bytes": peak, "peak_above_start_bytes": peak - before}
    Path(out).write_text(json.dumps({**found, "versions": {name: version(name) for name in packages}}))
