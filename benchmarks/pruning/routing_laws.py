"""Ways to move a router's threshold, compared by simulation. Losses in nats per token.

A law takes each measured request and gives the threshold. Requests that it does not give to the cheap engine cost
nothing; `loss` is None for them, since nothing runs.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np

from calibration.routing.threshold import AIM, IntegralControl


class Law(Protocol):
    @property
    def threshold(self) -> float: ...

    def measured(self, predicted: float, loss: float | None) -> None:
        """Takes one request."""


class Fixed:
    """The threshold that was learned."""

    def __init__(self, budget: float, threshold: float) -> None:
        self.threshold = threshold

    def measured(self, predicted: float, loss: float | None) -> None:
        pass


class Integral:
    """The law that the controller uses."""

    def __init__(self, budget: float, threshold: float) -> None:
        self._control = IntegralControl(budget, threshold)

    @property
    def threshold(self) -> float:
        return self._control.threshold

    def measured(self, predicted: float, loss: float | None) -> None:
        self._control.measured(loss or 0.0)


class LeastSquares:
    """Recursive least squares of log loss on log prediction, with forgetting (Ljung, System Identification, 1999).

    The threshold is the greatest at which the recent requests, by the fitted mean of a log-normal loss, stay within
    the budget.
    """

    FORGETTING = 0.97  # a memory of 33 measurements: as quick as the integral; a longer one is late by as much
    RECENT = 2000  # predictions used as a sample of later ones
    LEAST = 1e-6  # nats per token: a loss that is smaller counts as this

    def __init__(self, budget: float, threshold: float) -> None:
        self.threshold = threshold
        self._budget = budget
        self._weights = np.array([0.0, 1.0])  # the prediction itself
        self._covariance = np.eye(2)
        self._variance = 0.5
        self._recent: deque[float] = deque(maxlen=self.RECENT)

    def measured(self, predicted: float, loss: float | None) -> None:
        self._recent.append(predicted)
        if loss is not None:
            self._fit(np.array([1.0, math.log(predicted)]), math.log(max(loss, self.LEAST)))
        if len(self._recent) >= 100:
            sorted_R = np.sort(self._recent)
            mean_R = np.exp(self._weights[0] + self._weights[1] * np.log(sorted_R) + self._variance / 2)
            within = np.cumsum(mean_R) <= AIM * self._budget * len(sorted_R)
            self.threshold = float(sorted_R[max(int(within.sum()) - 1, 0)])

    def _fit(self, x: np.ndarray[tuple[int], np.dtype[np.float64]], y: float) -> None:
        error = y - float(self._weights @ x)
        gain = self._covariance @ x / (self.FORGETTING + x @ self._covariance @ x)
        self._weights = self._weights + gain * error
        self._covariance = (self._covariance - np.outer(gain, x @ self._covariance)) / self.FORGETTING
        self._variance += (1 - self.FORGETTING) * (error * error - self._variance)


LAWS: dict[str, Callable[[float, float], Law]] = {"fixed": Fixed, "integral": Integral, "least squares": LeastSquares}
