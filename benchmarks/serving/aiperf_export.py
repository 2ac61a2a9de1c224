"""Writes records in the form of AIPerf's `profile_export.jsonl`, for the tools that read it. Imports no torch.

https://docs.nvidia.com/aiperf/tutorials/working-with-profile-export-files
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.serving import request_metrics
from benchmarks.serving.records import Record, write_jsonl


def export_aiperf(records: Iterable[Record], path: Path, epoch_offset: float | None = None) -> None:
    """Writes one line a request: metadata, metrics with their units, and the error or null.

    `epoch_offset` is what to add to a record's times to get epoch seconds; by default that of this process's clock now.
    """
    offset = time.time() - time.perf_counter() if epoch_offset is None else epoch_offset
    write_jsonl(path, (_row(number, record, offset) for number, record in enumerate(records)))


def _row(number: int, record: Record, offset: float) -> dict[str, Any]:
    return {
        "metadata": {
            "session_num": number,
            "x_request_id": record.id,
            "conversation_id": record.id,
            "turn_index": 0,
            "request_start_ns": round((record.start + offset) * 1e9),
            "request_end_ns": round((record.end + offset) * 1e9),
            "benchmark_phase": "profiling",
            "was_cancelled": False,
        },
        "metrics": dict(_metrics(record)) if record.error is None else None,
        "error": None if record.error is None else {"code": None, "type": "RequestError", "message": record.error},
    }


def _metrics(record: Record) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "input_sequence_length", {"value": record.input_tokens, "unit": "tokens"}
    yield "output_sequence_length", {"value": record.output_tokens, "unit": "tokens"}
    for name, function in request_metrics.PER_REQUEST.items():
        value = function(record)
        if value is not None:
            yield name, {"value": value, "unit": request_metrics.METRICS[name].unit.replace("/s", "/sec")}
    gaps = [(b - a) * 1e3 for a, b in zip(record.token_times, record.token_times[1:], strict=False)]
    if gaps:
        yield "inter_chunk_latency", {"value": gaps, "unit": "ms"}
