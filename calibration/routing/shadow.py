"""Shadow runs: both engines score a request again after its answer was sent, while nothing else runs."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from calibration.routing import metrics
from calibration.routing.controller import Controller, Decision

log = logging.getLogger(__name__)

Measure = Callable[[], float]
"""Runs both engines and returns the cheap one's loss in nats per token."""

_LOOK = 0.02  # seconds between two looks whether the engines are idle


class ShadowRuns:
    """A thread that measures queued requests one at a time, each while `idle()`. A full queue drops new requests.

    `after` runs after each measurement, on the same thread.
    """

    def __init__(
        self,
        controller: Controller,
        idle: Callable[[], bool],
        size: int = 64,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        self._controller = controller
        self._idle = idle
        self._after = after
        self._queue: queue.Queue[tuple[Decision, Measure]] = queue.Queue(size)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shadow", daemon=True)
        self._thread.start()

    def offer(self, decision: Decision, measure: Measure) -> None:
        """Queues a request, or drops it. One beyond the threshold is queued too, so that load drops both alike."""
        try:
            self._queue.put_nowait((decision, measure))
        except queue.Full:
            self._controller.count(metrics.SHADOWS_DROPPED)

    def stop(self) -> None:
        """Ends the thread after the current run; queued ones are lost."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                decision, measure = self._queue.get(timeout=_LOOK)
            except queue.Empty:
                continue
            while not self._idle():
                if self._stopping.wait(_LOOK):
                    return
            self._measure(decision, measure)

    def _measure(self, decision: Decision, measure: Measure) -> None:
        try:
            loss = measure() if decision.within else 0.0
        except Exception as error:  # an engine may fail in any way, and its answer was sent long ago
            self._controller.count(metrics.SHADOWS_FAILED)
            log.warning("a shadow run failed: %s", error)
        else:
            self._controller.measured(decision, loss)
            self._after()
