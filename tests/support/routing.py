"""Routers for tests of what uses them: bare facts of two features that are uniform over ten bins, and a learned one."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from calibration.routing.features import fit_features
from calibration.routing.predictor import fit
from calibration.routing.router import Router, histograms

BUDGET = 0.05
SEEN = {"triton": 1.0, "chat": 0.75, "completions": 0.5}


@dataclass
class Policy:
    threshold: float = 0.1
    build_id: str = "this"
    variants: tuple[str, ...] = ("dense", "built")
    budget_kl: float = BUDGET
    reference_FB: np.ndarray[Any, Any] = field(default_factory=lambda: np.full((2, 10), 0.1))
    prompts: int = 10_000
    edges: np.ndarray[Any, Any] = field(default_factory=lambda: np.tile(np.arange(0.1, 0.95, 0.1), (2, 1)))


@cache
def learned_router(threshold: float = 0.1) -> Router:
    """A router of docs-llama's vocabulary that learned that tokens above 2000 are hard; one token has no features."""
    random = np.random.default_rng(0)
    features = fit_features(random.integers(0, 2000, (64, 64)), np.zeros((4096, 8), np.float32), [" word"] * 4096)
    hard_N = random.random(200)
    prompts = [np.where(random.random(20) < hard, 3000, 5) for hard in hard_N]
    features_NF = np.stack([features.extract(prompt) for prompt in prompts])
    predictor = fit(features_NF, np.exp(-4 + 3 * hard_N)).predictor
    features.projected_VD[UNREADABLE[0]] = np.nan
    return Router(
        features, predictor, "this", ("dense", "built"), BUDGET, threshold, *histograms(features_NF), len(features_NF),
        seen=SEEN,
    )  # fmt: skip


EASY = [5, 6, 7, 8]
HARD = [3000, 3001, 3002]
UNREADABLE = [666, 5]
