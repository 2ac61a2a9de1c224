"""Both parts of a weight that is sparse in part in one launch, as a torch operator:

    torch.ops.twofour.hybrid_into(y_MN!, x_MK, packed, pattern, axis, sparse, scale, channel_scales, bias)

y_MN = the product, as torch_ops.py defines it, for 1 to 64 tokens. The first `sparse` rows (axis "rows") or inputs
("inputs") of the weight hold the pattern. On CUDA libtwofour runs, from SM90 on; on a CPU the reference.

Legend: M tokens, N out_features, K in_features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from plugins.common.defaults import MAX_SKINNY_TOKENS
from plugins.common.errors import UserError
from plugins.common.patterns import HYBRID, Pattern, hybrid_kernel
from plugins.libtwofour import structures, torch_ops
from plugins.libtwofour.cpu_forms import FORMATS, pack_skinny, reference_linear, unpack_skinny
from plugins.sparsity import skinny_layout_dense
from plugins.sparsity.segments import Axis
from plugins.sparsity.torch_packing import from_numpy, to_numpy


class Cut(NamedTuple):
    """Where a weight is sparse: its first `size` rows or inputs hold the pattern."""

    pattern: Pattern
    axis: Axis
    size: int

    @property
    def kernel(self) -> str:
        return hybrid_kernel(self.pattern)

    @property
    def sizes(self) -> tuple[int, int]:
        """As libtwofour takes them: sparse rows and sparse inputs, one of which is 0."""
        return (self.size, 0) if self.axis == "rows" else (0, self.size)

    def split(self, w_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sparse part and the dense one."""
        axis = 0 if self.axis == "rows" else 1
        return w_NK.narrow(axis, 0, self.size), w_NK.narrow(axis, self.size, w_NK.shape[axis] - self.size)


def supports(pattern: str) -> bool:
    """Whether there is a kernel for the pattern."""
    return pattern in HYBRID


@torch.library.custom_op("twofour::hybrid_into", mutates_args=("y_MN",), device_types="cpu")
def hybrid_into(
    y_MN: torch.Tensor,
    x_MK: torch.Tensor,
    packed: torch.Tensor,
    pattern: str,
    axis: str,
    sparse: int,
    scale: float,
    channel_scales: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    """Writes the product to y. x and y may be slices. Raises UserError above 64 tokens."""
    if x_MK.shape[0] > MAX_SKINNY_TOKENS:
        raise UserError(
            f"{x_MK.shape[0]} tokens: the hybrid kernel takes 1 to {MAX_SKINNY_TOKENS}; multiply each part by itself"
        )
    cut = Cut(pattern, axis, sparse)  # type: ignore[arg-type]
    w_NK = unpack(packed, (y_MN.shape[1], x_MK.shape[1]), x_MK.dtype, cut)
    y_MN.copy_(reference_linear(x_MK, w_NK, scale, channel_scales, bias, y_MN.dtype))


def launch(
    y_MN: torch.Tensor,
    x_MK: torch.Tensor,
    packed: torch.Tensor,
    pattern: str,
    axis: str,
    sparse: int,
    scale: float,
    channel_scales: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    """`hybrid_into` on CUDA: one call of libtwofour on torch's current stream."""
    if x_MK.shape[0]:
        cut = Cut(pattern, axis, sparse)  # type: ignore[arg-type]
        problem = describe(cut, x_MK, y_MN.shape[1], y_MN.dtype, scale, channel_scales, bias)
        torch_ops.run(problem, x_MK, packed, y_MN)


hybrid_into.register_kernel("cuda")(launch)


@hybrid_into.register_fake
def _(*_: Any) -> None:
    return None


def describe(
    cut: Cut,
    x_MK: torch.Tensor,
    out_features: int,
    out_dtype: torch.dtype,
    scale: float = 1.0,
    channel_scales: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> structures.Gemm:
    """The problem of one call as libtwofour describes it. The tensors must outlive it."""
    problem = torch_ops.describe(cut.kernel, x_MK, out_features, out_dtype, scale, channel_scales, bias)
    problem.sparse_rows, problem.sparse_inputs = cut.sizes
    return problem


def prepare(w_NK: torch.Tensor, cut: Cut) -> torch.Tensor:
    """A weight [N, K] as the kernel takes it: the packed sparse part and then the packed dense one, uint8.

    Raises UserError naming the first row and group that breaks the pattern, or what the kernel cannot take.
    """
    w_NK = w_NK.detach().contiguous()
    if w_NK.is_cuda:
        return torch_ops.prepare_on_device(w_NK, cut.kernel, cut.sizes)
    sparse, dense = cut.split(w_NK)
    packed = pack_skinny(sparse.contiguous(), cut.pattern)
    return torch.cat([packed, torch.from_numpy(skinny_layout_dense.pack(to_numpy(dense), FORMATS[w_NK.dtype]))])


def unpack(packed: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype, cut: Cut) -> torch.Tensor:
    """The weight of `shape` (N, K) that `prepare` packed."""
    rows = cut.axis == "rows"
    sparse = (cut.size, shape[1]) if rows else (shape[0], cut.size)
    dense = (shape[0] - cut.size, shape[1]) if rows else (shape[0], shape[1] - cut.size)
    size = packed.numel() - skinny_layout_dense.packed_bytes(*dense, FORMATS[dtype])
    first = to_numpy(unpack_skinny(packed[:size], sparse, dtype, cut.pattern))
    rest = skinny_layout_dense.unpack(packed[size:].numpy(), *dense, FORMATS[dtype])
    whole = np.concatenate([first.view(rest.dtype), rest], 0 if rows else 1)
    return from_numpy(whole, dtype)
