"""Attention of one new token over the cache, in Triton: a split of the context a program, then a kernel for their sum.

Flash-Decoding (Dao et al., 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). All queries that share a
key-value head are rows of one product, so that keys and values are read once.

Legend: B requests, H key-value heads, G query heads a key-value head, D head_dim, S positions, P cache rows (or pages).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from plugins.triton_kernels import overlap
from plugins.triton_kernels.launching import begin_kernel
from plugins.triton_kernels.rounding import load_multiplier, round_to

BLOCK_S = 64  # positions that a program takes at once
PROGRAMS = 264  # at least: two for each multiprocessor of an H100
MOST_SPLITS = 32
LOG2_E = 1.4426950408889634
EVERYTHING = 1 << 30  # a window longer than any sequence
LOWEST = tl.constexpr(-1e30)  # in place of minus infinity: its differences are finite


@triton.jit
def _attend(
    q_ptr,
    keys_ptr,
    values_ptr,
    positions_ptr,
    table_ptr,
    partial_ptr,
    weight_ptr,
    multiplier_ptr,
    out_ptr,
    scale,
    v_scale,
    kv_heads,
    page_stride,
    head_stride,
    page_size,
    table_stride,
    window,
    split_length,
    splits,
    WHOLE: tl.constexpr,
    SCALED: tl.constexpr,
    MULTIPLIERS: tl.constexpr,
    PAGED: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = (tl.program_id(0) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(0) % kv_heads
    split = tl.program_id(1)
    seen = tl.load(positions_ptr + row).to(tl.int32) + 1  # positions 0 to seen - 1
    begin_kernel(OVERLAP)
    oldest = tl.maximum(seen - window, 0)
    begin = split * split_length
    end = tl.minimum(begin + split_length, seen)
    begin = tl.maximum(begin, oldest // BLOCK_S * BLOCK_S)

    group = tl.arange(0, GROUP_BLOCK)
    dim = tl.arange(0, DIM_BLOCK)
    query = row * kv_heads * GROUP + kv_head * GROUP + group
    q_GD = tl.load(
        q_ptr + query[:, None] * HEAD_DIM + dim[None, :],
        mask=(group < GROUP)[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    )
    highest = tl.full([GROUP_BLOCK], LOWEST, tl.float32)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    sum_GD = tl.zeros([GROUP_BLOCK, DIM_BLOCK], tl.float32)
    for start in range(begin, end, BLOCK_S):
        position = start + tl.arange(0, BLOCK_S)
        visible = (position < end) & (position >= oldest)
        if PAGED:
            page = tl.load(table_ptr + row * table_stride + position // page_size, mask=visible, other=0).to(tl.int64)
            place = page * page_stride + kv_head * head_stride + (position % page_size) * HEAD_DIM
        else:
            place = row * page_stride + kv_head * head_stride + position * HEAD_DIM
        inside = visible[:, None] & (dim < HEAD_DIM)[None, :]
        k_SD = tl.load(keys_ptr + place[:, None] + dim[None, :], mask=inside, other=0.0).to(q_GD.dtype)
        score = tl.dot(q_GD, tl.trans(k_SD), input_precision="ieee") * scale
        score = tl.where(visible[None, :], score, LOWEST)
        peak = tl.maximum(highest, tl.max(score, axis=1))
        shrink = tl.exp2(highest - peak)
        p_GS = tl.where(visible[None, :], tl.exp2(score - peak[:, None]), 0.0)
        total = total * shrink + tl.sum(p_GS, axis=1)
        v_SD = tl.load(values_ptr + place[:, None] + dim[None, :], mask=inside, other=0.0).to(q_GD.dtype)
        sum_GD = sum_GD * shrink[:, None] + tl.dot(p_GS.to(q_GD.dtype), v_SD, input_precision="ieee")
        highest = peak

    divisor = tl.where(total > 0.0, total, 1.0)[:, None]
    inside = (group < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    if WHOLE:
        channel = (kv_head * GROUP + group)[:, None] * HEAD_DIM + dim[None, :]
        multiplier = load_multiplier(multiplier_ptr, channel, inside, MULTIPLIERS)
        y_GD = _scale((sum_GD / divisor).to(q_GD.dtype), v_scale, SCALED)
        rounded = round_to(y_GD, multiplier, out_ptr.dtype.element_ty, MULTIPLIERS)
        tl.store(out_ptr + query[:, None] * HEAD_DIM + dim[None, :], rounded, mask=inside)
    else:
        # An empty split weighs nothing: its logarithm stays at LOWEST.
        logarithm = tl.where(total > 0.0, highest + tl.log2(tl.where(total > 0.0, total, 1.0)), LOWEST)
        part = query * splits + split
        tl.store(weight_ptr + part, logarithm, mask=group < GROUP)
        tl.store(partial_ptr + part[:, None] * HEAD_DIM + dim[None, :], sum_GD / divisor, mask=inside)


@triton.jit
def _scale(y, scale, SCALED: tl.constexpr):
    """y * scale, rounded to y's dtype."""
    if SCALED:
        return (y.to(tl.float32) * scale).to(y.dtype)
    else:
        return y


@triton.jit
def _combine(
    partial_ptr,
    weight_ptr,
    multiplier_ptr,
    out_ptr,
    v_scale,
    heads,
    splits,
    DTYPE: tl.constexpr,
    SCALED: tl.constexpr,
    MULTIPLIERS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLIT_BLOCK)
    dim = tl.arange(0, DIM_BLOCK)
    inside = dim < HEAD_DIM
    multiplier = load_multiplier(multiplier_ptr, (head % heads) * HEAD_DIM + dim, inside, MULTIPLIERS)
    begin_kernel(OVERLAP)
    logarithm = tl.load(weight_ptr + head * splits + split, mask=split < splits, other=LOWEST)
    weight = tl.where(split < splits, tl.exp2(logarithm - tl.max(logarithm, axis=0)), 0.0)
    partial = tl.load(
        partial_ptr + (head * splits + split)[:, None] * HEAD_DIM + dim[None, :],
        mask=(split < splits)[:, None] & inside[None, :],
        other=0.0,
    )
    y = _scale((tl.sum(partial * weight[:, None], axis=0) / tl.sum(weight, axis=0)).to(DTYPE), v_scale, SCALED)
    rounded = round_to(y, multiplier, out_ptr.dtype.element_ty, MULTIPLIERS)
    tl.store(out_ptr + head * HEAD_DIM + dim, rounded, mask=inside)


def decode_attention(
    q_BHD: torch.Tensor,
    keys_PHSD: torch.Tensor,
    values_PHSD: torch.Tensor,
    positions_B: torch.Tensor,
    table: torch.Tensor | None,
    length: int,
    window: int | None,
    scale: float,
    v_scale: float,
    multiplier: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See reference.decode_attention."""
    requests, heads, head_dim = q_BHD.shape
    kv_heads, page_size = keys_PHSD.shape[1:3]
    group = heads // kv_heads
    split_length = split_of(requests * kv_heads, length)
    splits = triton.cdiv(length, split_length)
    dim_block = max(16, triton.next_power_of_2(head_dim))
    out_BN = torch.empty(requests, heads * head_dim, dtype=dtype, device=q_BHD.device)
    partial = torch.empty(requests * heads, splits, head_dim, dtype=torch.float32, device=q_BHD.device)
    weight = torch.empty(requests * heads, splits, dtype=torch.float32, device=q_BHD.device)
    rounding = {"SCALED": v_scale != 1.0, "MULTIPLIERS": 0 if multiplier is None else min(multiplier.numel(), 2)}
    _attend[(requests * kv_heads, splits)](
        q_BHD,
        keys_PHSD,
        values_PHSD,
        positions_B,
        positions_B if table is None else table,
        partial,
        weight,
        partial if multiplier is None else multiplier,
        out_BN,
        scale * LOG2_E,
        v_scale,
        kv_heads,
        keys_PHSD.stride(0),
        keys_PHSD.stride(1),
        page_size,
        0 if table is None else table.stride(0),
        EVERYTHING if window is None else window,
        split_length,
        splits,
        WHOLE=splits == 1,
        PAGED=table is not None,
        GROUP=group,
        HEAD_DIM=head_dim,
        GROUP_BLOCK=max(16, triton.next_power_of_2(group)),
        DIM_BLOCK=dim_block,
        BLOCK_S=BLOCK_S,
        num_warps=4,
        num_stages=2,
        **rounding,
        **overlap.options(q_BHD),
    )
    if splits == 1:
        return out_BN
    _combine[(requests * heads,)](
        partial,
        weight,
        partial if multiplier is None else multiplier,
        out_BN,
        v_scale,
        heads,
        splits,
        DTYPE=tl.float16 if q_BHD.dtype == torch.float16 else tl.bfloat16,
        HEAD_DIM=head_dim,
        DIM_BLOCK=dim_block,
        SPLIT_BLOCK=triton.next_power_of_2(splits),
        num_warps=1,
        **rounding,
        **overlap.options(q_BHD),
    )
    return out_BN


def split_of(programs: int, length: int) -> int:
    """Positions a split, a multiple of BLOCK_S: enough splits to occupy the GPU, where the context allows."""
    wanted = min(triton.cdiv(PROGRAMS, programs), MOST_SPLITS)
    return int(triton.cdiv(triton.cdiv(length, wanted), BLOCK_S) * BLOCK_S)
