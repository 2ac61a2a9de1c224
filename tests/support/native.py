"""Compiles libtwofour once for all tests and lets the bindings find it. Kept under build/ until a source changes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from plugins.common.errors import UserError
from plugins.libtwofour import compiler

ROOT = Path(__file__).parents[2]


@cache
def compile_library(sms: tuple[str, ...] = ("90a",), tensorrt: str | None = None) -> Path:
    """The directory of the compiled libraries. Skips the test where nvcc or a header is missing."""
    sources = sorted(p for p in compiler.SOURCES.rglob("*") if p.is_file())
    digest = hashlib.sha256(repr((sms, tensorrt)).encode())
    for source in sources:
        digest.update(source.read_bytes())
    out = ROOT / "build" / f"native-{digest.hexdigest()[:16]}"
    if not (out / "build.json").exists():
        try:
            compiler.find_nvcc()
            compiler.find_includes()
        except UserError as error:
            pytest.skip(f"libtwofour cannot be compiled here: {error}")
        compiler.build(sms, out, Path(tensorrt) if tensorrt else None)
    return out


def use_library() -> None:
    """Points plugins.libtwofour.bindings at the compiled library, unless TWOFOUR_LIBRARY is set."""
    os.environ.setdefault("TWOFOUR_LIBRARY", str(compile_library() / "libtwofour.so"))


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that begins at a multiple of 16 bytes."""
    memory = np.zeros(array.nbytes + 16, np.uint8)
    start = -memory.ctypes.data % 16
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def prune(w_NK: np.ndarray, rng: np.random.Generator, nonzeros: Sequence[int] = (0, 1, 2)) -> np.ndarray:
    """w_NK with a random one of `nonzeros` elements kept in each group of 4."""
    n, k = w_NK.shape
    kept = rng.random((n, k // 4, 4)).argsort(-1) < rng.choice(nonzeros, (n, k // 4, 1))
    return np.where(kept.reshape(n, k), w_NK, np.zeros_like(w_NK))
