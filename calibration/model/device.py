"""Where calibration computes: the first GPU where there is one, the CPU otherwise."""

from __future__ import annotations

import ctypes

import torch

M_MMAP_THRESHOLD = -3  # of malloc.h


def device() -> torch.device:
    """The device that blocks and their statistics live on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def products_dtype(stored: torch.dtype) -> torch.dtype:
    """In which linear layers stored in this dtype compute here: bfloat16 only where they are stored so."""
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
    """Has glibc give freed memory back to the system, later that of 1 MiB or more at once; elsewhere does nothing.

    By itself it raises that size as tensors are freed, up to 32 MiB, and keeps what is smaller between what is in use.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "malloc_trim"):
        library.mallopt(M_MMAP_THRESHOLD, 2**20)
        library.malloc_trim(0)
