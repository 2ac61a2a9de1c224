"""Attention over the batches of an iteration, as the attention function of transformers' own attention modules.

A batch holds the cache slots of its keys and values and the mask of its queries. transformers passes it through its
layers as the keyword `batch`, so that its modules, rotary embedding and norms run unchanged.

Legend: B requests, N blocks a request, T new tokens, H heads, G query heads a key-value head, S positions seen,
D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from builder.engines.torch_backend import cpu_attention
from builder.engines.torch_backend.kv_cache import KVCache
from builder.planning.kv_capacity import BLOCK

NAME = "twofour"


class Batch(Protocol):
    """The tokens of one forward pass."""

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, window: int | None
    ) -> torch.Tensor:
        """Attention of q [B, heads, T, D] over k, v [B, H, T, D] and what went before. Out [B, T, heads, D]."""


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    batch: Batch,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The function that transformers calls in each layer; `attention_mask` is unused, the batch holds the mask."""
    return batch.attend(module.layer_idx, query, key, value, scaling, sliding_window), None


def window_of(attention: torch.nn.Module, config: Any) -> int | None:
    """The layer's sliding window; Mistral keeps it in the config, Qwen in the layer, Llama has none."""
    if hasattr(attention, "sliding_window"):
        window: int | None = attention.sliding_window
        return window
    return getattr(config, "sliding_window", None) if config.model_type == "mistral" else None


AttentionInterface.register(NAME, attention)


@dataclass
class Whole:
    """Whole sequences [B, T], each from position 0, nothing kept: what evaluation runs."""

    cache: KVCache  # only for its scales and rounding

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, window: int | None
    ) -> torch.Tensor:
        k, v = (self.cache.load(stored) for stored in self.cache.store(layer, k, v))
        return _causal(q, k, v, self.cache.scales[layer], scaling, window)


@dataclass(frozen=True)
class Slice:
    """Tokens `start` to `start + length` of the sequence in blocks of the cache."""

    blocks: tuple[int, ...]
    start: int
    length: int

    @property
    def positions(self) -> range:
        return range(self.start, self.start + self.length)


@dataclass
class Prefill:
    """Slices of prompts laid end to end, [1, T]: no padding, and each attends only to its own sequence."""

    cache: KVCache
    slices: list[Slice]

    def __post_init__(self) -> None:
        device = self.cache.device
        self._tables = [torch.tensor([part.blocks], dtype=torch.int32, device=device) for part in self.slices]
        places = [(part.blocks[i // BLOCK], i % BLOCK) for part in self.slices for i in part.positions]
        self.blocks_T, self.slots_T = torch.tensor(places, device=device).T

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, window: int | None
    ) -> torch.Tensor:
        cache, outputs, first = self.cache, [], 0
        k, v = cache.store(layer, k, v)
        self.write(layer, k, v)
        for part, table in zip(self.slices, self._tables, strict=True):
            last = first + part.length
            if part.start:
                k_seen, v_seen = cache.read(layer, table, part.start + part.length)
            else:
                k_seen, v_seen = cache.load(k[:, :, first:last]), cache.load(v[:, :, first:last])
            outputs.append(self.attend_part(layer, part, table, q[:, :, first:last], k_seen, v_seen, scaling, window))
            first = last
        return torch.cat(outputs, dim=1)

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Puts stored keys and values [1, H, T, D] into the cache."""
        self.cache.write(layer, self.blocks_T, self.slots_T, k[0].transpose(0, 1), v[0].transpose(0, 1))

    def attend_part(
        self, layer: int, part: Slice, table: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        scaling: float, window: int | None,
    ) -> torch.Tensor:  # fmt: skip
        """Attention of a slice's queries over all keys and values of its sequence so far."""
        return _causal(q, k, v, self.cache.scales[layer], scaling, window)


@dataclass
class Decode:
    """One new token for each of B sequences, [B, 1], at `positions` [B]; `table` int32 [B, N] names their blocks."""

    cache: KVCache
    table: torch.Tensor
    positions: torch.Tensor
    length: int  # S: the longest sequence, its new token included
    ragged: bool  # whether sequences differ in length
    _masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._rows = torch.arange(len(self.positions), device=self.positions.device)

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, window: int | None
    ) -> torch.Tensor:
        cache, rows = self.cache, len(self.positions)
        k, v = cache.store(layer, k, v)
        blocks_B = self.table[self._rows, self.positions // BLOCK].long()
        cache.write(layer, blocks_B, self.positions % BLOCK, k[:, :, 0], v[:, :, 0])
        k_seen, v_seen = cache.read(layer, self.table, self.length)
        k_scale, v_scale = cache.scales[layer]
        grouped = q.view(rows, k.shape[1], -1, q.shape[-1])  # [B, H, G, D]: G queries read one head's keys once
        out = torch.nn.functional.scaled_dot_product_attention(
            grouped, k_seen, v_seen, attn_mask=self._mask(window), scale=scaling * k_scale
        )
        return (out if v_scale == 1 else out * v_scale).reshape(rows, 1, -1, q.shape[-1])

    def _mask(self, window: int | None) -> torch.Tensor | None:
        """What each sequence sees, bool [B, 1, 1, S]; None where that is all."""
        if window is not None and window >= self.length:
            window = None
        if window not in self._masks:
            self._masks[window] = self._build_mask(window)
        return self._masks[window]

    def _build_mask(self, window: int | None) -> torch.Tensor | None:
        if window is None and not self.ragged:
            return None
        seen_S, position_B1 = torch.arange(self.length, device=self.positions.device), self.positions[:, None]
        mask_BS = seen_S <= position_B1
        if window is not None:
            mask_BS &= seen_S > position_B1 - window
        return mask_BS[:, None, None]


def _causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scales: tuple[float, float], scaling: float, window: int | None
) -> torch.Tensor:
    """Causal attention of the last T of S positions: q [B, heads, T, D], k, v [B, H, S, D]. Out [B, T, heads, D]."""
    if cpu_attention.is_usable(q, k, v):
        return cpu_attention.attend(q, k, v, scaling * scales[0], scales[1], window)
    new, seen = q.shape[2], k.shape[2]
    mask = None
    if new != seen or (window is not None and window < seen):
        position_T1 = torch.arange(seen - new, seen, device=q.device)[:, None]
        seen_S = torch.arange(seen, device=q.device)
        mask = seen_S <= position_T1
        if window is not None:
            mask &= seen_S > position_T1 - window
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling * scales[0], enable_gqa=q.shape[1] != k.shape[1]
    )
    return (out if scales[1] == 1 else out * scales[1]).transpose(1, 2)
