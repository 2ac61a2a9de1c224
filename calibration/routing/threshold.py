"""The threshold on the predicted loss, moved by measured losses so that the mean loss meets the budget."""

from __future__ import annotations

import math

WIDEST = 64.0  # budgets: the highest threshold
NARROWEST = 1 / 1024  # budgets: the lowest
AIM = 0.95  # of the budget: room for the time that a change takes to be seen
CAP = 50.0  # budgets that one measurement counts for at most, so that one broken answer cannot close the router


class IntegralControl:
    """Integral action on the log of the threshold, with its state clamped against windup.

    After each measured request: log threshold += gain (1 - loss / aim), where the aim is a little under the budget. The
    steps add up, so after n measurements their mean lies within |log threshold's move| / (gain n) aims of the aim,
    whatever the predictor is worth: the argument of adaptive conformal inference (Gibbs and Candes, 2021). Clamped
    steps are left out of that.

    `threshold` and `budget` are in nats per token. A threshold of 0 stays 0: no request is cheap.
    """

    def __init__(self, budget: float, threshold: float, gain: float = 0.02) -> None:
        self._budget = budget
        self._gain = gain
        self.threshold = self._clamp(threshold)

    def measured(self, loss: float) -> None:
        """Takes one request's loss in nats per token: 0 where the threshold gave it to the dense engine."""
        if self.threshold > 0:
            share = min(loss / (AIM * self._budget), CAP)
            self.threshold = self._clamp(self.threshold * math.exp(self._gain * (1 - share)))

    def resume(self, threshold: float) -> None:
        """Resumes from the threshold of an earlier run, unless no request may be cheap."""
        if self.threshold > 0:
            self.threshold = self._clamp(threshold) or self.threshold

    def _clamp(self, threshold: float) -> float:
        if self._budget <= 0 or not threshold > 0:  # also NaN
            return 0.0
        return min(max(threshold, self._budget * NARROWEST), self._budget * WIDEST)
