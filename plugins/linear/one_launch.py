"""A hybrid layer's product in one launch (libtwofour/hybrid_ops.py), at the numbers of tokens where it was the fastest.

Legend: M tokens, N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from plugins.common.defaults import MAX_SKINNY_TOKENS
from plugins.common.patterns import hybrid_kernel
from plugins.libtwofour import hybrid_ops
from plugins.libtwofour.bindings import LibraryError
from plugins.linear.factory import UNFIT
from plugins.linear.kernel_linear import KernelLinear
from plugins.linear.torch_linear import Linear
from plugins.sparsity.segments import Axis, Segments

Choices = Sequence[tuple[int, bool]]
"""(tokens, whether one launch multiplies up to so many) in ascending order; above the last, two products do."""


def choices_of(tactics: Mapping[str, Any] | None, pattern: str) -> Choices:
    """The choices of a layer's entry in tactics.json: none without a measurement."""
    if tactics is None or not hybrid_ops.supports(pattern):
        return ()
    kernel = hybrid_kernel(pattern)
    chosen = sorted((int(bucket["tokens"]), bucket["kernel"] == kernel) for bucket in tactics["buckets"])
    return [choice for choice in chosen if choice[0] <= MAX_SKINNY_TOKENS] if any(one for _, one in chosen) else ()


class OneLaunch(nn.Module):
    """Both parts packed for one kernel."""

    def __init__(self, w_NK: torch.Tensor, cut: hybrid_ops.Cut, parts: Sequence[Linear], choices: Choices) -> None:
        super().__init__()
        self.cut, self.choices = cut, tuple(choices)
        self.packed = nn.Buffer(hybrid_ops.prepare(w_NK, cut), persistent=False)
        self.scale, channel_scales = _scale(parts, cut.axis)
        self.channel_scales = None if channel_scales is None else nn.Buffer(channel_scales, persistent=False)
        bias = _bias(parts)
        self.bias = None if bias is None else nn.Buffer(bias, persistent=False)

    def takes(self, tokens: int) -> bool:
        """Whether it multiplies so many rows."""
        for most, one in self.choices:  # no bisect: torch.compile traces this
            if tokens <= most:
                return one
        return False

    def write(self, y_MN: torch.Tensor, x_MK: torch.Tensor) -> None:
        """y [M, N] = the product of x [M, K], rounded already where the layer is of 8 bit. Both may be slices."""
        hybrid_ops.hybrid_into(y_MN, x_MK, self.packed, *self.cut, self.scale, self.channel_scales, self.bias)


def build(
    w_NK: torch.Tensor, segments: Segments, parts: Sequence[Linear], operand: torch.dtype | None, choices: Choices
) -> OneLaunch | None:
    """None where no number of tokens has one launch, or the parts or the library cannot take it.

    `operand`: the 8-bit dtype of the input that both parts take.
    """
    sparse, dense = parts
    eight_bit = w_NK.dtype.itemsize == 1
    if not any(one for _, one in choices) or not isinstance(sparse, KernelLinear):
        return None
    if eight_bit and (operand is None or not isinstance(dense, KernelLinear)):
        return None
    w_NK = w_NK.to(next(sparse.buffers()).device)
    cut = hybrid_ops.Cut(segments.pattern, segments.axis, segments.parts[0].size)
    try:
        return OneLaunch(w_NK if eight_bit else w_NK.to(sparse.dtype), cut, parts, choices)
    except LibraryError as error:
        if error.status not in (*UNFIT, "SM unsupported"):
            raise
        return None


def _scale(parts: Sequence[Linear], axis: Axis) -> tuple[float, torch.Tensor | None]:
    """One number, or one a row."""
    scaled = [part for part in parts if isinstance(part, KernelLinear)]
    first, last = scaled[0], scaled[-1]
    if axis == "inputs" or len(scaled) == 1:  # 16 bit, or both have all rows
        return first.scale, first.channel_scales
    if first.channel_scales is None and last.channel_scales is None and first.scale == last.scale:
        return first.scale, None
    rows = [_of_rows(part) for part in (first, last)]
    return 1.0, torch.cat(rows)


def _of_rows(part: KernelLinear) -> torch.Tensor:
    if part.channel_scales is not None:
        return part.channel_scales
    device = next(part.buffers()).device
    return torch.full((part.out_features,), part.scale, dtype=torch.float32, device=device)


def _bias(parts: Sequence[Linear]) -> torch.Tensor | None:
    """Of all rows. Where the inputs are divided, the sparse part alone has one."""
    biases = [part.bias.to(parts[0].dtype) for part in parts if isinstance(part.bias, torch.Tensor)]
    return torch.cat(biases) if biases else None
