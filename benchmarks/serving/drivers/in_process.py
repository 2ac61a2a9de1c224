"""Drives an engine in this process: adds requests while there is room, steps, and notes when each token came."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from benchmarks.serving.records import Record
from benchmarks.serving.workload import BenchRequest
from plugins.common.request import Token


class Engine(Protocol):
    """What a driver needs of an engine: the structural part of the engines' protocol."""

    def add(self, request: Any) -> None: ...
    def step(self) -> Iterable[Token]: ...
    @property
    def busy(self) -> bool: ...


def run(
    engine: Engine,
    requests: Sequence[BenchRequest],
    concurrency: int,
    *,
    stall_s: float = 300.0,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Record]:
    """Serves `requests` with at most `concurrency` of them in the engine, and returns a record of each, in their order.

    A request with fewer tokens than requested, or without one for `stall_s` seconds, is recorded as an error.
    """
    began = clock()
    waiting, running = deque(requests), dict[str, BenchRequest]()
    starts: dict[str, float] = {}
    times: dict[str, list[float]] = {request.id: [] for request in requests}
    progress = began
    while waiting or running:
        while waiting and len(running) < concurrency and began + waiting[0].due <= clock():
            request = waiting.popleft()
            # closed loop: due when its turn comes; open loop: due on schedule, however late the client is
            starts[request.id] = began + request.due if request.due else clock()
            engine.add(request)
            running[request.id] = request
        if not engine.busy and not running:
            sleep(max(0.0, began + waiting[0].due - clock()))
            progress = clock()
            continue
        for token in engine.step():
            if token.request_id not in times:
                continue  # of a request that an earlier run gave up on
            times[token.request_id].append(token.time)
            progress = token.time
            if token.last:
                running.pop(token.request_id, None)
        if clock() - progress > stall_s:
            break
    return [_record(request, starts.get(request.id, began), times[request.id]) for request in requests]


def _record(request: BenchRequest, start: float, times: list[float]) -> Record:
    short = len(times) < request.max_new_tokens
    error = f"ended after {len(times)} of {request.max_new_tokens} tokens" if short else None
    return Record(request.id, len(request.input_ids), len(times), start, tuple(times), error)
