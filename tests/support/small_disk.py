"""A real file system that fills up."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def mounted(disk: Path, megabytes: int) -> Iterator[Path]:
    """`disk`, made, as a file system of its own while a fixture yields it. Skips where mounting is not allowed."""
    disk.mkdir()
    asked = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", disk]
    if subprocess.run(asked, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)
