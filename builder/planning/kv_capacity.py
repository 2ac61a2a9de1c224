"""How many tokens a KV cache holds, before anything is built. Imports no torch and no pydantic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from plugins.common.errors import UserError

if TYPE_CHECKING:
    from builder.config import EngineConfig

# Of the memory that is free with the weights loaded. The torch engine's share leaves room for a dense baseline;
# TensorRT-LLM's is its own default, written so that it is seen.
SHARES = {"torch": 0.45, "pytorch": 0.9, "tensorrt": 0.9}

BLOCK = 64  # tokens; 32 made decoding at 800 positions a tenth slower on a CPU, 128 shares fewer prefixes
SINKS = 4  # first tokens that eviction always keeps


@dataclass(frozen=True)
class Capacity:
    """The KV cache that fits on one card with the weights: predicted. `sequences` are of `max_seq_len` tokens."""

    tokens: int
    sequences: int


def budget_bytes(budget: int | float | None, free: int, backend: str) -> int:
    """What the recipe's `engine.kv_cache_memory` allows of `free` bytes."""
    return budget if isinstance(budget, int) else round((budget or SHARES[backend]) * free)


def capacity(engine: EngineConfig, backend: str, token_bytes: int, free: int, max_seq_len: int) -> Capacity:
    """Of one device; `token_bytes` are a token's there and `free` what the weights leave."""
    further = min(engine.kv_cache_budget or max_seq_len, max_seq_len)  # each other sequence's, besides a shared prefix
    most = max_seq_len + (engine.max_batch_size - 1) * further
    tokens = min(most, max(0, budget_bytes(engine.kv_cache_memory, free, backend)) // token_bytes)
    return Capacity(tokens, max(0, 1 + (tokens - max_seq_len) // further))


def check_eviction(budget: int | None, window: int | None, max_seq_len: int) -> None:
    """Raises UserError for a budget of a model whose layers see a window, as evicted tokens lose their order."""
    if budget is not None and window is not None and window < max_seq_len:
        raise UserError(
            f"engine.kv_cache_budget {budget} evicts from a cache that the model's sliding_window {window} limits too",
            "leave engine.kv_cache_budget out",
        )


def check_budget(engine: EngineConfig, token_bytes: int, max_seq_len: int) -> None:
    """Raises UserError where an amount that the recipe names holds no sequence of `max_seq_len` tokens."""
    budget, needed = engine.kv_cache_memory, token_bytes * -(-max_seq_len // BLOCK) * BLOCK
    if isinstance(budget, int) and budget < needed:
        raise UserError(
            f"engine.kv_cache_memory {budget / 1e6:g} MB holds {budget // (token_bytes * BLOCK) * BLOCK} tokens, fewer "
            f"than engine.max_seq_len {max_seq_len}",
            f"set engine.kv_cache_memory={-(-needed // 10**6)}MB or more, or a smaller engine.max_seq_len",
        )


def eviction_notes(engine: EngineConfig, sequence_length: int) -> list[str]:
    """What accuracy measured on sequences of `sequence_length` tokens shows of a budget."""
    budget = engine.kv_cache_budget
    if budget is None:
        return []
    if engine.backend in ("pytorch", "tensorrt"):
        method = "RocketKV" if engine.backend == "pytorch" else f"a window and the first {SINKS} tokens"
        return [f"engine.kv_cache_budget {budget} becomes TensorRT-LLM's {method}: accuracy is measured without it"]
    if sequence_length <= budget:
        return [
            f"accuracy.sequence_length {sequence_length} never exceeds engine.kv_cache_budget {budget}: accuracy is "
            f"measured without eviction; set accuracy.sequence_length={2 * budget}"
        ]
    return []
