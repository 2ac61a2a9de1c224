"""One product for layers that read the same input: q, k and v, and gate and up.

Legend: M tokens, N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from plugins.linear.torch_linear import Linear

GROUPS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
ROWS = ("weight", "weight_values", "weight_indices", "bias")  # tensors of N rows, laid one after the other
SHARED = ("input_scale", "pre_quant_scale")  # of the input: one product has one
KNOWN = {*ROWS, *SHARED, "weight_scale"}


def join(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor] | None:
    """The stored tensors of one layer that puts out what `parts` do, side by side, number for number.

    Weight scales that differ become one a row. None where no one product gives the same numbers: another format, only
    some 2:4, or inputs scaled differently.
    """
    first = parts[0]
    if any(set(part) != set(first) for part in parts) or not set(first) <= KNOWN:
        return None
    if any(part[name].dtype != first[name].dtype for part in parts for name in first):
        return None
    if any(not torch.equal(part[name], first[name]) for part in parts for name in SHARED if name in first):
        return None
    joined = {name: _stack([part[name] for part in parts]) for name in ROWS if name in first}
    joined |= {name: first[name] for name in SHARED if name in first}
    if "weight_scale" in first:
        joined["weight_scale"] = _join_scales(parts)
    return joined


def _stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """All rows; those of 8 bit as bytes, as not every operator knows float8."""
    dtype = tensors[0].dtype
    if dtype.itemsize > 1:
        return torch.cat(list(tensors))
    return torch.cat([tensor.view(torch.uint8) for tensor in tensors]).view(dtype)


def _join_scales(parts: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    scales = [part["weight_scale"].reshape(-1) for part in parts]
    if all(scale.numel() == 1 and torch.equal(scale, scales[0]) for scale in scales):
        return scales[0]
    weights = [part["weight_values" if "weight_values" in part else "weight"] for part in parts]
    return torch.cat([scale.expand(weight.shape[0]) for scale, weight in zip(scales, weights, strict=True)])


class SideBySide(Linear):
    """Layers that one product cannot replace: each multiplies by itself, its input rounded once where all agree."""

    def __init__(self, layers: Sequence[Linear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.format, self.sparse = "+".join(dict.fromkeys(x.format for x in layers)), any(x.sparse for x in layers)
        self.dtype = layers[0].dtype
        self.kernel = " and ".join(dict.fromkeys(layer.kernel for layer in layers))
        self.out_features, self.in_features = sum(layer.out_features for layer in layers), layers[0].in_features
        if all(layer.operand == layers[0].operand and _round_alike(layer, layers[0]) for layer in layers):
            self.quantizer, self.operand = layers[0].quantizer, layers[0].operand

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in self.layers], dim=-1)

    def multiply(self, q_MK: torch.Tensor) -> torch.Tensor:
        y_MN = q_MK.new_empty(q_MK.shape[0], self.out_features, dtype=self.dtype)
        for layer, columns in zip(
            self.layers, y_MN.split([layer.out_features for layer in self.layers], 1), strict=True
        ):
            layer.write(columns, q_MK)
        return y_MN


def _round_alike(layer: Linear, other: Linear) -> bool:
    return layer.quantizer is not None and other.quantizer is not None and layer.quantizer.rounds_like(other.quantizer)
