"""Drives a model of a Triton server through its `generate_stream` extension, as `twofour deploy` writes it.

https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/protocol/extension_generate.html
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.serving.drivers import http
from benchmarks.serving.drivers.http import Endpoint, count_of
from benchmarks.serving.drivers.token_times import Chunk
from benchmarks.serving.records import Record
from benchmarks.serving.workload import BenchRequest

__all__ = ["Endpoint", "run"]


def run(endpoint: Endpoint, requests: Sequence[BenchRequest], concurrency: int) -> list[Record]:
    """Sends `requests` to `endpoint`; see `http.run`. `endpoint.url` ends before `/v2`."""
    return http.run(_GenerateStream(), endpoint, requests, concurrency)


class _GenerateStream:
    def path(self, endpoint: Endpoint) -> str:
        return f"/v2/models/{endpoint.model}/generate_stream"

    def body(self, endpoint: Endpoint, request: BenchRequest) -> dict[str, Any]:
        return {
            "input_ids": list(request.input_ids),
            "max_tokens": request.max_new_tokens,
            "ignore_eos": request.ignore_eos,
            "temperature": request.temperature,
            "stream": True,
        }

    def read(self, event: dict[str, Any]) -> Chunk:
        ids = event.get("output_ids", [])
        count = len(ids) if isinstance(ids, list) else 1  # Triton writes a single value without brackets
        return Chunk(
            count,
            output_tokens=count_of(event, "num_output_tokens"),
            input_tokens=count_of(event, "num_input_tokens"),
        )
