"""One product for layers that read the same input: q, k and v, and gate and up.

Legend: M tokens, N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from plugins.linear.hybrid_tensors import Tensors, encode, parts_of
from plugins.linear.torch_linear import Linear
from plugins.sparsity.segments import Segments
from plugins.sparsity.torch_packing import PACKED, VALUES, Packed

ROWS = ("weight", *PACKED, "bias")  # tensors of N rows, laid one after the other
SHARED = ("input_scale", "pre_quant_scale")  # of the input: one product has one
KNOWN = {*ROWS, *SHARED, "weight_scale"}


def join(parts: Sequence[Tensors], unit: int = 1) -> dict[str, torch.Tensor] | None:
    """The stored tensors of one layer that puts out what `parts` do, side by side, number for number.

    Where some are sparse in part, so is the layer: first the sparse rows of all, a multiple of `unit` of each, then the
    dense rows of all. Weight scales that differ become one a row. None where no one product of a kind gives the same
    numbers: another format or pattern, only some sparse, or inputs scaled differently.
    """
    if any("weight_segments" in part for part in parts):
        return _join_hybrid(parts, unit)
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


def _join_hybrid(parts: Sequence[Tensors], unit: int) -> dict[str, torch.Tensor] | None:
    cuts = [_cut(part) for part in parts]
    sparse_rows = [0 if sparse is None else len(sparse[VALUES]) for sparse, _ in cuts]
    if any(cut == (None, None) for cut in cuts) or any(rows % unit for rows in sparse_rows):
        return None
    sparse, dense = (join([half for half in halves if half is not None]) for halves in zip(*cuts, strict=True))
    if sparse is None or dense is None or not _alike(sparse, dense):
        return None
    rows, pattern = (len(sparse[VALUES]), len(dense["weight"])), Packed.of(sparse).pattern
    joined = {name: sparse[name] for name in (*PACKED, *SHARED) if name in sparse}
    joined |= {"weight_dense": dense["weight"], "weight_joined": torch.tensor(sparse_rows, dtype=torch.int32)}
    joined["weight_segments"] = encode(Segments.of("rows", [(pattern, rows[0]), ("dense", rows[1])]))
    if "bias" in sparse:
        joined["bias"] = torch.cat([sparse["bias"], dense["bias"]])
    if "weight_scale" in sparse:
        joined["weight_scale"] = _join_scales([sparse, dense])
    return joined


def _cut(part: Tensors) -> tuple[Tensors | None, Tensors | None]:
    """The tensors of a layer's sparse rows and of its dense ones; neither where it cannot be cut so."""
    if "weight_segments" not in part:
        return (part, None) if VALUES in part else (None, part)
    cut = parts_of(part)
    if cut is None or cut[0].axis != "rows":
        return None, None
    sparse, dense = cut[1]
    return sparse, dense


def _alike(sparse: Tensors, dense: Tensors) -> bool:
    """Whether both have numbers of one format, scales of one kind and the same inputs."""
    if sparse[VALUES].dtype != dense["weight"].dtype:
        return False
    if set(sparse) - set(PACKED) != set(dense) - {"weight"}:
        return False
    return all(torch.equal(sparse[name], dense[name]) for name in SHARED if name in sparse)


def _stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """All rows; those of 8 bit as bytes, as not every operator knows float8."""
    dtype = tensors[0].dtype
    if dtype.itemsize > 1:
        return torch.cat(list(tensors))
    return torch.cat([tensor.view(torch.uint8) for tensor in tensors]).view(dtype)


def _join_scales(parts: Sequence[Tensors]) -> torch.Tensor:
    scales = [part["weight_scale"].reshape(-1) for part in parts]
    if all(scale.numel() == 1 and torch.equal(scale, scales[0]) for scale in scales):
        return scales[0]
    weights = [part[VALUES if VALUES in part else "weight"] for part in parts]
    return torch.cat([scale.expand(weight.shape[0]) for scale, weight in zip(scales, weights, strict=True)])


class SideBySide(Linear):
    """Layers that one product cannot replace: each multiplies by itself, its input rounded once where all agree."""

    def __init__(self, layers: Sequence[Linear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.format = "+".join(dict.fromkeys(x.format for x in layers))
        self.pattern = next((x.pattern for x in layers if x.sparse), None)
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
