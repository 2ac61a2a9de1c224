"""Copies a model's weights as a checkpoint holds them: in the config's dtype, those that are read, with an exact index.

Files that are so already are copied byte by byte.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from calibration.model.weight_files import INDEX, SINGLE, model_dtype, read_index, weight_files
from plugins.common.formats import FLOATS
from plugins.common.json_files import write_json

STORED = {format.dtype: format.safetensors for format in FLOATS}


def copy_weights(source: Path, out: Path, names: Collection[str]) -> None:
    """Writes the tensors of `source` among `names` to `out`, matrices in the model's dtype.

    Norms and biases keep theirs, which may be wider. Raises UserError where a file is missing or damaged.
    """
    dtype = model_dtype(source)
    weight_map: dict[str, str] = {}
    total = 0
    for file in weight_files(source):
        with safe_open(str(file), "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            kept = [name for name in slices if name in names]
            if len(kept) == len(slices) and all(_fits(part, dtype) for part in slices.values()):
                shutil.copyfile(file, out / file.name)
            elif kept:
                tensors = {name: _converted(opened.get_tensor(name), dtype) for name in kept}
                save_file(tensors, str(out / file.name), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(kept, file.name)
        total += (out / file.name).stat().st_size if kept else 0
    if (source / INDEX).is_file() and not (source / SINGLE).is_file():
        _write_index(source / INDEX, out / INDEX, weight_map, total)


def _fits(part: Any, dtype: str) -> bool:
    stored = part.get_dtype()
    return stored in STORED.values() and (len(part.get_shape()) < 2 or stored == STORED[dtype])


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
