"""Causal attention of prompts on a CPU, in libtwofour_cpu (plugins/csrc/cpu/attention.cpp).

Legend: B requests, T new tokens, S positions seen, H key-value heads, D head_dim.
"""

from __future__ import annotations

from ctypes import byref, c_int64

import torch

from plugins.libtwofour import cpu

FEWEST = 16  # new tokens: below it packing keys and values costs more than it saves
LANES = 32  # head_dim is a multiple of it


def is_usable(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether the library is loaded and takes these tensors: bfloat16, where the processor has products for it."""
    on_cpu = q.device.type == "cpu" and q.dtype == k.dtype == v.dtype == torch.bfloat16
    fits = q.shape[2] >= FEWEST and q.shape[3] % LANES == 0 and all(x.stride(3) == 1 for x in (q, k, v))
    return on_cpu and fits and cpu.is_loaded() and cpu.has_bf16()


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, v_scale: float, window: int | None
) -> torch.Tensor:
    """Attention [B, T, heads, D] of q [B, heads, T, D] over k, v [B, H, S, D], the queries at the last T positions."""
    sequences, heads, queries, head_dim = q.shape
    out = q.new_empty(sequences, queries, heads, head_dim)
    problem = cpu.Attention(
        sequences, queries, k.shape[2], heads, k.shape[1], head_dim, window or 0, scale, v_scale,
        *(x.data_ptr() for x in (q, k, v, out)), *((c_int64 * 3)(*x.stride()[:3]) for x in (q, k, v)),
    )  # fmt: skip
    cpu.check(cpu.load().twofour_cpu_attend_prompts(byref(problem)))
    return out
