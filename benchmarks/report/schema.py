"""What report.json holds. Keys that are not described here are kept in the file and left out of the pages.

Measured figures are in `accuracy`, `size`, `layers` and `performance`; predicted ones in `predicted` only.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from plugins.common.patterns import TENSOR_CORE


def _whole(bounds: Any) -> Any:
    """An interval that lacks a bound (not finite, as one document alone gives) is none."""
    return None if isinstance(bounds, list | tuple) and None in bounds else bounds


Interval = Annotated[tuple[float, float] | None, BeforeValidator(_whole)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class Perplexity(_Part):
    perplexity: float | None  # None: not finite


class ExactMatch(_Part):
    """The share of the questions that each model answers with the expected words."""

    questions: int
    dense: float
    built: float


class Accuracy(_Part):
    """Of the build against the dense model, on the same tokens. `perplexity_increase` is a share: 0.05 for 5%."""

    dense: Perplexity
    built: Perplexity
    perplexity_increase: float | None
    perplexity_increase_interval: Interval = None
    kl: float | None = None
    top1_agreement: float | None = None
    exact_match: ExactMatch | None = None
    exact_match_loss: float | None = None
    exact_match_loss_interval: Interval = None
    tokens: int | None = None
    documents: int | None = None
    context_length: int | None = None


class Size(_Part):
    dense_bytes: int
    built_bytes: int


class Layer(_Part):
    """`zeros` is the share of zero weights; `kernel` is what runs and `reason` why.

    A page's row may stand for `count` layers; in the file each has its own.
    """

    name: str
    out_features: int
    in_features: int
    format: str
    sparse: bool
    zeros: float | None = None
    dense_bytes: int | None = None
    built_bytes: int | None = None
    kernel: str | None = None
    reason: str | None = None
    count: int = 1


class Spread(_Part):
    """One metric of one side: ms, or a rate a second. Metrics of the whole run have only a mean and its interval."""

    unit: str = ""
    mean: float
    interval: Interval = None
    p5: float | None = None
    p25: float | None = None
    p50: float | None = None
    p75: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None


class Speedup(_Part):
    """How many times better the build is: above 1 is faster for times and rates alike."""

    ratio: float
    interval: Interval = None


class Point(_Part):
    """One workload at one concurrency."""

    workload: dict[str, Any]
    concurrency: int
    rounds: int | None = None
    requests: int | None = None
    errors: dict[str, int] = {}
    dense: dict[str, Spread]
    built: dict[str, Spread]
    speedup: dict[str, Speedup]
    limit: dict[str, Any] | None = None


class ParetoPoint(_Part):
    """A further build of the same model: what it weighs and what it costs. `chosen` marks the one that was built."""

    label: str = ""
    bytes: int
    perplexity: float
    chosen: bool = False


class Gate(_Part):
    """A limit that the build had to keep. `message` states the result."""

    name: str
    passed: bool
    limit: float | None = None
    value: float | None = None
    message: str = ""


class RoutingPoint(_Part):
    """Mean loss over all requests, nats per token, if the build serves `share` of them: router, coin and oracle."""

    share: float
    loss: float
    loss_interval: Interval = None
    random_loss: float
    oracle_loss: float


class Routing(_Part):
    """The router between the dense model and the build, on held-out prompts. `share` and `loss`: at its threshold."""

    curve: list[RoutingPoint]
    gate: Gate
    budget_kl: float
    share: float
    loss: float
    controller_us: float
    decision: dict[str, str]


class Report(_Part):
    """The whole report. A build that stopped early leaves out what it did not reach."""

    twofour: str
    model: str
    recipe: dict[str, Any] = {}
    backend: str | None = None
    device: dict[str, Any] = {}
    created: str | None = None
    accuracy: Accuracy | None = None
    size: Size | None = None
    layers: list[Layer] = []
    routing: Routing | None = None
    performance: list[Point] = []
    predicted: dict[str, Any] | list[dict[str, Any]] | None = None
    pareto: list[ParetoPoint] = []
    environment: dict[str, Any] = {}
    gates: list[Gate] = []
    notes: list[str] = []

    @property
    def pruned(self) -> bool:
        """Whether any layer is sparse."""
        return any(layer.sparse for layer in self.layers) or bool(self.recipe.get("sparsity"))

    @property
    def pattern(self) -> str:
        """Of the sparse layers."""
        return str((self.recipe.get("sparsity") or {}).get("pattern", TENSOR_CORE))

    @property
    def failed_gates(self) -> list[Gate]:
        return [gate for gate in self.gates if not gate.passed]
