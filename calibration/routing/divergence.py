"""The KL divergence between two engines' next tokens, from the log-probabilities of the likeliest ones alone.

Imports no torch: a proxy needs none. Legend: T positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

LogProbabilities = Mapping[Hashable, float]  # of some tokens, in nats
_LEAST = 1e-9  # probability that a set of tokens has at least


@dataclass(frozen=True)
class Comparison:
    """What a shadow run compares: at each position the `top` likeliest tokens of both engines.

    own_answers: each engine generates its own answer, so that the comparison ends at the first token that differs.
    """

    top: int
    own_answers: bool


TRITON = Comparison(64, own_answers=False)
COMPARISONS = {
    "triton": TRITON,
    "chat": Comparison(20, own_answers=True),  # as many log-probabilities as OpenAI's API returns at most
    "completions": Comparison(5, own_answers=True),
}


def likeliest(log_TV: Any, top: int) -> list[LogProbabilities]:
    """The `top` likeliest tokens of each position and their log-probabilities, from a torch tensor of all."""
    best = log_TV.topk(min(top, log_TV.shape[-1]))
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [dict(zip(tokens, values, strict=True)) for tokens, values in rows]


def partial_kl(dense: LogProbabilities, other: LogProbabilities) -> float:
    """KL(dense || other) in nats, over the tokens that both list and all else as one.

    Putting outcomes together never raises a divergence, so this is at most the divergence over the vocabulary.
    """
    shared = [token for token in dense if token in other]
    p = [math.exp(dense[token]) for token in shared]
    q = [math.exp(other[token]) for token in shared]
    pairs = chain(zip(p, q, strict=True), [(1 - sum(p), 1 - sum(q))])
    kl = sum(a * math.log(a / max(b, _LEAST)) for a, b in pairs if a > _LEAST)
    return max(kl, 0.0)


def mean_kl(positions: Iterable[tuple[LogProbabilities, LogProbabilities]]) -> float:
    """The mean over positions, in nats per token. Raises ValueError where there is none."""
    values = [partial_kl(dense, other) for dense, other in positions]
    if not values:
        raise ValueError("no token to compare")
    return sum(values) / len(values)
