"""The recipe sections that benchmarks own. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from plugins.common.config import Config


class Workload(Config):
    """What is asked of an engine: lengths, how many requests at once, how they arrive."""

    input_tokens: int = Field(default=128, ge=1)
    output_tokens: int = Field(default=64, ge=1)
    concurrency: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 4), min_length=1)
    requests: int = Field(default=8, ge=1)  # of each round
    arrival: Literal["closed", "poisson"] = "closed"  # closed: the next request starts when one ends
    request_rate: float | None = Field(default=None, gt=0)  # requests a second, for poisson
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.requests < max(self.concurrency):
            raise ValueError(
                f"requests is {self.requests}: it must be at least the highest concurrency, {max(self.concurrency)}"
            )
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
    rounds: int = Field(default=8, ge=1)  # dense, built, built, dense, ...: intervals need 2, narrow ones about 8
    goodput: Goodput | None = None
    min_speedup: float | None = Field(default=None, gt=0)  # a gate on output_token_throughput, off unless asked for
