"""A build's Triton server, requests to its router over HTTP at given times, and its metrics."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from benchmarks.pruning.fractions import COMMAND
from plugins.common.errors import UserError
from plugins.common.ports import free_ports

Prompt = tuple[int, ...]
Gap = Callable[[str, Prompt, tuple[int, ...], tuple[int, ...]], float]
"""(variant, prompt, its own answer, another) -> the gap in log-probability where the answers differ, nats."""

CLIENTS = 32  # requests that may be open at once
TIMEOUT = 120  # seconds to an answer
TIE = 0.1  # nats: rounding of bfloat16 logits
START = 300  # seconds to a server that is ready


@dataclass(frozen=True)
class Server:
    """Addresses of a running server, host:port."""

    http: str
    metrics: str


@dataclass(frozen=True)
class Answer:
    """The response to one request; `error` if there was none."""

    variant: str = ""
    input_tokens: int = 0
    tokens: tuple[int, ...] = ()
    seconds: float = 0.0
    error: str = ""


@contextmanager
def serving(build: Path) -> Iterator[Server]:
    """Runs `twofour serve` with a new router state: the threshold is the learned one. Raises UserError."""
    with tempfile.TemporaryDirectory(prefix="twofour-routing-") as store:
        http, grpc, metrics = map(str, free_ports(3))
        ports = ["--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics]
        log = Path(store) / "log.txt"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [*COMMAND, "serve", str(build), *ports],
                env={**os.environ, "TWOFOUR_STORE": store},
                stdout=sink,
                stderr=subprocess.STDOUT,
            )
        try:
            _wait(process, f"http://127.0.0.1:{http}/v2/health/ready", log)
            yield Server(f"127.0.0.1:{http}", f"127.0.0.1:{metrics}")
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    end = time.monotonic() + START
    while time.monotonic() < end and process.poll() is None:
        with suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return
        time.sleep(0.1)
    lines = log.read_text(encoding="utf8", errors="replace").strip().splitlines() or ["no output"]
    raise UserError(f"the server did not start: {lines[-1]}", "deploy the build again")


def send(
    server: Server,
    prompts: Sequence[Prompt],
    times: Sequence[float],
    max_tokens: int,
    watch: Callable[[int], None] = lambda number: None,
) -> list[Answer]:
    """Sends each prompt at its time (s) with `quality: auto`; `watch(number)` runs before each."""
    start = time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as pool:
        futures = []
        for number, (prompt, at) in enumerate(zip(prompts, times, strict=True)):
            watch(number)
            time.sleep(max(start + at - time.monotonic(), 0.0))
            futures.append(pool.submit(_ask, server.http, prompt, max_tokens))
        return [future.result() for future in futures]


def _ask(address: str, prompt: Prompt, max_tokens: int) -> Answer:
    body = json.dumps({"input_ids": prompt, "max_tokens": max_tokens, "quality": "auto"}).encode()
    began = time.monotonic()
    try:
        with urllib.request.urlopen(f"http://{address}/v2/models/llm/generate", body, timeout=TIMEOUT) as reply:
            answer = json.load(reply)
    except OSError as error:  # HTTPError is one
        reason = json.load(error)["error"] if isinstance(error, HTTPError) else str(error)
        return Answer(error=reason, seconds=time.monotonic() - began)
    ids = answer["output_ids"]  # Triton writes a single value without brackets
    tokens = tuple(ids) if isinstance(ids, list) else (ids,)
    return Answer(answer["variant"], int(answer["num_input_tokens"]), tokens, time.monotonic() - began)


def read_metrics(server: Server) -> dict[str, float]:
    """The router's metrics by name without the prefix; those with several labels are summed."""
    totals: defaultdict[str, float] = defaultdict(float)
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=10) as page:
        for line in page.read().decode().splitlines():
            if line.startswith("twofour_router_"):
                name, _, value = line.removeprefix("twofour_router_").rpartition(" ")
                totals[name.partition("{")[0]] += float(value)
    return dict(totals)


def check(
    prompts: Sequence[Prompt], answers: Sequence[Answer], greedy: Sequence[dict[str, tuple[int, ...]]], gap: Gap
) -> dict[str, Any]:
    """Counts answers that are missing or belong to another request.

    greedy: each variant's tokens for each prompt alone. Batched sums round differently, so that a batch may choose the
    other of two equally likely tokens, and different tokens after it: `other_tokens` counts such answers. If the gap at
    the first different token exceeds TIE, the answer belongs to another request: `crossed`.
    """
    counts = Counter(answers=0, lost=0, wrong_input_tokens=0, other_tokens=0, crossed=0)
    widest = 0.0
    for prompt, answer, own in zip(prompts, answers, greedy, strict=True):
        if answer.error:
            counts["lost"] += 1
            continue
        counts["answers"] += 1
        counts["wrong_input_tokens"] += answer.input_tokens != len(prompt)
        if answer.tokens != own[answer.variant]:
            below = gap(answer.variant, prompt, own[answer.variant], answer.tokens)
            widest = max(widest, below)
            counts["other_tokens" if below <= TIE else "crossed"] += 1
    errors = Counter(answer.error for answer in answers if answer.error)
    return {**counts, "widest_tie": widest, "errors": dict(errors)}
