"""A router's facts for tests of what uses them: two features, uniform over ten bins on the training prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from plugins.common.errors import UserError

BUDGET = 0.05


@dataclass
class Policy:
    threshold: float = 0.1
    build_id: str = "this"
    variants: tuple[str, ...] = ("dense", "built")
    budget_kl: float = BUDGET
    reference_FB: np.ndarray[Any, Any] = field(default_factory=lambda: np.full((2, 10), 0.1))
    edges: np.ndarray[Any, Any] = field(default_factory=lambda: np.tile(np.arange(0.1, 0.95, 0.1), (2, 1)))


@dataclass
class Loss:
    loss: float


class Share:
    """Features and predictor in one: the share of a prompt's tokens that are above 2000, and a loss in its proportion.

    A first token of 666 gives features that are not finite.
    """

    def extract(self, token_ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if not len(token_ids):
            raise UserError("the prompt is empty", "send at least one token")
        share = np.nan if token_ids[0] == 666 else (token_ids > 2000).mean()
        return np.array([share, 0.5], np.float32)

    def predict(self, features_F: np.ndarray[Any, Any]) -> Loss:
        return Loss(float(features_F[0]) if np.isfinite(features_F).all() else float("inf"))


@dataclass
class SimpleRouter(Policy):
    """A router without learning: easy prompts have small tokens."""

    features: Share = field(default_factory=Share)
    predictor: Share = field(default_factory=Share)


EASY = [5, 6, 7, 8]
HARD = [3000, 3001, 3002]
UNREADABLE = [666, 5]
