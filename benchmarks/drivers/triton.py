"""Drives a model behind Triton's HTTP `generate_stream`: token ids in, token ids out, one thread a user.

Works with a repository that `twofour deploy` wrote: it takes `input_ids` and streams `output_ids`. A user keeps its
connection, so no request pays for making one. https://docs.nvidia.com/deeplearning/triton-inference-server
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import Any

from benchmarks.records import Record
from benchmarks.workload import BenchRequest


@dataclass(frozen=True)
class Endpoint:
    """A model on a server; `url` is `host:port`."""

    url: str = "127.0.0.1:8000"
    model: str = "llm"


def run(
    endpoint: Endpoint,
    requests: Sequence[BenchRequest],
    concurrency: int,
    *,
    stall_s: float = 300.0,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Record]:
    """Sends `requests` as `concurrency` users, and returns a record of each, in their order.

    A request that the server refuses, that ends with fewer tokens than asked, or that gets none for `stall_s` seconds,
    is recorded as an error.
    """
    began = clock()
    waiting = deque(requests)
    records: dict[str, Record] = {}

    def serve_user() -> None:
        connection = HTTPConnection(endpoint.url, timeout=stall_s)
        connection.connect()
        while True:
            try:
                request = waiting.popleft()
            except IndexError:
                break
            time.sleep(max(0.0, began + request.due - clock()))
            # closed loop: due when its turn comes; open loop: due on schedule, however late the client is
            start = began + request.due if request.due else clock()
            records[request.id] = _ask(connection, endpoint.model, request, start, clock)
        connection.close()

    users = [threading.Thread(target=serve_user) for _ in range(min(concurrency, len(requests)))]
    for user in users:
        user.start()
    for user in users:
        user.join()
    return [records[request.id] for request in requests]


def _ask(
    connection: HTTPConnection, model: str, request: BenchRequest, start: float, clock: Callable[[], float]
) -> Record:
    times: list[float] = []
    tokens = 0
    error = None
    try:
        for chunk in _stream(connection, model, request):
            times.append(clock())
            tokens += len(chunk)
    except (OSError, HTTPException, ValueError) as problem:
        error = f"{type(problem).__name__}: {problem}"
        connection.close()  # what is left of the answer must not be taken for the next one
    if error is None and tokens < request.max_new_tokens:
        error = f"ended after {tokens} of {request.max_new_tokens} tokens"
    return Record(request.id, len(request.input_ids), tokens, start, tuple(times), error)


def _stream(connection: HTTPConnection, model: str, request: BenchRequest) -> Iterator[list[int]]:
    """The token ids of each chunk of the answer. Raises ValueError with the server's words where it refuses."""
    body: dict[str, Any] = {
        "input_ids": request.input_ids,
        "max_tokens": request.max_new_tokens,
        "stream": True,
        "ignore_eos": request.ignore_eos,
        "temperature": request.temperature,
        "top_k": request.top_k,
        "top_p": request.top_p,
        "seed": request.seed,
    }
    connection.request("POST", f"/v2/models/{model}/generate_stream", json.dumps(body))
    answer = connection.getresponse()
    if answer.status != 200:
        raise ValueError(answer.read().decode(errors="replace"))
    for line in answer:
        if not line.startswith(b"data:"):
            continue
        event = json.loads(line[5:])
        if "error" in event:
            raise ValueError(event["error"])
        ids = event["output_ids"]
        yield ids if isinstance(ids, list) else [ids]  # Triton writes one value without brackets
