"""silu(gate) * up and rounding in one Triton kernel.

Legend: M tokens, N intermediate size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from plugins.triton_kernels import overlap
from plugins.triton_kernels.launching import begin_kernel
from plugins.triton_kernels.rounding import load_multiplier, round_to

BLOCK = 1024


@triton.jit(do_not_specialize=["gate_first", "up_first"])
def _silu_mul(
    gate_up_ptr,
    multiplier_ptr,
    out_ptr,
    width,
    gate_first,
    up_first,
    SPLIT: tl.constexpr,
    MULTIPLIERS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    multiplier = load_multiplier(multiplier_ptr, columns, inside, MULTIPLIERS)
    begin_kernel(OVERLAP)
    gate_at, up_at = columns, width + columns
    if SPLIT:  # first columns of gate, of up, other columns of gate, of up
        gate_at = tl.where(columns < gate_first, columns, columns + up_first)
        up_at = tl.where(columns < up_first, columns + gate_first, columns + width)
    gate = tl.load(gate_up_ptr + row * 2 * width + gate_at, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + row * 2 * width + up_at, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    y = (activated.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)
    rounded = round_to(y, multiplier, out_ptr.dtype.element_ty, MULTIPLIERS)
    tl.store(out_ptr + row * width + columns, rounded, mask=inside)


def silu_mul(
    gate_up_MN: torch.Tensor,
    multiplier: torch.Tensor | None,
    dtype: torch.dtype,
    gate_first: int = 0,
    up_first: int = 0,
) -> torch.Tensor:
    """See reference.silu_mul."""
    rows, width = gate_up_MN.shape[0], gate_up_MN.shape[1] // 2
    out_MN = torch.empty(rows, width, dtype=dtype, device=gate_up_MN.device)
    _silu_mul[(rows, triton.cdiv(width, BLOCK))](
        gate_up_MN,
        gate_up_MN if multiplier is None else multiplier,
        out_MN,
        width,
        gate_first,
        up_first,
        SPLIT=gate_first + up_first > 0,
        MULTIPLIERS=0 if multiplier is None else min(multiplier.numel(), 2),
        BLOCK=BLOCK,
        num_warps=4,
        **overlap.options(gate_up_MN),
    )
    return out_MN
