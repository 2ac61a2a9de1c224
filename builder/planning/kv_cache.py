"""How many tokens a KV cache holds, before anything is built. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from builder.config import EngineConfig
from plugins.common.errors import UserError

# Of the memory that is free with the weights loaded. The torch engine's leaves room for a dense baseline beside it;
# TensorRT-LLM's is its own default, written so that it is seen.
SHARES = {"torch": 0.45, "pytorch": 0.9, "tensorrt": 0.9}


@dataclass(frozen=True)
class Capacity:
    """What fits on one card beside the weights: predicted. `sequences` are of `max_seq_len` tokens."""

    tokens: int
    sequences: int


def budget_bytes(budget: int | float | None, free: int, backend: str) -> int:
    """What the recipe's `engine.kv_cache_memory` allows of `free` bytes."""
    return budget if isinstance(budget, int) else round((budget or SHARES[backend]) * free)


def capacity(engine: EngineConfig, backend: str, token_bytes: int, free: int, max_seq_len: int) -> Capacity:
    """Of one device; `token_bytes` are a token's there and `free` what the weights leave."""
    most = engine.max_batch_size * max_seq_len
    tokens = min(most, max(0, budget_bytes(engine.kv_cache_memory, free, backend)) // token_bytes)
    return Capacity(tokens, tokens // max_seq_len)


def check_budget(engine: EngineConfig, token_bytes: int, max_seq_len: int) -> None:
    """Raises UserError where an amount that the recipe names holds no sequence of `max_seq_len` tokens."""
    budget, needed = engine.kv_cache_memory, token_bytes * max_seq_len
    if isinstance(budget, int) and budget < needed:
        raise UserError(
            f"engine.kv_cache_memory {budget / 1e6:g} MB holds {budget // token_bytes} tokens, fewer than "
            f"engine.max_seq_len {max_seq_len}",
            f"set engine.kv_cache_memory={-(-needed // 10**6)}MB or more, or a smaller engine.max_seq_len",
        )
