"""One FP8 weight scale for the layers that runtimes fuse.

TensorRT-LLM and vLLM run q, k and v as one product, gate and up as another, with one scale each: they bring the parts
to the largest of their scales when they load, and round the weights a second time. Given one scale from the start,
nothing is rounded twice, and the evaluated weights are the served ones.
"""

from __future__ import annotations

import torch
from torch import nn

from plugins.common.fused_layers import FUSED


def share_weight_scales(model: nn.Module) -> int:
    """Gives fused layers' weight quantizers their largest range, where they have one range for the whole tensor.

    Works on a model with calibrated ModelOpt quantizers, in place; returns how many groups were joined. Per-channel
    ranges (INT8) need no joining.
    """
    joined = 0
    for module in model.modules():
        for group in FUSED.values():
            quantizers = [getattr(getattr(module, name, None), "weight_quantizer", None) for name in group]
            ranges = [_tensor_range(quantizer) for quantizer in quantizers]
            present = [amax for amax in ranges if amax is not None]
            if len(present) < len(group):
                continue
            largest = torch.stack([amax.reshape(()).float() for amax in present]).max()
            for quantizer in quantizers:
                assert quantizer is not None
                quantizer.amax = largest.to(quantizer.amax.dtype)
            joined += 1
    return joined


def _tensor_range(quantizer: nn.Module | None) -> torch.Tensor | None:
    """The range of an enabled quantizer that has one for the whole tensor."""
    if quantizer is None or not getattr(quantizer, "is_enabled", False):
        return None
    amax: torch.Tensor | None = getattr(quantizer, "amax", None)
    return amax if amax is not None and amax.numel() == 1 else None
