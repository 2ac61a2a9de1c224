"""What is kept of each request, and its file forms. Times are seconds of `time.perf_counter()`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
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


def write_jsonl(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Writes one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def write_records(records: Iterable[Record], path: Path, **labels: object) -> None:
    """Writes the raw records, each with the same `labels` in front (such as the side and the round)."""
    write_jsonl(path, ({**labels, **asdict(record)} for record in records))


def read_records(path: Path) -> list[Record]:
    """Reads what `write_records` wrote; labels are dropped."""
    rows = (json.loads(line) for line in path.read_text(encoding="utf8").splitlines() if line)
    return [
        Record(**{**{k: row[k] for k in Record.__dataclass_fields__}, "token_times": tuple(row["token_times"])})
        for row in rows
    ]
