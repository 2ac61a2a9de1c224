"""The KV cache: blocks of 64 positions (PagedAttention, Kwon et al., arXiv 2309.06180), 16-bit, INT8 or FP8.

A table [B, N] int32 names the blocks that hold each sequence, in order. Block 0 takes what padded rows write. The cache
is allocated when the first request runs; on a CPU the system gives it memory as blocks are written.

An 8-bit cache holds round(k / k_scale), with one static scale a layer and side. The scales never touch a cached
element: k_scale goes into the softmax scale, v_scale onto the attention's output.

Legend: P blocks, H key-value heads, S positions of a block, D head_dim, B sequences, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from builder.planning.kv_capacity import BLOCK
from plugins.common import numerics
from plugins.common.formats import EIGHT_BIT

STORED = {format.value: getattr(torch, format.dtype) for format in EIGHT_BIT}


def blocks_for(tokens: int) -> int:
    """How many blocks hold `tokens` tokens."""
    return -(-tokens // BLOCK)


def table_of(blocks: Sequence[Sequence[int]], width: int) -> torch.Tensor:
    """The table [B, width] int32 of the blocks of B sequences; block 0 where there is none."""
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in blocks], dtype=torch.int32)


def token_bytes(kind: str, dtype: torch.dtype, layers: int, heads: int, head_dim: int) -> int:
    """Bytes that the keys and values of one token take."""
    return 2 * layers * heads * head_dim * int(STORED.get(kind, dtype).itemsize)


class KVCache:
    """Keys and values [P + 1, H, S, D] of every layer; `scales` are its (k_scale, v_scale), (1, 1) at 16 bit."""

    def __init__(
        self,
        scales: list[tuple[float, float]],
        blocks: int,
        heads: int,
        head_dim: int,
        *,
        kind: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.kind, self.dtype, self.scales = kind, dtype, scales
        self._multipliers: list[tuple[torch.Tensor, ...]] = [
            tuple(torch.full((1,), 1 / scale, device=device) for scale in pair) for pair in scales
        ]
        self._shape, self._stored, self.device = (blocks + 1, heads, BLOCK, head_dim), STORED.get(kind, dtype), device

    @cached_property
    def keys(self) -> list[torch.Tensor]:
        return self._allocate()

    @cached_property
    def values(self) -> list[torch.Tensor]:
        return self._allocate()

    def _allocate(self) -> list[torch.Tensor]:
        # zeros, not empty: a masked position weighs 0, and 0 * NaN would be NaN
        return [self._zeros() for _ in self.scales]

    def _zeros(self) -> torch.Tensor:
        if self.device.type != "cpu":
            return torch.zeros(self._shape, dtype=self._stored, device=self.device)
        nbytes = math.prod(self._shape) * int(self._stored.itemsize)
        return torch.from_numpy(np.zeros(nbytes, np.uint8)).view(self._stored).view(self._shape)  # touches no memory

    @property
    def nbytes(self) -> int:
        """Bytes that it takes once it is allocated."""
        return 2 * len(self.scales) * math.prod(self._shape) * int(self._stored.itemsize)

    def multipliers(self, layer: int) -> tuple[torch.Tensor | None, ...]:
        """The factors of keys and values before rounding, [1] each; None in a 16-bit cache."""
        return (None, None) if self.kind == "none" else self._multipliers[layer]

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of any shape as the cache holds them."""
        if self.kind == "none":
            return k, v
        quantize = numerics.quantize_int8 if self.kind == "int8" else numerics.quantize_fp8
        k_multiplier, v_multiplier = self._multipliers[layer]
        return quantize(k, k_multiplier), quantize(v, v_multiplier)

    def load(self, stored: torch.Tensor) -> torch.Tensor:
        """What the cache holds as numbers to compute with, still divided by their scale."""
        if self.kind == "none":
            return stored
        if self.kind == "fp8" and not stored.is_cuda:
            stored = numerics.fp8_values(stored)
        return stored.to(self.dtype)

    def write(
        self, layer: int, blocks_T: torch.Tensor, slots_T: torch.Tensor, k_THD: torch.Tensor, v_THD: torch.Tensor
    ) -> None:
        """Puts stored keys and values of T tokens at slots of blocks."""
        for cache, new in ((self.keys[layer], k_THD), (self.values[layer], v_THD)):
            if cache.element_size() == 1:  # not every operator supports float8
                cache, new = cache.view(torch.uint8), new.view(torch.uint8)
            cache[blocks_T, :, slots_T] = new

    def read(self, layer: int, table_BN: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `length` keys and values [B, H, length, D] of each sequence, as `load` has them."""
        index = table_BN[:, : blocks_for(length)].long()
        k, v = (
            self.load(cache[layer][index].transpose(1, 2).flatten(2, 3)[:, :, :length])
            for cache in (self.keys, self.values)
        )
        return k, v
