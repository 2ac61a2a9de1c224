"""Eviction from the KV cache by attention mass: heavy hitters (H2O, Zhang et al., arXiv 2306.14048), the newest tokens
and the first ones (attention sinks, Xiao et al., arXiv 2309.17453).

Each key-value head sums the attention that each cached token gets, over all queries since. A sequence that holds
`budget` tokens evicts a block of them before its next token, in each head the ones of least mass. Keys hold their
rotary embedding, so that the rest may move: a token keeps its position and gets another slot of the sequence's blocks.

Legend: B sequences, N blocks a sequence, H key-value heads, G query heads a key-value head, T new tokens, S slots seen,
D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from builder.engines.torch_backend.attention import Prefill, Slice
from builder.engines.torch_backend.kv_cache import KVCache, blocks_for
from builder.planning.kv_capacity import BLOCK, SINKS

QUERIES = 256  # whose attention is in memory at once
MASS_BYTES = 4  # of a cached token in one layer and head


def kept(budget: int) -> int:
    """How many tokens stay of a sequence that reached its budget."""
    return budget - BLOCK


def heaviest(mass: torch.Tensor, count: int) -> torch.Tensor:
    """Slots [..., count] that stay of masses [..., S], in order: the first, the newer half of `count`, the heaviest."""
    mass = mass.clone()
    mass[..., :SINKS] = torch.inf
    mass[..., -(count // 2) :] = torch.inf
    return mass.topk(count).indices.sort().values


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, last_BT: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q [B, heads, T, D] over k, v [B, H, S, D], each query up to slot `last_BT` [B or 1, T].

    Returns [B, T, heads, D] and the mass float32 [B, H, S] that the queries give each slot.
    """
    batch, new, seen = q.shape[0], q.shape[2], torch.arange(k.shape[2], device=k.device)
    grouped = q.unflatten(1, (k.shape[1], -1))  # [B, H, G, T, D]
    mass, outputs = torch.zeros(batch, *k.shape[1:3], device=k.device), []
    for first in range(0, new, QUERIES):
        scores = (grouped[:, :, :, first : first + QUERIES] * scaling) @ k[:, :, None].transpose(-1, -2)
        hidden = seen > last_BT[:, None, None, first : first + QUERIES, None]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
        mass += weights.sum((2, 3))
        outputs.append(weights.to(v.dtype) @ v[:, :, None])
    return torch.cat(outputs, dim=3).flatten(1, 2).transpose(1, 2), mass


class AttentionMass:
    """The mass [P + 1, H, S] float32 of each slot of a paged cache, a tensor a layer."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._layers: list[torch.Tensor] = []

    def _of(self, layer: int) -> torch.Tensor:
        if not self._layers:
            shape = self._cache.keys[0].shape[:3]
            self._layers = [torch.zeros(shape, device=self._cache.device) for _ in self._cache.scales]
        return self._layers[layer]

    def clear(self, layer: int, blocks: torch.Tensor, slots: torch.Tensor) -> None:
        """Clears the mass of slots that are written again."""
        self._of(layer)[blocks, :, slots] = 0

    def add(self, layer: int, table_BN: torch.Tensor, mass_BHS: torch.Tensor) -> None:
        """Adds what the first S slots of each sequence got."""
        blocks = blocks_for(mass_BHS.shape[2])
        padded = torch.nn.functional.pad(mass_BHS, (0, blocks * BLOCK - mass_BHS.shape[2]))
        paged = padded.unflatten(2, (blocks, BLOCK)).transpose(1, 2)
        self._of(layer).index_put_((table_BN[:, :blocks].long(),), paged, accumulate=True)

    def evict(self, blocks: Sequence[int], slots: int, count: int) -> None:
        """Moves the `count` slots that stay of a sequence's `slots` to the front of its blocks, in every layer."""
        index = torch.tensor(blocks, device=self._cache.device)
        target = index[: blocks_for(count)]
        for layer in range(len(self._cache.scales)):
            mass = self._of(layer)
            mass_HS = mass[index].transpose(0, 1).flatten(1)[:, :slots]
            stay_HS = heaviest(mass_HS, count)
            mass[target] = mass_HS.gather(1, stay_HS).unflatten(1, (-1, BLOCK)).transpose(0, 1)
            for pages in (self._cache.keys[layer], self._cache.values[layer]):
                if pages.element_size() == 1:  # not all operators support float8
                    pages = pages.view(torch.uint8)
                slots_HSD = pages[index].transpose(0, 1).flatten(1, 2)
                stay_HSD = slots_HSD.gather(1, stay_HS[:, :, None].expand(-1, -1, pages.shape[3]))
                pages[target] = stay_HSD.unflatten(1, (-1, BLOCK)).transpose(0, 1)


@dataclass
class WeighedPrefill(Prefill):
    """A prefill that also sums the mass of each slot."""

    mass: AttentionMass

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        super().write(layer, k, v)
        self.mass.clear(layer, self.blocks_T, self.slots_T)

    def attend_part(
        self, layer: int, part: Slice, table: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        scaling: float, window: int | None,
    ) -> torch.Tensor:  # fmt: skip
        k_scale, v_scale = self.cache.scales[layer]
        last_BT = torch.arange(part.start, part.start + part.length, device=q.device)[None]
        out, mass = attend(q, k, v, last_BT, scaling * k_scale)
        self.mass.add(layer, table, mass)
        return out * v_scale


@dataclass
class WeighedDecode:
    """One new token for each of B sequences in slots [B] of their blocks; `table` int32 [B, N] names those."""

    cache: KVCache
    mass: AttentionMass
    table: torch.Tensor
    slots: torch.Tensor
    length: int  # S

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, window: int | None
    ) -> torch.Tensor:
        cache, slots = self.cache, self.slots
        k, v = cache.store(layer, k, v)
        blocks_B = self.table[torch.arange(len(slots), device=slots.device), slots // BLOCK].long()
        cache.write(layer, blocks_B, slots % BLOCK, k[:, :, 0], v[:, :, 0])
        self.mass.clear(layer, blocks_B, slots % BLOCK)
        k_seen, v_seen = cache.read(layer, self.table, self.length)
        k_scale, v_scale = cache.scales[layer]
        out, mass = attend(q, k_seen, v_seen, slots[:, None], scaling * k_scale)
        self.mass.add(layer, self.table, mass)
        return out * v_scale


@dataclass
class WeighedWindow:
    """Whole sequences [B, T] from position 0, a part at a time, evicted between parts: what evaluation runs.

    The first part is `budget` tokens long, the others a block: the same tokens stay as when each is decoded alone.
    """

    cache: KVCache  # only for its scales and rounding
    budget: int
    _held: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def parts(self, length: int) -> list[range]:
        """The positions of each part."""
        ends = [0, *range(self.budget, length, BLOCK), length]
        return [range(first, last) for first, last in pairwise(ends)]

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, window: int | None
    ) -> torch.Tensor:
        k, v = (self.cache.load(stored) for stored in self.cache.store(layer, k, v))
        k, v, mass = k.clone(), v.clone(), torch.zeros(k.shape[:3], device=k.device)  # a caller may reuse its memory
        if layer in self._held:
            old = self._stay(*self._held[layer])
            k, v, mass = (torch.cat(pair, dim=2) for pair in zip(old, (k, v, mass), strict=True))
        last_BT = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)[None]
        k_scale, v_scale = self.cache.scales[layer]
        out, added = attend(q, k, v, last_BT, scaling * k_scale)
        self._held[layer] = k, v, mass + added
        return out * v_scale

    def _stay(self, k: torch.Tensor, v: torch.Tensor, mass: torch.Tensor) -> tuple[torch.Tensor, ...]:
        stay = heaviest(mass, kept(self.budget))
        rows = stay[..., None].expand(*stay.shape, k.shape[3])
        return k.gather(2, rows), v.gather(2, rows), mass.gather(2, stay)
