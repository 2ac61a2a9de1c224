"""The linear layer that is sparse in part: two layers, each on the kernel of its kind, of slices of x or of y; where it
was the fastest on a GPU, one launch for both (one_launch.py).

Legend: M tokens, N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from plugins.libtwofour import cpu
from plugins.linear.cpu_linear import CpuLinear, apply, join_parts
from plugins.linear.hybrid_tensors import Tensors, common, decode, join, parts_of
from plugins.linear.torch_linear import InputQuantizer, Linear
from plugins.sparsity.segments import Segments

if TYPE_CHECKING:
    from plugins.linear.one_launch import Choices, OneLaunch

Build = Callable[[Tensors], Linear]


def build_hybrid(tensors: Tensors, build: Build, dense: bool = False, one_launch: Choices = ()) -> Linear:
    """The layer that `tensors` (hybrid_tensors.py) describe; `build` makes each part from its own tensors.

    If the parts are not slices, or `dense` is requested, the layer is one dense one. `one_launch`: at which numbers of
    tokens one launch multiplies both parts.
    """
    joined = tuple(tensors["weight_joined"].tolist()) if "weight_joined" in tensors else ()
    cut = None if dense else parts_of(tensors)
    if cut is None:
        layer = build({"weight": join(tensors), **common(tensors)})
        layer.pattern = None if dense else decode(tensors["weight_segments"]).pattern
        layer.sparse_rows = joined
        return layer
    segments, parts = cut
    if segments.axis == "inputs":
        parts[1].pop("bias", None)  # it is added once
    hybrid = HybridLinear([build(stored) for stored in parts], segments)
    hybrid.sparse_rows = joined
    if one_launch:
        hybrid.multiply_at_once(join(tensors), one_launch)
    return hybrid


class HybridLinear(Linear):
    """x [..., K] -> y [..., N]: of rows, two halves of y; of inputs, the sum of two products.

    Parts of 8 bit that round their inputs alike have them rounded once, by the layer or by the operator before it.
    """

    def __init__(self, parts: Sequence[Linear], segments: Segments) -> None:
        super().__init__()
        self.sparse_part, self.dense_part = parts
        self.segments = segments
        self.format, self.pattern, self.dtype = self.sparse_part.format, segments.pattern, self.sparse_part.dtype
        self.kernel = " and ".join(dict.fromkeys(part.kernel for part in parts))
        self.refused = self.sparse_part.refused
        by_row = segments.axis == "rows"
        self.out_features = sum(part.out_features for part in parts) if by_row else parts[0].out_features
        self.in_features = parts[0].in_features if by_row else sum(part.in_features for part in parts)
        self.quantizer = _common_quantizer(self.sparse_part, self.dense_part, by_row)
        self.operand = None if self.quantizer is None else self.sparse_part.operand
        self.one_launch: OneLaunch | None = None
        self._problems: dict[tuple[int, int], cpu.Linear] = {}

    def multiply_at_once(self, w_NK: torch.Tensor, choices: Choices) -> None:
        """Multiplies by the whole weight [N, K] in one launch where `choices` has it and a kernel can."""
        from plugins.linear import one_launch

        parts = [self.sparse_part, self.dense_part]
        self.one_launch = one_launch.build(w_NK, self.segments, parts, self.operand, choices)
        if self.one_launch is not None:
            self.kernel = f"{self.one_launch.cut.kernel} or {self.kernel}"

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
        return self.multiply(x.view(-1, self.in_features)).view(*x.shape[:-1], -1)

    def multiply(self, q_MK: torch.Tensor) -> torch.Tensor:
        y_MN = q_MK.new_empty(q_MK.shape[0], self.out_features, dtype=self.dtype)
        self.write(y_MN, q_MK)
        return y_MN

    def write(self, y_MN: torch.Tensor, x_MK: torch.Tensor, add: bool = False) -> None:
        if not add and self.one_launch is not None and self.one_launch.takes(x_MK.shape[0]):
            self.one_launch.write(y_MN, x_MK)
            return
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
