"""Writes +0.0 for -0.0 in the layers declared sparse.

Folding a mask by multiplication leaves -0.0 where a negative weight was pruned, and rounding to FP8 where one was tiny.
It is the same number, but sparse kernels that look at bits count it as a value.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from builder.checkpoint.reading import read
from plugins.common.safetensors_file import CHUNK_BYTES, Tensor


def normalize_zeros(directory: Path) -> int:
    """Rewrites the checkpoint's files in place, and returns how many values that changed. Raises VerificationError."""
    checkpoint = read(directory)
    weights = [weight for layer in checkpoint.layers() if layer.shape.sparse for weight in layer.weights]
    return sum(_normalize(weight) for weight in weights if "F" in weight.dtype)


def _normalize(weight: Tensor) -> int:
    width = weight.itemsize
    values = np.memmap(weight.file, f"u{width}", "r+", weight.offset, (weight.nbytes // width,))
    sign = values.dtype.type(1 << (8 * width - 1))
    changed = 0
    for start in range(0, values.size, CHUNK_BYTES):
        chunk = values[start : start + CHUNK_BYTES]
        negative = chunk == sign
        changed += int(np.count_nonzero(negative))
        chunk[negative] = 0
    values.flush()
    return changed
