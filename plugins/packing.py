"""plugins/pattern.py for torch tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from plugins import pattern

_INTEGERS = {1: torch.int8, 2: torch.int16}


def pack(w_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values [N, K/2], indices uint8 [N, ceil(K/8)]) of a 2:4 weight [N, K]. Raises UserError where it is not 2:4."""
    values, indices = pattern.pack(to_numpy(w_NK))
    return from_numpy(values, w_NK.dtype), torch.from_numpy(indices)


def unpack(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The weight [N, K] that `pack` took, on the device of `values`. Raises UserError where the two are damaged."""
    return from_numpy(pattern.unpack(to_numpy(values), to_numpy(indices)), values.dtype).to(values.device)


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
