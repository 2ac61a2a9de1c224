"""Attention in float32 with linear layers in bfloat16.

On CPUs PyTorch's fused attention takes half as long in float32 as in bfloat16 (an AMD EPYC with AVX512-BF16, 4 heads of
64 on 256 tokens, forwards and backwards), and is the more exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

FLOAT32 = "sdpa-float32"


def attention() -> str:
    """What transformers calls the faster attention here: for `attn_implementation`."""
    return "sdpa" if torch.cuda.is_available() else FLOAT32


def _float32(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    with torch.autocast(query.device.type, enabled=False):
        return sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **kwargs)


AttentionInterface.register(FLOAT32, _float32)
AttentionMaskInterface.register(FLOAT32, sdpa_mask)
