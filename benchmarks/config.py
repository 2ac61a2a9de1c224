"""The recipe sections that benchmarks own. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from plugins.config import Config


class Workload(Config):
    """What is asked of an engine: lengths, how many requests at once, how they arrive."""

    input_tokens: int = Field(default=128, ge=1)
    output_tokens: int = Field(default=64, ge=1)
    concurrency: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 4), min_length=1)
    requests: int = Field(default=16, ge=1)  # a concurrency level
    arrival: Literal["closed", "poisson"] = "closed"  # closed: the next request starts when one ends
    request_rate: float | None = Field(default=None, gt=0)  # requests a second, for poisson
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _rate_where_it_counts(self) -> Self:
        if (self.arrival == "poisson") != (self.request_rate is not None):
            raise ValueError("request_rate goes with arrival: poisson, and only with it")
        return self


class Goodput(Config):
    """Service levels a request must meet to count as good, in milliseconds."""

    time_to_first_token: float | None = Field(default=None, gt=0)
    inter_token_latency: float | None = Field(default=None, gt=0)
    request_latency: float | None = Field(default=None, gt=0)


class Benchmark(Config):
    """How a build is measured against its dense baseline."""

    workloads: tuple[Workload, ...] = Field(default=(Workload(),), min_length=1)
    rounds: int = Field(
        default=5, ge=1
    )  # interleaved: dense, built, built, dense, ...; an interval needs 2, a narrow one 5
    goodput: Goodput | None = None
    min_speedup: float | None = Field(default=None, gt=0)  # a gate on output_token_throughput, off unless asked for
