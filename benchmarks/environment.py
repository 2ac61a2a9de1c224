"""The environment of a measurement: machine and versions, for the files in `results/`. Imports no torch."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from plugins.common.processor import processor

PACKAGES = ("twofour", "numpy", "pydantic", "torch", "transformers", "nvidia-modelopt", "safetensors")


def describe(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Date, processor, cores this process may use, Python, and the versions of those packages that are installed."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in packages if (version := _version(name)) is not None},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
