"""Copies a model's weights as a checkpoint holds them: in the config's dtype, those that are read, with an exact index.

Files that are so already are copied byte by byte.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import save_file

from calibration.model.weight_files import INDEX, SINGLE, model_dtype, read_header, read_index, weight_files
from calibration.model.weights import Weights
from plugins.common.formats import FLOATS
from plugins.common.json_files import write_json
from plugins.common.safetensors_file import Tensor

STORED = {format.dtype: format.safetensors for format in FLOATS}


def copy_weights(source: Path, out: Path, names: Collection[str]) -> None:
    """Writes the tensors of `source` among `names` to `out`, matrices in the model's dtype.

    Norms and biases keep theirs, which may be wider. Raises UserError where a file is missing or damaged.
    """
    dtype, weights = model_dtype(source), Weights(source)
    weight_map: dict[str, str] = {}
    total = 0
    for file in weight_files(source):
        header = read_header(file)
        kept = [name for name in header if name in names]
        if len(kept) == len(header) and all(_fits(tensor, dtype) for tensor in header.values()):
            shutil.copyfile(file, out / file.name)
        elif kept:
            tensors = {name: _converted(weights[name], dtype) for name in kept}
            save_file(tensors, str(out / file.name), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(kept, file.name)
        total += (out / file.name).stat().st_size if kept else 0
    if (source / INDEX).is_file() and not (source / SINGLE).is_file():
        _write_index(source / INDEX, out / INDEX, weight_map, total)


def _fits(tensor: Tensor, dtype: str) -> bool:
    return tensor.dtype in STORED.values() and (len(tensor.shape) < 2 or tensor.dtype == STORED[dtype])


def _converted(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    if tensor.dim() < 2 and str(tensor.dtype).removeprefix("torch.") in STORED:
        return tensor.contiguous()
    return tensor.to(getattr(torch, dtype)).contiguous()


def _write_index(source: Path, out: Path, weight_map: dict[str, str], total: int) -> None:
    """The index as it is, where it lists what the shards hold; else a new one."""
    if read_index(source) == weight_map:
        shutil.copyfile(source, out)
        return
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(out, index, 2)
