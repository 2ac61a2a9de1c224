"""Serves a router: tokens in, a decision out; with shadow runs, saved state and metrics."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from calibration.routing import metrics, state
from calibration.routing.controller import Controller, Decision, Settings
from calibration.routing.metrics import Sample
from calibration.routing.prefill import RunPrefill
from calibration.routing.router import Router
from calibration.routing.shadow import Measure, ShadowRuns

log = logging.getLogger(__name__)

_SAVE_PERIOD = 10.0  # seconds between two writes of the state


class RouterService:
    """Thread-safe. `close` it at the end.

    idle: whether the engines do nothing, so that a shadow run may start. state_file: resumed from now, and written at
    most every ten seconds and at the end; None: a restart begins afresh. clock: seconds; one that jumps moves nothing
    but the time of the next write. Raises UserError for another build's state.
    """

    def __init__(
        self,
        router: Router,
        idle: Callable[[], bool],
        settings: Settings | None = None,
        state_file: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.controller = Controller(router, settings)
        self._router = router
        self._state_file = state_file
        self._clock = clock
        if state_file is not None:
            state.resume(self.controller, state_file)
        self._saved = -math.inf
        self._shadows = ShadowRuns(self.controller, idle, after=self._save_if_due)

    def decide(
        self, token_ids: np.ndarray[Any, Any] | None, run_prefill: RunPrefill = lambda: None, **requested: Any
    ) -> Decision:
        """The decision for a prompt [T] int64; `requested` as in `Controller.decide`.

        A prompt of None is one that cannot be read here: its loss is not predicted. `run_prefill` is called if the
        router reads the prefill, the threshold decides, and the cheap variant is up and free. Raises UserError for an
        empty prompt.
        """
        start = self._clock()
        features_F, predicted = np.full(1, np.nan), float("inf")
        if token_ids is not None:
            features_F = self._router.extract(
                token_ids, run_prefill if self._may_be_cheap(**requested) else lambda: None
            )
            predicted = float(self._router.predictor.predict(features_F).loss)
        decision = self.controller.decide(features_F, predicted, **requested)
        self.controller.count(metrics.SECONDS, max(self._clock() - start, 0.0))
        self.controller.count(metrics.TIMED)
        return decision

    def answered(self, decision: Decision, measure: Measure) -> None:
        """Call it after the answer was sent: queues the shadow run that the decision requires."""
        if decision.shadow:
            self._shadows.offer(decision, measure)

    def samples(self) -> dict[Sample, float]:
        """The value of each metric now."""
        return self.controller.samples()

    def save(self) -> None:
        """Writes the state now."""
        self._saved = self._clock()
        if self._state_file is not None:
            try:
                state.save(self.controller, self._state_file)
            except OSError as error:  # a full disk must not stop the service
                log.warning("'%s' cannot be written: %s", self._state_file, error)

    def close(self) -> None:
        """Ends the shadow runs and writes the state."""
        self._shadows.stop()
        self.save()

    def _may_be_cheap(
        self,
        quality: Any = "auto",
        variant: Any = None,
        up: Collection[str] | None = None,
        full: Collection[str] = (),
        **_: Any,
    ) -> bool:
        """Whether the threshold decides, and the cheap variant is up and free."""
        cheap = self.controller.policy.variants[1]
        return variant is None and quality == "auto" and (up is None or cheap in up) and cheap not in full

    def _save_if_due(self) -> None:
        if not 0 <= self._clock() - self._saved < _SAVE_PERIOD:  # also a clock that was set back
            self.save()
