"""Drift of the requests away from the training prompts: the population stability index of each feature."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

BOUND = 0.25  # a population stability index above it is a large shift by the usual rule of credit scoring
RECEDE = 0.6  # the alarm ends below this share of the bound
EMPTY = 0.5  # requests that an empty bin counts as
PERIOD = 25  # requests between two indices


def noise(prompts: int, bins: int) -> float:
    """What the index of a feature may be without any drift, since the histograms are of so few prompts.

    Its mean is (bins - 1) / prompts; the greatest of 14 features stays below 3.5 times as much (simulated).
    """
    return 3.5 * (bins - 1) / prompts


class Drift:
    """The features of the last `window` requests against the training prompts' histograms.

    reference_FB: share or count of the training prompts in each of B bins, by feature
    edges_FE: the B - 1 inner edges of the bins, ascending; bin b holds edges[b - 1] <= value < edges[b]
    """

    def __init__(self, reference_FB: Array, edges_FE: Array, window: int = 1000, bound: float = BOUND) -> None:
        features, bins = reference_FB.shape
        assert edges_FE.shape == (features, bins - 1), f"edges {edges_FE.shape} of histograms {reference_FB.shape}"
        self._edges_FE = edges_FE
        total_F1 = reference_FB.sum(axis=1, keepdims=True)
        self._expected_FB = np.maximum(reference_FB / total_F1, EMPTY / window)
        self._counts_FB = np.zeros((features, bins))
        self._rows = np.arange(features)
        self._bins_WF = np.zeros((window, features), np.int64)
        self._bound = bound
        self.seen = 0
        self.index = 0.0
        """The greatest population stability index over the features; 0 until the window is full."""
        self.alarm = False

    def add(self, features_F: Array) -> None:
        """Takes one request's features; those that are not finite count in no bin and are left out."""
        if not np.isfinite(features_F).all():
            return
        window = len(self._bins_WF)
        slot = self.seen % window
        if self.seen >= window:
            self._counts_FB[self._rows, self._bins_WF[slot]] -= 1
        bins_F = (features_F[:, None] >= self._edges_FE).sum(axis=1)
        self._bins_WF[slot] = bins_F
        self._counts_FB[self._rows, bins_F] += 1
        self.seen += 1
        if self.seen >= window and self.seen % PERIOD == 0:
            self._measure(window)

    def _measure(self, window: int) -> None:
        actual_FB = np.maximum(self._counts_FB, EMPTY) / window
        index_F = ((actual_FB - self._expected_FB) * np.log(actual_FB / self._expected_FB)).sum(axis=1)
        self.index = float(index_F.max())
        self.alarm = self.index > (self._bound * RECEDE if self.alarm else self._bound)
