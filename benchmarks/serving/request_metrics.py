"""Metrics of requests and of runs, with AIPerf's names, units and formulas. Imports no torch.

https://docs.nvidia.com/aiperf/reference/ai-perf-metrics-reference
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.config import Goodput
from benchmarks.serving.records import Record


@dataclass(frozen=True)
class Metric:
    """A metric's name, unit, and which way is better."""

    name: str
    unit: str
    better: Literal["lower", "higher"]


def time_to_first_token(record: Record) -> float | None:
    """Milliseconds from the request's start to its first token."""
    return (record.token_times[0] - record.start) * 1e3 if record.token_times else None


def request_latency(record: Record) -> float | None:
    """Milliseconds from the request's start to its last token."""
    return (record.end - record.start) * 1e3 if record.token_times else None


def inter_token_latency(record: Record) -> float | None:
    """Milliseconds a token after the first: (request_latency - time_to_first_token) / (output_tokens - 1).

    An average over the request. None for fewer than 2 tokens.
    """
    if record.output_tokens < 2 or not record.token_times:
        return None
    return (record.token_times[-1] - record.token_times[0]) * 1e3 / (record.output_tokens - 1)


def output_token_throughput_per_user(record: Record) -> float | None:
    """Tokens a second that one user sees after the first token: 1 / inter_token_latency."""
    latency = inter_token_latency(record)
    return 1e3 / latency if latency else None


PER_REQUEST: dict[str, Callable[[Record], float | None]] = {
    function.__name__: function
    for function in (time_to_first_token, inter_token_latency, request_latency, output_token_throughput_per_user)
}


@dataclass(frozen=True)
class Totals:
    """Sums over one run, from which its rates follow. `seconds` is from the first start to the last token."""

    requests: int
    good_requests: int | None
    output_tokens: int
    seconds: float

    @property
    def output_token_throughput(self) -> float:
        """Tokens a second of all requests together: output_tokens / seconds."""
        return self.output_tokens / self.seconds

    @property
    def request_throughput(self) -> float:
        """Requests a second: requests / seconds."""
        return self.requests / self.seconds

    @property
    def goodput(self) -> float | None:
        """Requests a second that met every service level; None where no level was given."""
        return None if self.good_requests is None else self.good_requests / self.seconds


METRICS = {
    metric.name: metric
    for metric in (
        Metric("time_to_first_token", "ms", "lower"),
        Metric("inter_token_latency", "ms", "lower"),
        Metric("request_latency", "ms", "lower"),
        Metric("output_token_throughput_per_user", "tokens/s/user", "higher"),
        Metric("output_token_throughput", "tokens/s", "higher"),
        Metric("request_throughput", "requests/s", "higher"),
        Metric("goodput", "requests/s", "higher"),
    )
}


def is_good(record: Record, levels: Goodput) -> bool:
    """Whether the request met every service level that `levels` gives. A metric that it lacks is not met."""
    for name, limit in levels.model_dump(exclude_none=True).items():
        value = PER_REQUEST[name](record)
        if value is None or value > limit:
            return False
    return record.error is None


def total(records: Sequence[Record], levels: Goodput | None = None) -> Totals:
    """Sums a run's records without errors. Raises ValueError where none is left."""
    good = [record for record in records if record.error is None and record.token_times]
    if not good:
        raise ValueError("no request of the run succeeded")
    return Totals(
        requests=len(good),
        good_requests=None if levels is None else sum(is_good(record, levels) for record in good),
        output_tokens=sum(record.output_tokens for record in good),
        seconds=max(record.end for record in good) - min(record.start for record in records),
    )
