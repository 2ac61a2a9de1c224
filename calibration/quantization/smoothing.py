"""SmoothQuant (Xiao et al., 2023, arXiv 2211.10438) for int8 activations with a scale for each token.

Input channel k is multiplied by s_k and the weight's column divided by it: s_k = sqrt(largest |weight| / largest
|input|), the paper's alpha of 0.5; 1 for a channel without inputs or without weights, as pruning leaves some. Layers
that read the same input, and that runtimes fuse, share s.

Legend: N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from plugins.common.fused_layers import fused_name, fused_parts

SMALLEST, LARGEST = 1e-4, 1e4  # of s, as in ModelOpt


@torch.no_grad()
def smooth(model: nn.Module, layers: Sequence[str]) -> None:
    """Smooths `layers`, whose input quantizers hold a range a channel, and scales their inputs token by token."""
    from modelopt.torch.quantization.model_calib import apply_pre_quant_scale_and_smooth

    for names in _groups(layers):
        group: list[Any] = [model.get_submodule(name) for name in names]
        inputs_K = group[0].input_quantizer.amax.float().flatten()
        weights_K = torch.stack([layer.weight.abs().amax(0).float() for layer in group]).amax(0)
        usable_K = (inputs_K > 0) & (weights_K > 0)
        smoothing_K = torch.where(usable_K, (weights_K / inputs_K).sqrt(), 1).clamp(SMALLEST, LARGEST)
        for layer in group:
            layer.input_quantizer.reset_amax()
            layer.input_quantizer.axis = None
            apply_pre_quant_scale_and_smooth(layer, smoothing_K)
            each_token = {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}}  # as ModelOpt's configs write it
            layer.input_quantizer.set_from_attribute_config(each_token)


def _groups(layers: Sequence[str]) -> Iterator[list[str]]:
    """The layers that share an input, where all of them are among `layers`; each other one by itself."""
    done: set[str] = set()
    for name in layers:
        if name in done:
            continue
        names = list(fused_parts(fused_name(name)))
        group = names if set(names) <= set(layers) else [name]
        done |= set(group)
        yield group
