"""The record of each request, and its file formats. Times are seconds of `time.perf_counter()`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Record:
    """One request as the client saw it.

    `start` is when the request was due to be sent: a client that falls behind its schedule does not hide the wait.
    `token_times` holds the arrival of each token, or of each chunk of tokens where the server streams chunks.
    A request with an `error` has no metrics.
    """

    id: str
    input_tokens: int
    output_tokens: int
    start: float
    token_times: tuple[float, ...]
    error: str | None = None

    @property
    def end(self) -> float:
        """When the last token came; `start` where none did."""
        return self.token_times[-1] if self.token_times else self.start


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Writes one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
