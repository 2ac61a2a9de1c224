"""The linear layer that is 2:4 in part: two layers, each on the kernel of its kind, of slices of x or of y.

Stored beside the tensors of any layer (factory.py), in place of `weight`:

    weight_values, weight_indices   the 2:4 rows or inputs side by side, packed
    weight_dense                    the others
    weight_segments                 int32: the axis, then kind and size of each segment in order

Legend: M tokens, N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from plugins.common.errors import UserError
from plugins.libtwofour import cpu
from plugins.linear.cpu_linear import CpuLinear, apply, join_parts
from plugins.linear.torch_linear import InputQuantizer, Linear
from plugins.sparsity.segments import Axis, Kind, Segments
from plugins.sparsity.torch_packing import pack, unpack

AXES: tuple[Axis, ...] = ("rows", "inputs")
KINDS: tuple[Kind, ...] = ("dense", "2:4")
ALONG = {"rows": ("weight_scale", "bias"), "inputs": ("pre_quant_scale",)}  # what is cut with the weight

Tensors = Mapping[str, torch.Tensor]
Build = Callable[[Tensors], Linear]


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


def build_hybrid(tensors: Tensors, build: Build) -> Linear:
    """The layer that `tensors` describe; `build` makes each part from its own tensors.

    Where ranks hold their shares of both kinds the parts are no slices, and the layer is one dense one.
    """
    segments = decode(tensors["weight_segments"])
    common = {name: tensor for name, tensor in tensors.items() if not name.startswith("weight_") or "scale" in name}
    if [part.kind for part in segments.parts] != ["2:4", "dense"]:
        layer = build({"weight": join(tensors), **common})
        layer.sparse = True
        return layer
    parts = [
        {"weight_values": tensors["weight_values"], "weight_indices": tensors["weight_indices"]},
        {"weight": tensors["weight_dense"]},
    ]
    for stored, part in zip(parts, segments.parts, strict=True):
        for name, tensor in common.items():
            cut = name in ALONG[segments.axis] and tensor.numel() == segments.size
            stored[name] = tensor[part.slice].clone() if cut else tensor
    if segments.axis == "inputs":
        parts[1].pop("bias", None)  # it is added once
    return HybridLinear([build(stored) for stored in parts], segments)


class HybridLinear(Linear):
    """x [..., K] -> y [..., N]: of rows, two halves of y; of inputs, the sum of two products.

    Parts of 8 bit that round their inputs alike have them rounded once, by the layer or by the operator before it.
    """

    def __init__(self, parts: Sequence[Linear], segments: Segments) -> None:
        super().__init__()
        self.sparse_part, self.dense_part = parts
        self.segments = segments
        self.format, self.sparse, self.dtype = self.sparse_part.format, True, self.sparse_part.dtype
        self.kernel = " and ".join(dict.fromkeys(part.kernel for part in parts))
        self.refused = self.sparse_part.refused
        by_row = segments.axis == "rows"
        self.out_features = sum(part.out_features for part in parts) if by_row else parts[0].out_features
        self.in_features = parts[0].in_features if by_row else sum(part.in_features for part in parts)
        self.quantizer = _common_quantizer(self.sparse_part, self.dense_part, by_row)
        self.operand = None if self.quantizer is None else self.sparse_part.operand
        self._problems: dict[tuple[int, int], cpu.Linear] = {}

    @property
    def on_cpu_kernels(self) -> bool:
        """Whether one call computes both parts."""
        return isinstance(self.sparse_part, CpuLinear) and isinstance(self.dense_part, CpuLinear)

    def problem(self, tokens: int) -> cpu.Linear:
        """Both parts as libtwofour_cpu takes them, with the kernels that multiply `tokens` rows."""
        assert isinstance(self.sparse_part, CpuLinear)
        assert isinstance(self.dense_part, CpuLinear)
        first, rest = self.sparse_part.problem(tokens), self.dense_part.problem(tokens)
        key = (id(first), id(rest))  # which the parts keep
        if key not in self._problems:
            self._problems[key] = join_parts(first, rest, self.segments.axis)
        return self._problems[key]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.on_cpu_kernels:
            return apply(self.problem(x.numel() // self.in_features), x, self.out_features)
        if self.quantizer is not None:
            x = self.quantizer(x)
        return self.multiply(x.reshape(-1, self.in_features)).view(*x.shape[:-1], -1)

    def multiply(self, q_MK: torch.Tensor) -> torch.Tensor:
        y_MN = q_MK.new_empty(q_MK.shape[0], self.out_features, dtype=self.dtype)
        self.write(y_MN, q_MK)
        return y_MN

    def write(self, y_MN: torch.Tensor, x_MK: torch.Tensor, add: bool = False) -> None:
        first, rest = (part.slice for part in self.segments.parts)
        if self.segments.axis == "rows":
            self._write(self.sparse_part, y_MN[:, first], x_MK, add)
            self._write(self.dense_part, y_MN[:, rest], x_MK, add)
        else:
            self._write(self.sparse_part, y_MN, x_MK[:, first], add)
            self._write(self.dense_part, y_MN, x_MK[:, rest], add=True)

    def _write(self, part: Linear, y_MN: torch.Tensor, x_MK: torch.Tensor, add: bool) -> None:
        if self.operand is None and part.operand is not None and part.quantizer is not None:
            x_MK = part.quantizer(x_MK)  # otherwise than the other part does
        part.write(y_MN, x_MK, add)


def _common_quantizer(sparse: Linear, dense: Linear, by_row: bool) -> InputQuantizer | None:
    """What rounds the whole input as each part rounds its own; None where none does."""
    first, rest = sparse.quantizer, dense.quantizer
    if first is None or rest is None or sparse.operand is None or sparse.operand != dense.operand:
        return None
    if torch.equal(first.multiplier, rest.multiplier) and (by_row or first.multiplier.numel() == 1):
        return InputQuantizer(first.multiplier, first.quantize)
    if by_row:
        return None
    of_inputs = [part.quantizer.multiplier.expand(part.in_features) for part in (sparse, dense) if part.quantizer]
    return InputQuantizer(torch.cat(of_inputs), first.quantize)


def _select(weight_NK: torch.Tensor, axis: int, segments: Segments, kind: Kind) -> torch.Tensor:
    places = _indices(segments, kind).to(weight_NK.device)
    return _bits(weight_NK).index_select(axis, places).view(weight_NK.dtype)


def _indices(segments: Segments, kind: Kind) -> torch.Tensor:
    return torch.from_numpy(segments.indices(kind))


def _bits(weight: torch.Tensor) -> torch.Tensor:
    """float8 has no index_select on a CPU: its bytes have."""
    return weight.view(torch.uint8) if weight.element_size() == 1 else weight
