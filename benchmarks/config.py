"""The recipe sections that benchmarks own. Imports no torch."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from plugins.common import defaults
from plugins.common.config import Config


class Workload(Config):
    """The load: lengths, requests at a time, and how they arrive."""

    input_tokens: int = Field(default=128, ge=1)
    """Prompt tokens of a request."""
    output_tokens: int = Field(default=64, ge=1)
    """Tokens that each request generates; the end-of-sequence token is ignored."""
    concurrency: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 4), min_length=1)
    """Requests at a time; one measurement for each number."""
    requests: int = Field(default=8, ge=1)
    """Requests of a round, at least the highest concurrency."""
    arrival: Literal["closed", "poisson"] = "closed"
    """closed: a request starts when one ends; poisson: at random times, `request_rate` a second."""
    request_rate: float | None = Field(default=None, gt=0)
    """Requests a second, with `arrival: poisson`."""
    seed: int = Field(default=0, ge=0)
    """Prompts and arrival times."""

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
    """Service levels that a request must meet to count as good."""

    time_to_first_token: float | None = Field(default=None, gt=0)
    """Milliseconds."""
    inter_token_latency: float | None = Field(default=None, gt=0)
    """Milliseconds."""
    request_latency: float | None = Field(default=None, gt=0)
    """Milliseconds."""


class Benchmark(Config):
    """How to measure a build against its dense baseline. `null` leaves the measurement out."""

    workloads: tuple[Workload, ...] = Field(default=(Workload(),), min_length=1)
    """The loads to measure."""
    rounds: int = Field(default=defaults.ROUNDS, ge=1)
    """Interleaved rounds of dense and built; intervals need 2, narrow ones about 8."""
    goodput: Goodput | None = None
    """Also report the rate of requests that meet these service levels."""
    min_speedup: float | None = Field(default=None, gt=0)
    """Gate: smallest ratio of output tokens a second, built to dense."""
