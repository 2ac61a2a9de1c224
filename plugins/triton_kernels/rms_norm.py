"""Residual add, RMSNorm and rounding in one Triton kernel; a row a program.

Legend: M tokens, K hidden size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from plugins.triton_kernels import overlap
from plugins.triton_kernels.launching import begin_kernel
from plugins.triton_kernels.rounding import load_multiplier, round_to


@triton.jit
def _rms_norm(
    residual_ptr,
    x_ptr,
    weight_ptr,
    multiplier_ptr,
    out_ptr,
    width,
    eps,
    ADD: tl.constexpr,
    MULTIPLIERS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    multiplier = load_multiplier(multiplier_ptr, columns, inside, MULTIPLIERS)
    begin_kernel(OVERLAP)
    places = tl.program_id(0).to(tl.int64) * width + columns
    residual = tl.load(residual_ptr + places, mask=inside, other=0.0)
    dtype = residual.dtype
    if ADD:
        x = tl.load(x_ptr + places, mask=inside, other=0.0)
        residual = (residual.to(tl.float32) + x.to(tl.float32)).to(dtype)
        tl.store(residual_ptr + places, residual, mask=inside)
    wide = residual.to(tl.float32)
    variance = tl.sum(wide * wide, axis=0) / width
    normed = (wide * tl.rsqrt(variance + eps)).to(dtype)
    y = (weight.to(tl.float32) * normed.to(tl.float32)).to(dtype)
    tl.store(out_ptr + places, round_to(y, multiplier, out_ptr.dtype.element_ty, MULTIPLIERS), mask=inside)


def rms_norm(
    residual_MK: torch.Tensor,
    x_MK: torch.Tensor | None,
    weight_K: torch.Tensor,
    eps: float,
    multiplier: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See reference.rms_norm."""
    rows, width = residual_MK.shape
    out_MK = torch.empty(rows, width, dtype=dtype, device=residual_MK.device)
    block = triton.next_power_of_2(width)
    _rms_norm[(rows,)](
        residual_MK,
        residual_MK if x_MK is None else x_MK,
        weight_K,
        residual_MK if multiplier is None else multiplier,
        out_MK,
        width,
        eps,
        ADD=x_MK is not None,
        MULTIPLIERS=0 if multiplier is None else min(multiplier.numel(), 2),
        BLOCK=block,
        num_warps=min(max(block // 256, 1), 16),
        **overlap.options(residual_MK),
    )
    return out_MK
