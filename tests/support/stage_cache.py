"""Stages that write a few files, and the cache that keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from builder.artifacts.cache import Cache, key

PARTS = {
    "stage": "sparsify",
    "inputs": {"model": "ab"},
    "config": {"method": "wanda"},
    "code": "cd",
    "tools": {"t": "2"},
}


KEY = key(**PARTS)  # type: ignore[arg-type]


def write_one(text: bytes) -> Any:
    def make(out: Path, work: Path) -> None:
        (out / "weights.bin").write_bytes(text)

    return make


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, lines: list[str]) -> Cache:
    return Cache(tmp_path / "store", log=lines.append)
