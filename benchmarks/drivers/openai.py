"""Drives an OpenAI-compatible completions endpoint: `trtllm-serve`, vLLM, Triton's OpenAI frontend.

Prompts are sent as token ids and `ignore_eos` asks for exact lengths; servers that lack either refuse the request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.drivers import http
from benchmarks.drivers.http import Chunk, Endpoint
from benchmarks.records import Record
from benchmarks.workload import BenchRequest

__all__ = ["Endpoint", "run"]


def run(endpoint: Endpoint, requests: Sequence[BenchRequest], concurrency: int) -> list[Record]:
    """Sends `requests` to `endpoint`; see `http.run`. `endpoint.url` ends before `/v1`."""
    return http.run(_Completions(), endpoint, requests, concurrency)


class _Completions:
    def path(self, endpoint: Endpoint) -> str:
        return "/v1/completions"

    def body(self, endpoint: Endpoint, request: BenchRequest) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": endpoint.model,
            "prompt": list(request.input_ids),
            "max_tokens": request.max_new_tokens,
            "temperature": request.temperature,
            "ignore_eos": request.ignore_eos,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if request.temperature > 0:
            body |= {"top_p": request.top_p, "seed": request.seed}
        return body

    def read(self, event: dict[str, Any]) -> Chunk:
        usage = event.get("usage") or {}
        choices = event.get("choices") or []
        # a last chunk that only says why it ended carries no token
        empty = not choices or (not choices[0].get("text") and choices[0].get("finish_reason"))
        return Chunk(0 if empty else None, usage.get("completion_tokens"), usage.get("prompt_tokens"))
