"""Drives an OpenAI-compatible completions endpoint: `trtllm-serve`, vLLM, Triton's OpenAI frontend.

Prompts are sent as token ids and `ignore_eos` asks for exact lengths; servers that lack either refuse the request.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import httpx

from benchmarks.serving.drivers import http
from benchmarks.serving.drivers.http import Chunk, Endpoint
from benchmarks.serving.records import Record
from benchmarks.serving.workload import BenchRequest
from plugins.common.errors import UserError

__all__ = ["Endpoint", "run"]


def run(endpoint: Endpoint, requests: Sequence[BenchRequest], concurrency: int) -> list[Record]:
    """Sends `requests` to `endpoint`; see `http.run`. `endpoint.url` ends before `/v1`.

    An endpoint that names no model gets the one that the server serves. Raises UserError where the server cannot be
    asked or serves several.
    """
    return http.run(_Completions(), _with_model(endpoint), requests, concurrency)


def _with_model(endpoint: Endpoint) -> Endpoint:
    if endpoint.model:
        return endpoint
    try:
        answer = httpx.get(f"{endpoint.url}/v1/models", headers=endpoint.headers, timeout=30.0, trust_env=False)
        names = [model["id"] for model in answer.raise_for_status().json()["data"]]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{endpoint.url}' does not list its models ({error}): is an OpenAI server there?") from None
    if len(names) != 1:
        raise UserError(f"'{endpoint.url}' serves {len(names)} models ({', '.join(names)}): name one")
    return dataclasses.replace(endpoint, model=names[0])


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
