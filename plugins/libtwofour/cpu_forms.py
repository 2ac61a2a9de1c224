"""The torch operators' products on a CPU: the numbers that libtwofour's kernels give.

Legend: M tokens, N out_features, K in_features.
"""

from __future__ import annotations

import torch

from plugins.common import numerics
from plugins.common.defaults import MAX_SKINNY_TOKENS
from plugins.common.errors import UserError


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


def check_skinny(x_MK: torch.Tensor) -> None:
    """Raises UserError above 64 tokens."""
    if x_MK.shape[0] > MAX_SKINNY_TOKENS:
        raise UserError(
            f"{x_MK.shape[0]} tokens: the skinny kernel takes 1 to {MAX_SKINNY_TOKENS}; use cusparselt_linear"
        )
