"""Times of one request after another, and the likelihood of a text: the same code for every engine. numpy alone.

Shapes: W windows, T tokens of a window, V vocabulary.
"""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Timer:
    """Notes when each token of each request is ready; the first request warms up and does not count."""

    REQUESTS = 4

    def __init__(self) -> None:
        self._requests: list[list[float]] = []

    def start(self) -> None:
        """A request starts."""
        self._requests.append([time.perf_counter()])

    def token(self) -> None:
        """The request's next token is ready."""
        self._requests[-1].append(time.perf_counter())

    def summary(self) -> dict[str, Any]:
        """Milliseconds of each request's prompt, and of each of its later tokens in the mean."""
        counted = self._requests[1:]
        return {
            "prefill_ms": [1e3 * (first - start) for start, first, *_ in counted],
            "decode_ms": [1e3 * (times[-1] - times[1]) / (len(times) - 2) for times in counted],
        }


def nll(windows_WT: NDArray[np.int64], logits: Iterable[NDArray[np.float32]]) -> dict[str, Any]:
    """Sum of the negative log likelihood (nats) of each window's tokens after the first, and their number."""
    total = 0.0
    for window_T, logits_TV in zip(windows_WT, logits, strict=True):
        shifted_TV = logits_TV[:-1].astype(np.float64)
        shifted_TV -= shifted_TV.max(axis=1, keepdims=True)
        chosen_T = shifted_TV[np.arange(len(window_T) - 1), window_T[1:]]
        total += float((np.log(np.exp(shifted_TV).sum(axis=1)) - chosen_T).sum())
    return {"nll": total, "tokens": windows_WT.size - len(windows_WT)}


def held_bytes(path: Path, suffix: str) -> dict[str, int]:
    """Bytes of the weight files: `path` itself, or those in it."""
    files = [path] if path.is_file() else path.rglob(f"*{suffix}")
    return {"bytes": sum(file.stat().st_size for file in files)}
