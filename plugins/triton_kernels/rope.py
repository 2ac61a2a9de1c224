"""Rotary embedding of queries and keys, and the write of keys and values into the cache, in one Triton kernel.

A program takes one head of one token. Query and key heads are normalized first where the model does so (Qwen3).

Legend: M tokens, D head_dim, S positions, P cache rows (or pages), H key-value heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from plugins.triton_kernels import overlap
from plugins.triton_kernels.launching import begin_kernel
from plugins.triton_kernels.rounding import round_to


@triton.jit
def _normalize(first, second, weight_ptr, half, inside, eps, HEAD_DIM: tl.constexpr):
    """RMSNorm of one head given as its two halves."""
    wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
    variance = (tl.sum(wide_first * wide_first, axis=0) + tl.sum(wide_second * wide_second, axis=0)) / HEAD_DIM
    factor = tl.rsqrt(variance + eps)
    weight_first = tl.load(weight_ptr + half, mask=inside, other=0.0).to(tl.float32)
    weight_second = tl.load(weight_ptr + HEAD_DIM // 2 + half, mask=inside, other=0.0).to(tl.float32)
    first = (weight_first * (wide_first * factor).to(first.dtype).to(tl.float32)).to(first.dtype)
    second = (weight_second * (wide_second * factor).to(second.dtype).to(tl.float32)).to(second.dtype)
    return first, second


@triton.jit
def _product(a, b):
    """a * b rounded to their dtype, held in float32."""
    return (a.to(tl.float32) * b.to(tl.float32)).to(a.dtype).to(tl.float32)


@triton.jit
def _place(head, heads, kv_heads, q_first, k_first, v_first):
    """Where head number `head` of q, k and v lies, if the first heads of each come before all others."""
    first = q_first + k_first + v_first
    place = tl.where(head < q_first, head, head + k_first + v_first)
    of_k = head - heads
    k_place = tl.where(of_k < k_first, q_first + of_k, first + heads - q_first + of_k - k_first)
    of_v = of_k - kv_heads
    v_place = tl.where(of_v < v_first, q_first + k_first + of_v, heads + kv_heads + of_v)
    return tl.where(of_v >= 0, v_place, tl.where(of_k >= 0, k_place, place))


@triton.jit(do_not_specialize=["q_first", "k_first", "v_first"])
def _rope_and_cache(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    q_norm_ptr,
    k_norm_ptr,
    q_ptr,
    keys_ptr,
    values_ptr,
    k_multiplier_ptr,
    v_multiplier_ptr,
    table_ptr,
    eps,
    heads,
    kv_heads,
    page_stride,
    head_stride,
    page_size,
    table_stride,
    q_first,
    k_first,
    v_first,
    SPLIT: tl.constexpr,
    NORM: tl.constexpr,
    MULTIPLIERS: tl.constexpr,
    PAGED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    half = tl.arange(0, BLOCK)
    inside = half < HEAD_DIM // 2
    position = tl.load(positions_ptr + token).to(tl.int64)
    angle = position * HEAD_DIM + half
    cos_first = tl.load(cos_ptr + angle, mask=inside, other=0.0)
    cos_second = tl.load(cos_ptr + angle + HEAD_DIM // 2, mask=inside, other=0.0)
    sin_first = tl.load(sin_ptr + angle, mask=inside, other=0.0)
    sin_second = tl.load(sin_ptr + angle + HEAD_DIM // 2, mask=inside, other=0.0)
    begin_kernel(OVERLAP)
    source = head
    if SPLIT:
        source = _place(head, heads, kv_heads, q_first, k_first, v_first)
    source_ptr = qkv_ptr + (token * (heads + 2 * kv_heads) + source) * HEAD_DIM
    first = tl.load(source_ptr + half, mask=inside, other=0.0)
    second = tl.load(source_ptr + HEAD_DIM // 2 + half, mask=inside, other=0.0)
    if head < heads + kv_heads:  # a query or a key
        if NORM:
            if head < heads:
                first, second = _normalize(first, second, q_norm_ptr, half, inside, eps, HEAD_DIM)
            else:
                first, second = _normalize(first, second, k_norm_ptr, half, inside, eps, HEAD_DIM)
        rotated_first = (_product(first, cos_first) - _product(second, sin_first)).to(first.dtype)
        rotated_second = (_product(second, cos_second) + _product(first, sin_second)).to(first.dtype)
        first, second = rotated_first, rotated_second
    if head < heads:
        target_ptr = q_ptr + (token * heads + head) * HEAD_DIM
        tl.store(target_ptr + half, first, mask=inside)
        tl.store(target_ptr + HEAD_DIM // 2 + half, second, mask=inside)
    else:
        page, slot = token, position
        if PAGED:
            page = tl.load(table_ptr + token * table_stride + position // page_size).to(tl.int64)
            slot = position % page_size
        if head < heads + kv_heads:
            place = page * page_stride + (head - heads) * head_stride + slot * HEAD_DIM + half
            _store(keys_ptr + place, k_multiplier_ptr, first, second, inside, MULTIPLIERS, HEAD_DIM)
        else:
            place = page * page_stride + (head - heads - kv_heads) * head_stride + slot * HEAD_DIM + half
            _store(values_ptr + place, v_multiplier_ptr, first, second, inside, MULTIPLIERS, HEAD_DIM)


@triton.jit
def _store(
    pointers,
    multiplier_ptr,
    first,
    second,
    inside,
    MULTIPLIERS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    multiplier = 1.0
    if MULTIPLIERS == 1:
        multiplier = tl.load(multiplier_ptr)
    dtype: tl.constexpr = pointers.dtype.element_ty
    tl.store(pointers, round_to(first, multiplier, dtype, MULTIPLIERS), mask=inside)
    tl.store(pointers + HEAD_DIM // 2, round_to(second, multiplier, dtype, MULTIPLIERS), mask=inside)


def rope_and_cache(
    qkv_MN: torch.Tensor,
    cos_SD: torch.Tensor,
    sin_SD: torch.Tensor,
    positions_M: torch.Tensor,
    q_norm_D: torch.Tensor | None,
    k_norm_D: torch.Tensor | None,
    eps: float,
    keys_PHSD: torch.Tensor,
    values_PHSD: torch.Tensor,
    k_multiplier: torch.Tensor | None,
    v_multiplier: torch.Tensor | None,
    table: torch.Tensor | None,
    q_first: int = 0,
    k_first: int = 0,
    v_first: int = 0,
) -> torch.Tensor:
    """See reference.rope_and_cache."""
    tokens, width = qkv_MN.shape
    _, kv_heads, page_size, head_dim = keys_PHSD.shape
    heads = width // head_dim - 2 * kv_heads
    q_MHD = torch.empty(tokens, heads, head_dim, dtype=qkv_MN.dtype, device=qkv_MN.device)
    _rope_and_cache[(tokens, heads + 2 * kv_heads)](
        qkv_MN,
        cos_SD,
        sin_SD,
        positions_M,
        qkv_MN if q_norm_D is None else q_norm_D,
        qkv_MN if k_norm_D is None else k_norm_D,
        q_MHD,
        keys_PHSD,
        values_PHSD,
        qkv_MN if k_multiplier is None else k_multiplier,
        qkv_MN if v_multiplier is None else v_multiplier,
        positions_M if table is None else table,
        eps,
        heads,
        kv_heads,
        keys_PHSD.stride(0),
        keys_PHSD.stride(1),
        page_size,
        0 if table is None else table.stride(0),
        q_first,
        k_first,
        v_first,
        SPLIT=q_first + k_first + v_first > 0,
        NORM=q_norm_D is not None,
        MULTIPLIERS=0 if k_multiplier is None else 1,
        PAGED=table is not None,
        HEAD_DIM=head_dim,
        BLOCK=triton.next_power_of_2(head_dim // 2),
        num_warps=1,
        **overlap.options(qkv_MN),
    )
    return q_MHD
