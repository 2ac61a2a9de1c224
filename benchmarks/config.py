"""The recipe sections that benchmarks own. Imports no torch."""

from typing import Literal

from pydantic import Field

from plugins.config import Config


class Workload(Config):
    """What is asked of an engine: lengths, how many requests at once, how they arrive."""

    input_tokens: int = Field(128, ge=1)
    output_tokens: int = Field(64, ge=1)
    concurrency: tuple[int, ...] = (1, 4)
    requests: int = Field(16, ge=1)  # a concurrency level
    arrival: Literal["closed", "poisson"] = "closed"  # closed: the next request starts when one ends
    request_rate: float | None = Field(None, gt=0)  # requests a second, for poisson
    seed: int = 0


class Goodput(Config):
    """Service levels a request must meet to count as good, in milliseconds."""

    time_to_first_token: float | None = Field(None, gt=0)
    inter_token_latency: float | None = Field(None, gt=0)
    request_latency: float | None = Field(None, gt=0)


class Benchmark(Config):
    """How a build is measured against its dense baseline."""

    workloads: tuple[Workload, ...] = (Workload(),)
    rounds: int = Field(3, ge=1)  # interleaved rounds: dense, built, built, dense, ...
    goodput: Goodput | None = None
    min_speedup: float | None = Field(None, gt=0)  # a gate on output_token_throughput, off unless asked for
