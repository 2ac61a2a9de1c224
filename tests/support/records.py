"""Reads records.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.serving.records import Record


def read_records(path: Path) -> list[Record]:
    """The records, without their labels."""
    rows = (json.loads(line) for line in path.read_text(encoding="utf8").splitlines() if line)
    return [
        Record(**{**{k: row[k] for k in Record.__dataclass_fields__}, "token_times": tuple(row["token_times"])})
        for row in rows
    ]
