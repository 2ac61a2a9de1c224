"""Whether a checkpoint's channels lie in the order that its sparsity.json declares, compared with the dense model.

Pruning, refits and quantization change a channel's weights but not what they resemble: each row, or input, must lie
near that of the declared channel of the dense model (cosine; two channels of one layer are near orthogonal).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from builder.checkpoint.reading import Checkpoint, read
from builder.checkpoint.violations import Code, Violation
from builder.planning.model_config import Architecture
from builder.planning.sharding import is_row_parallel
from plugins.common.errors import UserError
from plugins.common.safetensors_file import Tensor

LEAST_COSINE = 0.3  # 2:4 leaves 0.8 and more, SmoothQuant's column scales 0.5 and more

Floats = np.ndarray[Any, np.dtype[np.float32]]


def check_order(checkpoint: Checkpoint, dense: Path) -> Iterator[Violation]:
    """One violation a layer that lies in another order. Raises UserError where `dense` is another model."""
    source = read(dense)
    if source.architecture != checkpoint.architecture:
        raise UserError(
            f"'{dense}' is not the dense model of '{checkpoint.directory}': give the model that it was built from"
        )
    for layer in (expected.layer for expected in source.expected.values() if expected.role == "weight"):
        half = str(layer).rpartition(".")[0]
        stored, original = (each.tensors.get(f"{layer}.weight") for each in (checkpoint, source))
        if not half.startswith("model.layers.") or stored is None or original is None or stored.shape != original.shape:
            continue
        order = checkpoint.declaration.order.get(half)
        axis = int(is_row_parallel(str(layer)))
        width = stored.shape[axis] // _channels(source.architecture, half)
        places = np.arange(stored.shape[axis])
        if order is not None:
            places = (np.asarray(order)[:, None] * width + np.arange(width)).ravel()
        wrong = np.flatnonzero(_cosines(stored, original, places, axis) < LEAST_COSINE)
        if wrong.size:
            what = "row" if axis == 0 else "input"
            problem = f"{what} {wrong[0]} is not the dense model's {what} {places[wrong[0]]}, as '{half}' declares"
            yield Violation(Code.CONFIG, problem, stored.file.name, stored.name)


def _channels(architecture: Architecture, half: str) -> int:
    return architecture.intermediate_size if half.endswith(".mlp") else architecture.num_kv_heads


def _cosines(stored: Tensor, original: Tensor, places: np.ndarray[Any, Any], axis: int) -> Floats:
    """Of each row or input with the one of the dense model that should lie there."""
    built, dense = (np.asarray(tensor.load()).astype(np.float32) for tensor in (stored, original))
    if axis:
        built, dense = built.T, dense.T
    dense = dense[places]
    norms = np.linalg.norm(built, axis=1) * np.linalg.norm(dense, axis=1)
    cosines: Floats = (built * dense).sum(1) / np.maximum(norms, 1e-30)
    return np.where(norms > 0, cosines, 1.0)  # a channel of zeros resembles any
