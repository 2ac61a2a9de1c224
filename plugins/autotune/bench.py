"""Operands of a layer's product on a GPU, as the tuner times it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from plugins.autotune import timing
from plugins.common.errors import UserError
from plugins.common.linear_shape import LinearShape
from plugins.libtwofour import hybrid_ops, structures, torch_ops


@dataclass
class Bench:
    """Operands of one shape on the GPU, made once for all buckets and freed with it."""

    shape: LinearShape
    device: torch.device
    most_tokens: int
    l2_bytes: int
    out: str = "bf16"  # what the product of 8-bit weights is written in
    weights: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        s, dtype = self.shape, torch_ops.DTYPES[self.shape.format]
        self.dense = timing.random_sparse(s.out_features, s.in_features, dtype, self.device, pattern=s.pattern)
        self.x = timing.random_operand(self.most_tokens, s.in_features, dtype, self.device)
        self.out_dtype = dtype if dtype in (torch.float16, torch.bfloat16) else torch_ops.DTYPES[self.out]
        self.scale = 1.0 if self.out_dtype == dtype else 2.0**-10
        rows = torch.full((s.out_features,), self.scale, device=self.device)
        self.channel_scales = rows if s.format == "int8" else None

    def copies(self, kernel: str) -> list[torch.Tensor]:
        """As many copies of the prepared weight as defeat the L2 cache."""
        if kernel not in self.weights:
            first = self.prepare(kernel)
            count = timing.copies_to_fill(first.nbytes, self.l2_bytes)
            self.weights[kernel] = [first, *(first.clone() for _ in range(count - 1))]
        return self.weights[kernel]

    def prepare(self, kernel: str) -> torch.Tensor:
        """The weight as the kernel takes it."""
        return torch_ops.prepare(self.dense, kernel)

    def problem(self, kernel: str, x_MK: torch.Tensor) -> structures.Gemm:
        """A product of the kernel with the first tokens, as libtwofour describes it."""
        s = self.shape
        return torch_ops.describe(kernel, x_MK, s.out_features, self.out_dtype, self.scale, self.channel_scales)


@dataclass
class HybridBench(Bench):
    """Operands of a whole layer that is sparse in part, for the one kernel of both parts."""

    cut: hybrid_ops.Cut = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        s, dtype = self.shape, self.dense.dtype
        sparse, _ = self.cut.split(self.dense)
        rows, columns = sparse.shape
        part = timing.random_sparse(rows, columns, dtype, self.device, pattern=self.cut.pattern)
        self.dense = timing.random_operand(s.out_features, s.in_features, dtype, self.device)
        self.cut.split(self.dense)[0].copy_(part)

    def prepare(self, kernel: str) -> torch.Tensor:
        return hybrid_ops.prepare(self.dense, self.cut)

    def problem(self, kernel: str, x_MK: torch.Tensor) -> structures.Gemm:
        s = self.shape
        return hybrid_ops.describe(self.cut, x_MK, s.out_features, self.out_dtype, self.scale, self.channel_scales)


def workspace_of(device: torch.device, required: int) -> tuple[torch.Tensor, tuple[str, ...]]:
    """`required` bytes, or the free memory: then algorithms that need more are skipped, with a note."""
    size = required
    while True:
        try:
            workspace = torch.empty(size, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            if size <= 1 << 20:
                raise UserError("no GPU memory is left for a workspace: free memory, or tune a smaller model") from None
            size //= 2
        else:
            short = (f"only {size >> 20} MiB of GPU memory for a workspace",) if size < required else ()
            return workspace, short
