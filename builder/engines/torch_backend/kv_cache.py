"""The KV cache: one row a running request, 16-bit, INT8 or FP8. It is allocated when the first request runs.

An 8-bit cache holds round(k / k_scale), with one static scale a layer and side. The scales never touch a cached
element: k_scale goes into the softmax scale, v_scale onto the attention's output.

Legend: R rows (max_batch_size), H key-value heads, S positions (max_seq_len), D head_dim.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch

from plugins.common import numerics
from plugins.common.formats import EIGHT_BIT

STORED = {format.value: getattr(torch, format.dtype) for format in EIGHT_BIT}


class KVCache:
    """Keys and values [R, H, S, D] of every layer; `scales` are its (k_scale, v_scale), (1, 1) for a 16-bit cache."""

    def __init__(
        self,
        scales: list[tuple[float, float]],
        rows: int,
        heads: int,
        positions: int,
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
        self._shape, self._stored, self._device = (rows, heads, positions, head_dim), STORED.get(kind, dtype), device

    @cached_property
    def keys(self) -> list[torch.Tensor]:
        return self._allocate()

    @cached_property
    def values(self) -> list[torch.Tensor]:
        return self._allocate()

    def _allocate(self) -> list[torch.Tensor]:
        # zeros, not empty: a masked position weighs 0, and 0 * NaN would be NaN
        with torch.inference_mode(False):  # a request cancelled between two steps moves rows
            return [torch.zeros(self._shape, dtype=self._stored, device=self._device) for _ in self.scales]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes once it is allocated."""
        return 2 * len(self.scales) * math.prod(self._shape) * int(self._stored.itemsize)

    def multipliers(self, layer: int) -> tuple[torch.Tensor | None, ...]:
        """What keys and values are multiplied by before they are rounded, [1] each; None in a 16-bit cache."""
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

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of one row over another."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :length] = tensor[source, :, :length]
