"""Where calibration computes: the first GPU where there is one, the CPU otherwise."""

from __future__ import annotations

import torch


def device() -> torch.device:
    """The device that blocks and their statistics live on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def products(dtype: torch.dtype) -> torch.autocast:
    """Within it a model of this dtype has its linear layers in bfloat16, if it is stored so and that is faster here."""
    return torch.autocast(device().type, torch.bfloat16, enabled=dtype == torch.bfloat16 and has_bfloat16())


def has_bfloat16() -> bool:
    """Whether matrix products in bfloat16 are faster here than in float32."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported())
