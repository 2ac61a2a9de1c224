"""The stored form of a layer that is 2:4 in part, beside the tensors of any layer (factory.py), in place of `weight`:

    weight_values, weight_indices   the 2:4 rows or inputs side by side, packed
    weight_dense                    the others
    weight_segments                 int32: the axis, then kind and size of each segment in order
    weight_joined                   int32: the 2:4 rows of each layer that this one joins (joined.py); never in a file

Legend: N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from plugins.common.errors import UserError
from plugins.sparsity.segments import Axis, Kind, Segments
from plugins.sparsity.torch_packing import pack, unpack

AXES: tuple[Axis, ...] = ("rows", "inputs")
KINDS: tuple[Kind, ...] = ("dense", "2:4")
ALONG = {"rows": ("weight_scale", "bias"), "inputs": ("pre_quant_scale",)}  # what is cut with the weight

Tensors = Mapping[str, torch.Tensor]


def encode(segments: Segments) -> torch.Tensor:
    """`weight_segments` of a layer."""
    parts = [code for part in segments.parts for code in (KINDS.index(part.kind), part.size)]
    return torch.tensor([AXES.index(segments.axis), *parts], dtype=torch.int32)


def decode(stored: torch.Tensor) -> Segments:
    """The segments that `encode` took. Raises UserError where the tensor is damaged."""
    axis, *parts = stored.tolist()
    if axis not in (0, 1) or len(parts) % 2 or set(parts[::2]) - {0, 1}:
        raise UserError(f"weight_segments {stored.tolist()} are damaged: build the engine again")
    return Segments.of(AXES[axis], [(KINDS[kind], size) for kind, size in zip(parts[::2], parts[1::2], strict=True)])


def split(weight_NK: torch.Tensor, segments: Segments) -> dict[str, torch.Tensor]:
    """The stored form of a weight [N, K]. Raises UserError where a 2:4 segment is not 2:4."""
    axis = AXES.index(segments.axis)
    sparse, dense = (_select(weight_NK, axis, segments, kind) for kind in ("2:4", "dense"))
    values, indices = pack(sparse)
    return {
        "weight_values": values,
        "weight_indices": indices,
        "weight_dense": dense,
        "weight_segments": encode(segments),
    }


def join(tensors: Tensors) -> torch.Tensor:
    """The weight [N, K] that `split` took."""
    segments, dense = decode(tensors["weight_segments"]), tensors["weight_dense"]
    axis, sparse = AXES.index(segments.axis), unpack(tensors["weight_values"], tensors["weight_indices"])
    side_by_side = torch.cat([_bits(sparse), _bits(dense)], axis)
    places = torch.cat([_indices(segments, kind) for kind in ("2:4", "dense")]).to(dense.device)
    return side_by_side.index_select(axis, places.argsort()).view(dense.dtype)


def parts_of(tensors: Tensors) -> tuple[Segments, list[dict[str, torch.Tensor]]] | None:
    """Segments, and the tensors of the 2:4 and of the dense part, each as of a layer of its own.

    None where ranks hold their shares of both kinds: these parts are not slices.
    """
    segments = decode(tensors["weight_segments"])
    if [part.kind for part in segments.parts] != ["2:4", "dense"]:
        return None
    parts = [
        {"weight_values": tensors["weight_values"], "weight_indices": tensors["weight_indices"]},
        {"weight": tensors["weight_dense"]},
    ]
    for stored, part in zip(parts, segments.parts, strict=True):
        for name, tensor in common(tensors).items():
            cut = name in ALONG[segments.axis] and tensor.numel() == segments.size
            stored[name] = tensor[part.slice].clone() if cut else tensor
    return segments, parts


def common(tensors: Tensors) -> dict[str, torch.Tensor]:
    """The tensors of any layer."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("weight_") or "scale" in name}


def _select(weight_NK: torch.Tensor, axis: int, segments: Segments, kind: Kind) -> torch.Tensor:
    places = _indices(segments, kind).to(weight_NK.device)
    return _bits(weight_NK).index_select(axis, places).view(weight_NK.dtype)


def _indices(segments: Segments, kind: Kind) -> torch.Tensor:
    return torch.from_numpy(segments.indices(kind))


def _bits(weight: torch.Tensor) -> torch.Tensor:
    """float8 has no index_select on a CPU: its bytes have."""
    return weight.view(torch.uint8) if weight.element_size() == 1 else weight
