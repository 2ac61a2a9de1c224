"""A build's Triton server, requests to its router over HTTP at times that were drawn before, and its metrics."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from benchmarks.pruning.fractions import COMMAND
from plugins.common.errors import UserError

Prompt = tuple[int, ...]
Gap = Callable[[str, Prompt, tuple[int, ...], tuple[int, ...]], float]
"""(variant, prompt, its own answer, another) -> how much less likely than the best the first other token is, nats."""

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
    """What came back for one request; `error` where no answer came."""

    variant: str = ""
    input_tokens: int = 0
    tokens: tuple[int, ...] = ()
    seconds: float = 0.0
    error: str = ""


@contextmanager
def serving(build: Path) -> Iterator[Server]:
    """Runs `twofour serve` with a new router state: the threshold is the learned one. Raises UserError."""
    with tempfile.TemporaryDirectory(prefix="twofour-routing-") as store, ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        http, grpc, metrics = (str(each.getsockname()[1]) for each in sockets)
        stack.close()  # the ports are free again
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
    """How many answers are missing, or not those of their own request.

    greedy: the tokens that each variant gives to each prompt alone. Other sums of a batch may choose another of two
    tokens that are as likely, and the answer goes on from there: `other_tokens` counts these answers. Where the first
    such token is less likely than the best by more than TIE, the answer belongs to another request: `crossed`.
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
