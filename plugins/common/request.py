"""The inputs and outputs of an engine. No pydantic: the inner part of the torch engine runs without it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """One prompt. `temperature` 0 is greedy; `ignore_eos` generates exactly `max_new_tokens`."""

    id: str
    input_ids: tuple[int, ...]
    max_new_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Token:
    """One generated token; `time` is `time.perf_counter()` when it was ready."""

    request_id: str
    token: int
    index: int
    last: bool
    time: float


def tokens_by_request(stream: Iterable[Token], count: int) -> list[list[int]]:
    """The generated tokens of requests whose ids are 0 to `count` - 1."""
    tokens: list[list[int]] = [[] for _ in range(count)]
    for each in stream:
        tokens[int(each.request_id)].append(each.token)
    return tokens
