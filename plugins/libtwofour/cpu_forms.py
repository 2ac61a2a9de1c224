"""The torch operators' products on a CPU: the numbers that libtwofour's kernels give.

Legend: M tokens, N out_features, K in_features.
"""

from __future__ import annotations

import torch

from plugins.common import numerics
from plugins.common.defaults import MAX_SKINNY_TOKENS
from plugins.common.errors import UserError
from plugins.common.formats import format_of
from plugins.common.patterns import TENSOR_CORE
from plugins.libtwofour import structures
from plugins.sparsity import skinny_layout, skinny_layout_of8
from plugins.sparsity.torch_packing import from_numpy, to_numpy

FORMATS = {getattr(torch, format_of(name).dtype): name for name in structures.FORMATS}


def reference_linear(
    x_MK: torch.Tensor,
    w_NK: torch.Tensor,
    scale: float,
    channel_scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """y [M, N] of x [M, K] and a dense weight [N, K], as torch_ops.py defines it."""
    factor = torch.tensor(scale, dtype=torch.float32) if channel_scales is None else channel_scales
    if x_MK.dtype == torch.int8:
        y_MN = numerics.int8_linear(x_MK, w_NK, factor)
    else:
        y_MN = torch.nn.functional.linear(x_MK.float(), w_NK.float()) * factor
    if bias is not None:
        y_MN = y_MN + bias.float()
    return y_MN.to(out_dtype)


def check_skinny(x_MK: torch.Tensor, pattern: str = TENSOR_CORE) -> None:
    """Raises UserError above 64 tokens."""
    if x_MK.shape[0] > MAX_SKINNY_TOKENS:
        instead = "cusparselt_linear" if pattern == TENSOR_CORE else "dense_linear"
        raise UserError(f"{x_MK.shape[0]} tokens: the skinny kernel takes 1 to {MAX_SKINNY_TOKENS}; use {instead}")


def skinny_product(
    pattern: str,
    x_MK: torch.Tensor,
    packed: torch.Tensor,
    scale: float,
    channel_scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """y [M, N] of x [M, K] and a weight packed for the skinny kernel of `pattern`. Raises UserError above 64 tokens."""
    check_skinny(x_MK, pattern)
    w_NK = unpack_skinny(packed, (out_features, x_MK.shape[1]), x_MK.dtype, pattern)
    return reference_linear(x_MK, w_NK, scale, channel_scales, bias, out_dtype)


def pack_skinny(w_NK: torch.Tensor, pattern: str) -> torch.Tensor:
    """A weight as the skinny kernel of `pattern` takes it. Raises UserError where it does not hold the pattern."""
    array, format = to_numpy(w_NK), FORMATS[w_NK.dtype]
    if pattern == TENSOR_CORE:
        return torch.from_numpy(skinny_layout.pack(array, format))
    return torch.from_numpy(skinny_layout_of8.pack(array, format, pattern))


def unpack_skinny(packed: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype, pattern: str) -> torch.Tensor:
    """The dense weight of `shape` (N, K) that `pack_skinny` packed."""
    array, format = packed.numpy(), FORMATS[dtype]
    if pattern == TENSOR_CORE:
        return from_numpy(skinny_layout.unpack(array, *shape, format), dtype)
    return from_numpy(skinny_layout_of8.unpack(array, *shape, format, pattern), dtype)
