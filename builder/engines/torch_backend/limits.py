"""The sizes of an engine, and which requests fit."""

from __future__ import annotations

from dataclasses import dataclass

from plugins.common.errors import UserError
from plugins.common.request import Request


@dataclass(frozen=True)
class Limits:
    """The part of the recipe's `engine:` section that the torch engine reads."""

    max_batch_size: int = 64
    max_seq_len: int = 2048
    max_num_tokens: int = 8192
    chunked_prefill: bool = False
    cuda_graphs: bool = True
    kv_cache_block_reuse: bool = True
    kv_cache_memory: int | float | None = None  # bytes, or a share of what is free
    kv_cache_budget: int | None = None  # tokens that a sequence keeps in the cache (eviction.py)

    def check(self, request: Request, vocabulary: int) -> None:
        """Raises UserError where a request cannot run."""
        wrong = self._misfit(request) or _misuse(request, vocabulary)
        if wrong:
            raise UserError(f"request '{request.id}' {wrong}")

    def _misfit(self, request: Request) -> str | None:
        prompt = len(request.input_ids)
        if prompt + request.max_new_tokens > self.max_seq_len:
            return (
                f"needs {prompt} + {request.max_new_tokens} tokens, more than max_seq_len {self.max_seq_len}: "
                "shorten it, or build with a larger engine.max_seq_len"
            )
        if prompt > self.max_num_tokens and not self.chunked_prefill:
            return (
                f"has {prompt} tokens, more than max_num_tokens {self.max_num_tokens}: "
                "build with engine.chunked_prefill, or a larger engine.max_num_tokens"
            )
        return None


def _misuse(request: Request, vocabulary: int) -> str | None:
    if not request.input_ids:
        return "has no tokens: give it at least one"
    if request.max_new_tokens < 1:
        return f"requests {request.max_new_tokens} tokens: request at least 1"
    if not all(0 <= token < vocabulary for token in request.input_ids):
        return f"contains a token outside 0 to {vocabulary - 1}: use the engine's own tokenizer"
    if not (request.temperature >= 0 and request.top_k >= 0 and 0 < request.top_p <= 1):
        return (
            f"requests temperature {request.temperature}, top_k {request.top_k}, top_p {request.top_p}: "
            "use temperature >= 0, top_k >= 0 and 0 < top_p <= 1"
        )
    return None
