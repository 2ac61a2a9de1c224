"""The torch engine: a model, its KV cache and its scheduler, an iteration at a time.

Legend: B requests, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from time import perf_counter
from typing import Any

import torch

from builder.engines.torch_backend.attention import Batch, Decode, Prefill, Whole, window_of
from builder.engines.torch_backend.block_pool import BlockPool, free_bytes, pool_size
from builder.engines.torch_backend.cuda_graphs import DecodeSteps
from builder.engines.torch_backend.decoder import Decoder
from builder.engines.torch_backend.eviction import (
    MASS_BYTES,
    AttentionMass,
    WeighedDecode,
    WeighedPrefill,
    WeighedWindow,
    kept,
)
from builder.engines.torch_backend.kv_cache import KVCache, blocks_for, table_of, token_bytes
from builder.engines.torch_backend.limits import Limits
from builder.engines.torch_backend.sampling import sample
from builder.engines.torch_backend.scheduler import Scheduler, Sequence
from builder.planning.kv_capacity import BLOCK, check_eviction
from plugins.common.errors import UserError
from plugins.common.request import Request, Token


class TorchEngine:
    """A loaded engine (see builder/engines/base.py). One thread at a time."""

    backend = "torch"

    def __init__(self, model: Decoder, limits: Limits, eos: frozenset[int], kv_cache: str = "none") -> None:
        self.model, self.limits, self.eos = model, limits, eos
        config = model.config
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        each_token = token_bytes(kv_cache, model.dtype, layers, heads, head_dim)
        for block in model.blocks:
            check_eviction(limits.kv_cache_budget, window_of(block.self_attn, config), limits.max_seq_len)
        each_token += layers * heads * MASS_BYTES if limits.kv_cache_budget else 0
        blocks = pool_size(limits, each_token, free_bytes(model.device))
        self._cache = KVCache(
            model.kv_scales if kv_cache != "none" else [(1.0, 1.0)] * layers,
            blocks,
            heads,
            head_dim,
            kind=kv_cache,
            dtype=model.dtype,
            device=model.device,
        )
        self._mass = AttentionMass(self._cache) if limits.kv_cache_budget else None
        use_graphs = limits.cuda_graphs and model.device.type == "cuda" and self._mass is None
        self._graphs = (
            DecodeSteps(model, self._cache, limits.max_batch_size, limits.max_seq_len) if use_graphs else None
        )
        # eviction moves what a block holds, so that sequences share none
        self._pool = BlockPool(blocks, limits.kv_cache_block_reuse and self._mass is None)
        self._scheduler = Scheduler(limits.max_batch_size, limits.max_num_tokens, limits.chunked_prefill, self._pool)

    @torch.inference_mode()
    def logits(self, input_ids_BT: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, vocabulary] float32 of token ids [B, T] int64; UserError past max_seq_len.

        Nothing stays cached. Under a kv_cache_budget each token sees what decoding it would have left in the cache.
        """
        length = input_ids_BT.shape[1]
        if length > self.limits.max_seq_len:
            raise UserError(f"a sequence of {length} tokens exceeds max_seq_len {self.limits.max_seq_len}: shorten it")
        ids, budget = input_ids_BT.to(self.model.device), self.limits.kv_cache_budget
        positions = torch.arange(length, device=ids.device)[None]
        if budget is None or length <= budget:
            return self.model.logits(self.model.hidden(ids, positions, Whole(self._cache))).float()
        window = WeighedWindow(self._cache, budget)
        parts = [slice(part.start, part.stop) for part in window.parts(length)]
        hidden = [self.model.hidden(ids[:, part], positions[:, part], window) for part in parts]
        return self.model.logits(torch.cat(hidden, dim=1)).float()

    def add(self, request: Request) -> None:
        """Queues a request. Raises UserError where it cannot run."""
        self.limits.check(request, self.model.config.vocab_size)
        if self._scheduler.holds(request.id):
            raise UserError(f"request '{request.id}' is already queued or running: give each request a unique id")
        self._scheduler.add(request)

    def cancel(self, request_id: str) -> None:
        """Forgets a request; no more of its tokens come. Unknown ids are ignored."""
        self._scheduler.cancel(request_id)

    @property
    def busy(self) -> bool:
        """Whether any request is queued or running."""
        return self._scheduler.busy

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """One iteration: prefills what fits, and decodes one token of each request that was running."""
        self._evict()
        running = self._scheduler.decode()
        tokens = self._prefill()
        if running:
            tokens += self._decode(running)
        self._scheduler.finish({token.request_id for token in tokens if token.last})
        return tokens

    def generate(self, requests: Iterable[Request]) -> Iterator[Token]:
        """Streams the tokens of `requests` in the order they become ready. Abandoned half-way, it cancels the rest."""
        ids = []
        try:
            for request in requests:
                self.add(request)
                ids.append(request.id)
            while self.busy:
                yield from self.step()
        finally:
            for request_id in ids:
                self.cancel(request_id)

    def describe(self) -> dict[str, Any]:
        """Device, compute dtype, bytes in memory, the layers' kernels, and remarks for readers of measurements."""
        layers = self.model.linears.values()
        return {
            "device": str(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "weight_bytes": self.model.nbytes,
            "kv_cache": self._cache.kind,
            "kv_cache_bytes": self._cache.nbytes,
            "kv_cache_tokens": self._pool.blocks * BLOCK,
            "kv_cache_blocks_used": self._pool.used,
            "kv_cache_reused_tokens": self._scheduler.reused_tokens,
            "preemptions": self._scheduler.preemptions,
            "kernels": dict(Counter(layer.kernel for layer in layers)),
            "kernel_of": {name: layer.kernel for name, layer in self.model.linears.items()},
            "remarks": self.model.remarks,
        }

    def _evict(self) -> None:
        """Evicts the tokens of least attention from each running sequence that has reached its budget."""
        budget = self.limits.kv_cache_budget
        if budget is None or self._mass is None:
            return
        for sequence in self._scheduler.running:
            if sequence.slots >= budget:
                self._mass.evict(sequence.blocks, sequence.slots, kept(budget))
                self._scheduler.shrink(sequence, kept(budget))

    def _prefill(self) -> list[Token]:
        slices = self._scheduler.prefill()
        if not slices:
            return []
        ids: list[int] = []
        positions: list[int] = []
        ends = []
        for sequence, part in slices:
            ids += sequence.context[part.start : part.start + part.length]
            positions += part.positions
            ends.append(len(ids) - 1)
        parts = [part for _, part in slices]
        batch = Prefill(self._cache, parts) if self._mass is None else WeighedPrefill(self._cache, parts, self._mass)
        hidden = self.model.hidden(self._tensor(ids)[None], self._tensor(positions)[None], batch)
        done = [(sequence, end) for (sequence, _), end in zip(slices, ends, strict=True) if sequence.prefilled]
        if not done:
            return []
        logits = self.model.logits(hidden[0, [end for _, end in done]])
        return self._emit(logits, [sequence for sequence, _ in done])

    def _decode(self, running: list[Sequence]) -> list[Token]:
        ids, positions = [sequence.tokens[-1] for sequence in running], [sequence.cached for sequence in running]
        blocks = [sequence.blocks for sequence in running]
        if self._graphs is not None:
            logits = self._graphs.run(ids, positions, blocks)
        else:
            logits = self._decode_eagerly(ids, positions, [sequence.slots for sequence in running], blocks)
        for sequence in running:
            sequence.cached += 1
        return self._emit(logits, running)

    def _decode_eagerly(
        self, ids: list[int], positions: list[int], slots: list[int], blocks: list[list[int]]
    ) -> torch.Tensor:
        """`slots`: where in its blocks each token goes; the positions, unless tokens were evicted."""
        slots_B, length = self._tensor(slots), max(slots) + 1
        table = table_of(blocks, blocks_for(length)).to(self.model.device)
        batch: Batch
        if self._mass is not None:
            batch = WeighedDecode(self._cache, self._mass, table, slots_B, length)
        else:
            batch = Decode(self._cache, table, slots_B, length, ragged=min(slots) != max(slots))
        hidden = self.model.hidden(self._tensor(ids)[:, None], self._tensor(positions)[:, None], batch)
        return self.model.logits(hidden[:, 0])

    def _emit(self, logits_BV: torch.Tensor, sequences: list[Sequence]) -> list[Token]:
        requests, indices = [s.request for s in sequences], [len(s.tokens) for s in sequences]
        chosen = sample(logits_BV, requests, indices)
        now = perf_counter()
        tokens = []
        for sequence, request, index, token in zip(sequences, requests, indices, chosen, strict=True):
            sequence.tokens.append(token)
            last = index + 1 == request.max_new_tokens or (token in self.eos and not request.ignore_eos)
            tokens.append(Token(request.id, token, index, last, now))
        return tokens

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, device=self.model.device)
