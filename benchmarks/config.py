"""The recipe sections that benchmarks own. Imports no torch."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from plugins.common import defaults
from plugins.common.config_base import Config


class Workload(Config):
    """A load: lengths, concurrency and arrival of requests."""

    input_tokens: int = Field(default=128, ge=1)
    """Prompt tokens per request."""
    output_tokens: int = Field(default=64, ge=1)
    """Generated tokens per request; the end-of-sequence token is ignored."""
    concurrency: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 4), min_length=1)
    """Requests at a time; one measurement for each value."""
    requests: int = Field(default=8, ge=1)
    """Requests per round, at least the highest concurrency."""
    arrival: Literal["closed", "poisson"] = "closed"
    """closed: a request starts when another ends; poisson: at random times, `request_rate` per second."""
    request_rate: float | None = Field(default=None, gt=0)
    """Requests per second, with `arrival: poisson`."""
    seed: int = Field(default=0, ge=0)
    """Seed for prompts and arrival times."""

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
    """Measurement of a build against its dense baseline. `null` omits it."""

    workloads: tuple[Workload, ...] = Field(default=(Workload(),), min_length=1)
    """Loads to measure."""
    rounds: int = Field(default=defaults.ROUNDS, ge=1)
    """Interleaved rounds of dense and built; at least 2 for intervals, about 8 for narrow ones."""
    goodput: Goodput | None = None
    """Also report the rate of requests that meet these service levels."""
    min_speedup: float | None = Field(default=None, gt=0)
    """Gate: minimum ratio of output tokens per second, built to dense."""
