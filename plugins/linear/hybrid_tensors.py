"""The stored form of a layer that is sparse in part, beside the tensors of any layer (factory.py), for `weight`:

    weight_values, and its positions   the sparse rows or inputs side by side, packed (torch_packing.py)
    weight_dense                       the others
    weight_segments                    int32: the axis, then kind and size of each segment in order
    weight_joined                      int32: the sparse rows of each layer that this one joins (joined.py); never in a
                                       file

Legend: N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from plugins.common.errors import UserError
from plugins.common.patterns import PATTERNS
from plugins.sparsity.segments import Axis, Kind, Segment, Segments
from plugins.sparsity.torch_packing import PACKED, Packed, pack, unpack

AXES: tuple[Axis, ...] = ("rows", "inputs")
KINDS: tuple[Kind, ...] = ("dense", *PATTERNS)  # 0 and 1 are in engines built before the others
ALONG = {"rows": ("weight_scale", "bias"), "inputs": ("pre_quant_scale",)}  # what is cut with the weight

Tensors = Mapping[str, torch.Tensor]


def encode(segments: Segments) -> torch.Tensor:
    """`weight_segments` of a layer."""
    parts = [code for part in segments.parts for code in (KINDS.index(part.kind), part.size)]
    return torch.tensor([AXES.index(segments.axis), *parts], dtype=torch.int32)


def decode(stored: torch.Tensor) -> Segments:
    """The segments that `encode` took. Raises UserError where the tensor is damaged."""
    axis, *parts = stored.tolist()
    if axis not in (0, 1) or len(parts) % 2 or set(parts[::2]) - set(range(len(KINDS))):
        raise UserError(f"weight_segments {stored.tolist()} are damaged: build the engine again")
    return Segments.of(AXES[axis], [(KINDS[kind], size) for kind, size in zip(parts[::2], parts[1::2], strict=True)])


def split(weight_NK: torch.Tensor, segments: Segments) -> dict[str, torch.Tensor]:
    """The stored form of a weight [N, K]. Raises UserError where a sparse segment does not hold its pattern."""
    sparse, dense = (_select(weight_NK, segments, parts) for parts in (segments.sparse, segments.dense))
    packed = pack(sparse, segments.pattern)
    return {**packed.stored(), "weight_dense": dense, "weight_segments": encode(segments)}


def join(tensors: Tensors) -> torch.Tensor:
    """The weight [N, K] that `split` took."""
    segments, dense = decode(tensors["weight_segments"]), tensors["weight_dense"]
    axis, sparse = AXES.index(segments.axis), unpack(*Packed.of(tensors))
    side_by_side = torch.cat([_bits(sparse), _bits(dense)], axis)
    places = torch.cat([_indices(segments, parts) for parts in (segments.sparse, segments.dense)]).to(dense.device)
    return side_by_side.index_select(axis, places.argsort()).view(dense.dtype)


def parts_of(tensors: Tensors) -> tuple[Segments, list[dict[str, torch.Tensor]]] | None:
    """Segments, and the tensors of the sparse and of the dense part, each as of a layer of its own.

    None where ranks hold their shares of both kinds: these parts are not slices.
    """
    segments = decode(tensors["weight_segments"])
    if not segments.in_two:
        return None
    parts = [{name: tensors[name] for name in PACKED if name in tensors}, {"weight": tensors["weight_dense"]}]
    for stored, part in zip(parts, segments.parts, strict=True):
        for name, tensor in common(tensors).items():
            cut = name in ALONG[segments.axis] and tensor.numel() == segments.size
            stored[name] = tensor[part.slice].clone() if cut else tensor
    return segments, parts


def common(tensors: Tensors) -> dict[str, torch.Tensor]:
    """The tensors of any layer."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("weight_") or "scale" in name}


def _select(weight_NK: torch.Tensor, segments: Segments, parts: Sequence[Segment]) -> torch.Tensor:
    places = _indices(segments, parts).to(weight_NK.device)
    return _bits(weight_NK).index_select(AXES.index(segments.axis), places).view(weight_NK.dtype)


def _indices(segments: Segments, parts: Sequence[Segment]) -> torch.Tensor:
    return torch.from_numpy(segments.indices(parts))


def _bits(weight: torch.Tensor) -> torch.Tensor:
    """float8 has no index_select on a CPU: its bytes have."""
    return weight.view(torch.uint8) if weight.element_size() == 1 else weight
