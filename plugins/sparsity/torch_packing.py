"""plugins/sparsity/pattern.py for torch tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from plugins.common.errors import UserError
from plugins.sparsity import pattern

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def pack(w_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values [N, K/2], indices uint8 [N, ceil(K/8)]) of a 2:4 weight [N, K]. Raises UserError where it is not 2:4."""
    values, indices = pattern.pack(to_numpy(w_NK))
    return from_numpy(values, w_NK.dtype), torch.from_numpy(indices)


def unpack(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The weight [N, K] that `pack` took, made on the device of `values`, where it may be a GPU.

    Raises UserError for shapes that do not match, or indices that do not ascend within a group.
    """
    rows, groups = values.shape[0], values.shape[1] // 2
    if values.shape[1] % 2 or indices.dtype != torch.uint8 or indices.shape != (rows, (groups + 1) // 2):
        raise UserError(
            f"values {list(values.shape)} and indices {indices.dtype} {list(indices.shape)} do not match: "
            "build the engine again"
        )
    nibbles = torch.stack([indices & 15, indices >> 4], dim=-1).view(rows, -1)[:, :groups]
    places = torch.stack([nibbles & 3, nibbles >> 2], dim=-1)
    ascends = places[..., 0] < places[..., 1]
    if not bool(ascends.all()):
        row, group = (~ascends).nonzero()[0].tolist()
        raise UserError(f"row {row}, group {group}: indices do not ascend: the file is damaged, build the engine again")
    kept = values.view(_INTEGERS[values.element_size()]).view(rows, groups, 2)
    dense = torch.zeros(rows, groups, 4, dtype=kept.dtype, device=values.device).scatter_(2, places.long(), kept)
    return dense.view(rows, groups * 4).view(values.dtype)


def to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A tensor as an array. numpy lacks bfloat16 and float8: they come as void types of the same width."""
    tensor = tensor.detach().cpu().contiguous()
    width = tensor.element_size()
    array: np.ndarray[Any, Any]
    if tensor.dtype in (torch.bfloat16, torch.float8_e4m3fn):
        array = tensor.view(_INTEGERS[width]).numpy().view(f"V{width}")
    else:
        array = tensor.numpy()
    return array


def from_numpy(array: np.ndarray[Any, Any], dtype: torch.dtype) -> torch.Tensor:
    """The tensor of `dtype` that `to_numpy` took."""
    return torch.from_numpy(array.view(f"i{array.itemsize}")).view(dtype)
