"""Where calibration computes: the first GPU where there is one, the CPU otherwise."""

from __future__ import annotations

import ctypes

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
MAPPED_BYTES = 2**25  # the most that glibc accepts: larger tensors go back to the system as they are freed
KEPT_BYTES = 2**28


def device() -> torch.device:
    """The device of blocks and their statistics."""
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
    """Returns freed memory to the system, where the C library is glibc; elsewhere does nothing.

    From then on glibc keeps up to `KEPT_BYTES` of freed memory and reuses it for tensors below `MAPPED_BYTES`. By
    default it maps more of them again each time, and returns memory earlier: page faults then slow small blocks.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "malloc_trim"):
        library.mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
        library.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        library.malloc_trim(0)
