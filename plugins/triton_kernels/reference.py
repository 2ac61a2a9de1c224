"""The steps of a decoder block between its linear layers, in plain torch: the reference of each kernel.

Every operation rounds to the compute dtype as transformers' own modules do.

Legend: M tokens, K hidden size, N out_features, D head_dim, S positions, P cache rows (or pages), B requests,
H key-value heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from plugins.common import numerics


def rms_norm(
    residual_MK: torch.Tensor,
    x_MK: torch.Tensor | None,
    weight_K: torch.Tensor,
    eps: float,
    multiplier: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Adds `x_MK`, where given, to `residual_MK` in place; returns the RMSNorm [M, K] of the sum, rounded."""
    if x_MK is not None:
        residual_MK.add_(x_MK)
    return _round(normalize(residual_MK, weight_K, eps), multiplier, dtype)


def silu_mul(
    gate_up_MN: torch.Tensor,
    multiplier: torch.Tensor | None,
    dtype: torch.dtype,
    gate_first: int = 0,
    up_first: int = 0,
) -> torch.Tensor:
    """silu(gate) * up [M, N / 2], rounded, of gate and up side by side.

    Their first `gate_first` and `up_first` columns come before all others: those of 2:4 weights (Linear.sparse_rows).
    """
    width = gate_up_MN.shape[1] // 2
    gate, up = _take_apart(gate_up_MN, (width, width), (gate_first, up_first))
    return _round(torch.nn.functional.silu(gate) * up, multiplier, dtype)


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
    """Rotated queries [M, heads, D] of q, k and v side by side; writes token m's key and value at positions_M[m].

    `q_norm_D` and `k_norm_D` normalize each head first. The cache [P, H, S, D] is contiguous; `table` int32
    [M, pages] names the pages of S positions that hold token m's sequence; None: all of it lies in row m.
    Multipliers [1] float32 (1 / scale) belong to an 8-bit cache. The first so many heads of q, k and v (`q_first`,
    `k_first`, `v_first`) come before all others in `qkv_MN`: those of 2:4 weights (Linear.sparse_rows).
    """
    first = (q_first, k_first, v_first)
    q_MHD, k_MHD, v_MHD = split_heads(qkv_MN, keys_PHSD.shape[1], keys_PHSD.shape[3], first)
    if q_norm_D is not None and k_norm_D is not None:
        q_MHD, k_MHD = normalize(q_MHD, q_norm_D, eps), normalize(k_MHD, k_norm_D, eps)
    cos, sin = cos_SD[positions_M][:, None], sin_SD[positions_M][:, None]
    q_MHD, k_MHD = rotate(q_MHD, cos, sin), rotate(k_MHD, cos, sin)
    rows, slots = torch.arange(len(positions_M), device=positions_M.device), positions_M
    if table is not None:
        size = keys_PHSD.shape[2]
        rows, slots = table[rows, positions_M // size].long(), positions_M % size
    for cache, new, multiplier in ((keys_PHSD, k_MHD, k_multiplier), (values_PHSD, v_MHD, v_multiplier)):
        rounded = _round(new, multiplier, cache.dtype)
        if cache.element_size() == 1:  # not every operator supports float8
            cache, rounded = cache.view(torch.uint8), rounded.view(torch.uint8)
        cache[rows, :, slots] = rounded
    return q_MHD.contiguous()


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
    """Attention [B, heads * D], rounded, of each request's query over its positions 0 to positions_B[b].

    No position is `length` or more. `window`: only the last so many are seen. `scale` multiplies q k (a cache's
    k_scale included), `v_scale` the result. The cache and `table` as `rope_and_cache` has them.
    """
    requests, _, head_dim = q_BHD.shape
    k_seen, v_seen = (
        _as_floats(_sequences(cache, table, requests, length), q_BHD.dtype) for cache in (keys_PHSD, values_PHSD)
    )
    position_B1, seen_S = positions_B[:, None], torch.arange(length, device=q_BHD.device)
    mask_BS = seen_S <= position_B1
    if window is not None:
        mask_BS &= seen_S > position_B1 - window
    grouped = q_BHD.view(requests, keys_PHSD.shape[1], -1, head_dim)
    out = torch.nn.functional.scaled_dot_product_attention(
        grouped, k_seen, v_seen, attn_mask=mask_BS[:, None, None], scale=scale
    )
    return _round((out if v_scale == 1 else out * v_scale).reshape(requests, -1), multiplier, dtype)


def split_heads(
    qkv: torch.Tensor, kv_heads: int, head_dim: int, first: Sequence[int] = ()
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v [..., heads, D] of [..., (heads + 2 H) * D]; the `first` heads of each come before all others."""
    columns = [kv_heads * head_dim] * 2
    apart = _take_apart(qkv, (qkv.shape[-1] - sum(columns), *columns), [heads * head_dim for heads in first])
    q, k, v = (x.unflatten(-1, (-1, head_dim)) for x in apart)
    return q, k, v


def _take_apart(whole: torch.Tensor, widths: Sequence[int], first: Sequence[int]) -> Sequence[torch.Tensor]:
    """Matrices of these widths that lie side by side, the `first` columns of each before all others."""
    if not any(first):
        return list(whole.split(list(widths), dim=-1))
    rest = [width - size for width, size in zip(widths, first, strict=True)]
    pieces = whole.split([*first, *rest], dim=-1)
    return [torch.cat(pair, dim=-1) for pair in zip(pieces[: len(first)], pieces[len(first) :], strict=True)]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [..., D], the halves of D paired."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def normalize(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.to(torch.float32)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def _round(x: torch.Tensor, multiplier: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    if multiplier is None:
        return x.to(dtype)
    quantize = numerics.quantize_int8 if dtype == torch.int8 else numerics.quantize_fp8
    return quantize(x.float(), multiplier)


def _sequences(cache_PHSD: torch.Tensor, table: torch.Tensor | None, requests: int, length: int) -> torch.Tensor:
    """The first `length` positions [B, H, length, D] of each request."""
    if table is None:
        return cache_PHSD[:requests, :, :length]
    pages_BNHSD = cache_PHSD[table.long()]
    return pages_BNHSD.transpose(1, 2).flatten(2, 3)[:, :, :length]


def _as_floats(stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if stored.dtype == torch.float8_e4m3fn and not stored.is_cuda:
        stored = numerics.fp8_values(stored)
    return stored.to(dtype)
