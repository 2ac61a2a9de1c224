"""Drives an OpenAI-compatible completions endpoint: `trtllm-serve`, vLLM, Triton's OpenAI frontend.

Prompts are sent as token ids and `ignore_eos` requests exact lengths; servers that lack either refuse the request.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import httpx

from benchmarks.serving.drivers import http
from benchmarks.serving.drivers.http import Endpoint, RequestError, count_of
from benchmarks.serving.drivers.token_times import Chunk
from benchmarks.serving.records import Record
from benchmarks.serving.workload import BenchRequest
from plugins.common.errors import UserError

__all__ = ["Endpoint", "run"]


def run(endpoint: Endpoint, requests: Sequence[BenchRequest], concurrency: int) -> list[Record]:
    """Sends `requests` to `endpoint`; see `http.run`. `endpoint.url` ends before `/v1`.

    An endpoint without a model name gets the one that the server serves. Raises UserError where the server does not
    answer or serves several.
    """
    return http.run(_Completions(), _with_model(endpoint), requests, concurrency)


def _with_model(endpoint: Endpoint) -> Endpoint:
    if endpoint.model:
        return endpoint
    try:
        answer = httpx.get(f"{endpoint.url}/v1/models", headers=endpoint.headers, timeout=30.0, trust_env=False)
        names = [str(model["id"]) for model in answer.raise_for_status().json()["data"]]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"'{endpoint.url}' does not list its models ({error}): check that it is an OpenAI-compatible server"
        ) from None
    if len(names) != 1:
        raise UserError(f"'{endpoint.url}' serves {len(names)} models ({', '.join(names)}): choose one")
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
        usage, choices = event.get("usage") or {}, event.get("choices") or []
        if (
            not isinstance(usage, dict)
            or not isinstance(choices, list)
            or not all(isinstance(c, dict) for c in choices)
        ):
            raise RequestError(f"not a completion in the stream: {json.dumps(event)[:120]}")
        return Chunk(
            tokens=None if choices else 0,
            text=bool(choices and choices[0].get("text")),
            end=bool(choices and choices[0].get("finish_reason")),
            output_tokens=count_of(usage, "completion_tokens"),
            input_tokens=count_of(usage, "prompt_tokens"),
        )
