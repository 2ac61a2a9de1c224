"""Requests to a router's model on a Triton server, over HTTP, at times that were drawn before; and its metrics."""

from __future__ import annotations

import json
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from builder.deploy.server import Server

Prompt = tuple[int, ...]
CLIENTS = 32  # requests that may be open at once
TIMEOUT = 120  # seconds


@dataclass(frozen=True)
class Answer:
    """What came back for one request; `error` where no answer came."""

    variant: str = ""
    input_tokens: int = 0
    tokens: tuple[int, ...] = ()
    seconds: float = 0.0
    error: str = ""


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
            futures.append(pool.submit(_ask, server.url(), prompt, max_tokens))
        return [future.result() for future in futures]


def _ask(address: str, prompt: Prompt, max_tokens: int) -> Answer:
    body = json.dumps({"input_ids": prompt, "max_tokens": max_tokens, "quality": "auto"}).encode()
    began = time.monotonic()
    try:
        with urllib.request.urlopen(f"http://{address}/v2/models/llm/generate", body, timeout=TIMEOUT) as reply:
            answer = json.load(reply)
    except OSError as error:  # HTTPError is one
        return Answer(error=str(error), seconds=time.monotonic() - began)
    ids = answer["output_ids"]  # Triton writes a single value without brackets
    tokens = tuple(ids) if isinstance(ids, list) else (ids,)
    return Answer(answer["variant"], int(answer["num_input_tokens"]), tokens, time.monotonic() - began)


def read_metrics(server: Server) -> dict[str, float]:
    """The router's metrics by name without the prefix; those with several labels are summed."""
    totals: defaultdict[str, float] = defaultdict(float)
    with urllib.request.urlopen(f"http://{server.url('metrics')}/metrics", timeout=10) as page:
        for line in page.read().decode().splitlines():
            if line.startswith("twofour_router_"):
                name, _, value = line.removeprefix("twofour_router_").rpartition(" ")
                totals[name.partition("{")[0]] += float(value)
    return dict(totals)


def check(
    prompts: Sequence[Prompt], answers: Sequence[Answer], greedy: Sequence[dict[str, tuple[int, ...]]]
) -> dict[str, Any]:
    """How many answers are missing, or not those of their own request.

    greedy: the tokens that each variant gives to each prompt alone. Other sums of a batch may choose the other of two
    tokens that are as likely: `other_tokens` counts such answers, `crossed` those that are another prompt's.
    """
    owners = Counter(tokens for each in greedy for tokens in set(each.values()))
    counts = Counter(answers=0, lost=0, wrong_input_tokens=0, other_tokens=0, crossed=0)
    for prompt, answer, own in zip(prompts, answers, greedy, strict=True):
        if answer.error:
            counts["lost"] += 1
            continue
        differs = answer.tokens != own[answer.variant]
        counts["answers"] += 1
        counts["wrong_input_tokens"] += answer.input_tokens != len(prompt)
        counts["other_tokens"] += differs
        counts["crossed"] += differs and answer.tokens not in own.values() and owners[answer.tokens] > 0
    return dict(counts)
