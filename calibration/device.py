"""Where calibration computes: the first GPU where there is one, the CPU otherwise."""

from __future__ import annotations

import ctypes

import torch

M_MMAP_THRESHOLD = -3  # of malloc.h


def device() -> torch.device:
    """The device that blocks and their statistics live on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def products_dtype(stored: torch.dtype) -> torch.dtype:
    """In which the linear layers of a model stored in this dtype compute: bfloat16 where that is the same and faster."""
    return torch.bfloat16 if stored == torch.bfloat16 and has_bfloat16() else torch.float32


def products(dtype: torch.dtype) -> torch.autocast:
    """Within it linear layers compute in this dtype."""
    return torch.autocast(device().type, dtype, enabled=dtype != torch.float32)


def has_bfloat16() -> bool:
    """Whether matrix products in bfloat16 are faster here than in float32."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported())


def return_freed_memory() -> None:
    """Tells glibc to give a freed tensor of 1 MiB or more back to the system at once; elsewhere does nothing.

    By itself it raises that size as tensors are freed, up to 32 MiB, and keeps the smaller ones in fragments.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 2**20)
