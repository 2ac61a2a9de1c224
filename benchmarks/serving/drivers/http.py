"""Drives a server that streams server-sent events over HTTP. The dialects are in openai.py and triton.py.

One process and one event loop send everything, so the client's own work is part of what it measures: where it shares
the cores with the server, compare only sides that were driven alike.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx

from benchmarks.serving.drivers.token_times import Arrival, Chunk, token_times
from benchmarks.serving.records import Record
from benchmarks.serving.workload import BenchRequest

END = "[DONE]"  # the last event of the OpenAI protocol


@dataclass(frozen=True)
class Endpoint:
    """A server and its model. A request fails after `request_s` in all or `gap_s` without a byte."""

    url: str
    model: str = ""
    request_s: float = 600.0
    gap_s: float = 120.0
    headers: dict[str, str] = field(default_factory=dict)


class Dialect(Protocol):
    """A server's protocol: the request's path and body, and the parser of its events."""

    def path(self, endpoint: Endpoint) -> str: ...
    def body(self, endpoint: Endpoint, request: BenchRequest) -> dict[str, Any]: ...
    def read(self, event: dict[str, Any]) -> Chunk: ...


class RequestError(Exception):
    """The server did not serve the request; the message goes into its record."""


def run(dialect: Dialect, endpoint: Endpoint, requests: Sequence[BenchRequest], concurrency: int) -> list[Record]:
    """Sends `requests` with at most `concurrency` under way, and returns a record of each, in their order.

    Failures are recorded, not raised: an HTTP error, an error inside a 200, a stream that ends early or stalls, a count
    of tokens other than requested.
    """
    return asyncio.run(_run(dialect, endpoint, requests, concurrency))


async def _run(
    dialect: Dialect, endpoint: Endpoint, requests: Sequence[BenchRequest], concurrency: int
) -> list[Record]:
    timeout = httpx.Timeout(endpoint.gap_s, pool=None)
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    room = asyncio.Semaphore(concurrency)
    # no proxy from the environment: it would be measured too
    async with httpx.AsyncClient(
        base_url=endpoint.url, timeout=timeout, limits=limits, headers=endpoint.headers, trust_env=False
    ) as client:
        began = time.perf_counter()

        async def serve(request: BenchRequest) -> Record:
            due = began + request.due
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            async with room:
                start = due if request.due else time.perf_counter()
                return await _measure(dialect, endpoint, client, request, start)

        return await asyncio.gather(*(serve(request) for request in requests))


async def _measure(
    dialect: Dialect, endpoint: Endpoint, client: httpx.AsyncClient, request: BenchRequest, start: float
) -> Record:
    arrivals: list[Arrival] = []
    error = None

    async def receive() -> None:
        async for event in _events(client, dialect.path(endpoint), dialect.body(endpoint, request)):
            arrivals.append(Arrival(time.perf_counter(), dialect.read(event)))

    try:
        await asyncio.wait_for(receive(), endpoint.request_s)
    except TimeoutError:
        error = f"not done after {endpoint.request_s:g} s"
    except httpx.TimeoutException:
        error = f"silent for {endpoint.gap_s:g} s"
    except (RequestError, httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as failure:
        error = _short(str(failure)) or type(failure).__name__
    times, output_tokens = token_times(arrivals, start, request.max_new_tokens)
    if error is None and (not times or output_tokens != request.max_new_tokens):
        error = f"ended after {output_tokens} of {request.max_new_tokens} tokens"
    counts = [arrival.chunk.input_tokens for arrival in arrivals if arrival.chunk.input_tokens is not None]
    return Record(request.id, counts[-1] if counts else len(request.input_ids), output_tokens, start, times, error)


async def _events(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a stream. Raises RequestError for an error in the status, the stream or a plain body."""
    async with client.stream("POST", path, json=body) as answer:
        if answer.status_code != 200:
            text = (await answer.aread()).decode("utf8", "replace")
            raise RequestError(f"HTTP {answer.status_code}: {_quoted(text)}")
        events = 0
        async for line in answer.aiter_lines():
            if line.startswith("data:"):
                data = line.removeprefix("data:").strip()
                if data == END:
                    return
                events += 1
                yield _parse(data)
            elif line.strip() and not line.startswith((":", "event:", "id:", "retry:")):
                raise RequestError(f"HTTP 200 with no stream: {_quoted(line)}")
        if not events:
            raise RequestError("HTTP 200 with an empty stream")


def _parse(data: str) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except (ValueError, RecursionError):
        raise RequestError(f"not JSON in the stream: {_quoted(data)}") from None
    if not isinstance(event, dict) or event.get("error") or event.get("object") == "error":
        raise RequestError(f"HTTP 200 with an error: {_quoted(data)}")
    return event


def count_of(event: Mapping[str, Any], key: str) -> int | None:
    """A number of tokens in an event; None where it has none. Raises RequestError for anything else."""
    value = event.get(key)
    if value is not None and (type(value) is not int or value < 0):
        raise RequestError(f"'{key}' in the stream is {_short(repr(value))}, not a number of tokens")
    return value


def _quoted(text: str) -> str:
    """The error's message where the text is one of the usual JSON forms, else its first 200 characters, in one line."""
    try:
        content = json.loads(text)
        error = content.get("error", content)
        text = error if isinstance(error, str) else error.get("message", text)
    except (ValueError, AttributeError, RecursionError):
        pass
    return _short(str(text))


def _short(text: str) -> str:
    return " ".join(text.split())[:200]
