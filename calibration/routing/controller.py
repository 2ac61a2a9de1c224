"""Decides which variant answers a request, and holds the loss within the budget.

A request names a quality: `high` is the dense variant, `fast` the cheap one, and `auto` the cheap one where the
predicted loss is at or under the threshold. The threshold follows what shadow runs measure (`threshold.py`). While
requests drift away from the training prompts (`drift.py`), `auto` is dense.
"""

from __future__ import annotations

import math
import random
import threading
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np

from calibration.routing import metrics
from calibration.routing.drift import BOUND, Drift, noise
from calibration.routing.metrics import Sample
from calibration.routing.threshold import IntegralControl
from plugins.common.errors import UserError

Quality = Literal["high", "auto", "fast"]
QUALITIES: tuple[str, ...] = get_args(Quality)
MEMORY = 1000  # shadow runs that the recent measured loss is a mean over


class Policy(Protocol):
    """What the controller reads of a router. Losses in nats per token; histograms as `Drift` takes them."""

    @property
    def build_id(self) -> str: ...
    @property
    def variants(self) -> tuple[str, ...]:
        """The dense one, then the cheap one, then any others, poorer and poorer."""

    @property
    def budget_kl(self) -> float: ...
    @property
    def threshold(self) -> float: ...
    @property
    def edges(self) -> np.ndarray[Any, Any]: ...
    @property
    def reference_FB(self) -> np.ndarray[Any, Any]: ...  # noqa: N802
    @property
    def prompts(self) -> int:
        """How many prompts the histograms were made of."""


class UnavailableError(Exception):
    """No variant is up."""


@dataclass(frozen=True)
class Settings:
    """shadow: share of `auto` requests that are measured
    rest: the threshold while the dense engine is idle, as a share of the threshold that meets the budget
    gain: of the integral control
    window, bound: requests in the drift index, and the index above which the alarm is on, without its noise
    """

    shadow: float = 0.01
    rest: float = 1.0
    gain: float = 0.02
    window: int = 1000
    bound: float = BOUND


@dataclass(frozen=True)
class Decision:
    """Which variant answers, and which one was requested, by name or by the quality.

    within: the budget allows the cheap variant. shadow: measure this request after its answer.
    """

    variant: str
    requested: str
    predicted: float
    within: bool
    shadow: bool


class Controller:
    """Thread-safe. Call `decide` for each request and `measured` after each shadow run."""

    def __init__(self, policy: Policy, settings: Settings | None = None, seed: int | None = None) -> None:
        assert len(policy.variants) >= 2, "a router has a dense and a cheap variant"
        self.policy = policy
        self.settings = settings or Settings()
        self._lock = threading.Lock()
        self._coin = random.Random(seed)
        self._control = IntegralControl(policy.budget_kl, policy.threshold, self.settings.gain)
        bound = self.settings.bound + noise(policy.prompts, policy.reference_FB.shape[1])
        self._drift = Drift(policy.reference_FB, policy.edges, self.settings.window, bound)
        self._totals: defaultdict[Sample, float] = defaultdict(float)
        self._measured = 0  # shadow runs in the mean
        self._loss = 0.0  # mean of the recent ones, nats per token

    def decide(
        self,
        features_F: np.ndarray[Any, Any],
        predicted: float,
        quality: Any = "auto",
        variant: Any = None,
        up: Collection[str] | None = None,
        full: Collection[str] = (),
        load: float = 1.0,
    ) -> Decision:
        """The decision for one request.

        predicted: loss of the cheap variant in nats per token; dense answers where it is not finite
        quality: one of QUALITIES. variant: overrides the quality
        up: variants that answer now (None: all). full: variants whose queues are full
        load: share of the dense engine that is busy

        Raises UserError for an unknown quality or variant, UnavailableError where nothing is up.
        """
        _require("quality", quality, QUALITIES)
        variants = self.policy.variants
        if variant is not None:
            _require("variant", variant, variants)
        auto = variant is None and quality == "auto"
        by_threshold = auto and math.isfinite(predicted)
        with self._lock:
            self._drift.add(features_F)
            within = not self._drift.alarm and predicted <= self._control.threshold  # false for NaN
            requested = variant or self._requested(quality, predicted, within, load)
            answers = route_around(requested, variants, up, full)
            shadow = by_threshold and not self._drift.alarm and self._coin.random() < self.settings.shadow
            self._totals[Sample(metrics.REQUESTS, (("variant", answers), ("quality", quality)))] += 1
            self._count(metrics.REROUTED, answers != requested)
            self._count(metrics.UNPREDICTED, auto and not by_threshold)
            if by_threshold:
                self._count(metrics.PREDICTED, 1)
                self._count(metrics.PREDICTED_LOSS, predicted if answers != variants[0] else 0.0)
        return Decision(answers, requested, predicted, within, shadow)

    def measured(self, decision: Decision, loss: float) -> None:
        """Takes the loss that a shadow run measured, in nats per token. One beyond the threshold counts as 0.

        While the alarm is on the threshold decides nothing, so it stays where it is.
        """
        counted = loss if decision.within else 0.0
        with self._lock:
            if self._drift.alarm or not 0 <= counted < math.inf:  # also NaN
                self._count(metrics.SHADOWS_DISCARDED, 1)
                return
            self._control.measured(counted)
            self._count(metrics.MEASURED, 1)
            self._count(metrics.MEASURED_LOSS, counted)
            self._measured = min(self._measured + 1, MEMORY)
            self._loss += (counted - self._loss) / self._measured

    def count(self, name: str, amount: float = 1) -> None:
        """Adds to one of the counters that have no labels."""
        with self._lock:
            self._count(name, amount)

    @property
    def alarm(self) -> bool:
        """Whether requests drift away from the training prompts now."""
        return self._drift.alarm

    def samples(self) -> dict[Sample, float]:
        """The value of each metric now."""
        with self._lock:
            gauges = {
                metrics.THRESHOLD: self._control.threshold,
                metrics.RECENT_LOSS: self._loss,
                metrics.BUDGET: self.policy.budget_kl,
                metrics.SHADOW_SHARE: self.settings.shadow,
                metrics.DRIFT: self._drift.index,
                metrics.DRIFT_ALARM: float(self._drift.alarm),
            }
            return {**self._totals, **{Sample(name): value for name, value in gauges.items()}}

    def state(self) -> dict[str, float]:
        """What a restart resumes from: JSON values."""
        with self._lock:
            return {"threshold": self._control.threshold, "measured": self._measured, "loss": self._loss}

    def resume(self, state: Mapping[str, float]) -> None:
        """Resumes from what `state` returned."""
        with self._lock:
            self._control.resume(state["threshold"])
            self._measured, self._loss = int(state["measured"]), state["loss"]

    def _requested(self, quality: str, predicted: float, within: bool, load: float) -> str:
        dense, cheap = self.policy.variants[:2]
        if quality == "auto":
            rest = self.settings.rest ** (1 - min(max(load, 0.0), 1.0))
            return cheap if within and predicted <= self._control.threshold * rest else dense
        return cheap if quality == "fast" else dense

    def _count(self, name: str, amount: float) -> None:
        self._totals[Sample(name)] += amount


def route_around(requested: str, variants: Sequence[str], up: Collection[str] | None, full: Collection[str]) -> str:
    """The variant that answers where `requested` may be down or full.

    Another is never poorer than the requested one, unless nothing else is up: a poorer answer beats none. Where all of
    them are full the requested one answers: its own queue decides. Raises UnavailableError where none is up.
    """
    live = [variant for variant in variants if up is None or variant in up]
    if not live:
        raise UnavailableError("no variant is up: try again later")
    place = variants.index(requested)
    as_good = [variant for variant in reversed(variants[: place + 1]) if variant in live]
    free = [variant for variant in as_good if variant not in full]
    return (free or as_good or live)[0]


def _require(name: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:  # whatever a client sent
        raise UserError(f"'{name}' is {value!r}", f"send one of {', '.join(known)}")
