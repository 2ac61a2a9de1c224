"""The load of a benchmark: prompts of random token ids and their arrival times, from a seed. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.config import Workload
from plugins.common.request import Request


@dataclass(frozen=True)
class BenchRequest(Request):
    """One prompt, answered to its full length; `due` is seconds after the start of the run."""

    ignore_eos: bool = True
    due: float = 0.0


def make_requests(workload: Workload, vocabulary: int, stream: Sequence[int] = ()) -> list[BenchRequest]:
    """The requests of one run: `workload.requests` prompts of ids drawn evenly from [0, vocabulary).

    The same workload, vocabulary and `stream` give the same requests anywhere. Different streams (a round, the warm-up)
    give prompts that share no prefix: no run is served from the prefix cache that an earlier one filled.
    """
    random = np.random.default_rng([workload.seed, *stream])
    ids = random.integers(0, vocabulary, size=(workload.requests, workload.input_tokens))
    due = _arrivals(workload, random)
    label = "-".join(str(part) for part in stream)
    return [
        BenchRequest(
            id=f"{label}-{index}" if label else str(index),
            input_ids=tuple(ids[index].tolist()),
            max_new_tokens=workload.output_tokens,
            due=float(due[index]),
        )
        for index in range(workload.requests)
    ]


def _arrivals(workload: Workload, random: np.random.Generator) -> NDArray[np.float64]:
    """Seconds at which each request is due. Closed loop: all at once, and the concurrency holds them back."""
    if workload.arrival == "closed":
        return np.zeros(workload.requests)
    assert workload.request_rate is not None, "the config requires a rate for poisson arrivals"
    gaps = random.exponential(1 / workload.request_rate, size=workload.requests)
    gaps[0] = 0.0
    return np.cumsum(gaps)
