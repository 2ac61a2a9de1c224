"""Requests of the benchmark's drivers."""

from typing import Any

from benchmarks.config import Workload
from benchmarks.serving.workload import BenchRequest, make_requests


def ask(**fields: Any) -> list[BenchRequest]:
    return make_requests(Workload(**{"input_tokens": 4, "output_tokens": 5, "requests": 6, **fields}), 50)
