"""Routers for tests of what uses them: bare facts of two features that are uniform over ten bins, and two learned ones.

One reads the prompt alone; the other also the next token, whose tokens are of an easy or of a hard topic.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from calibration.routing.divergence import TRITON
from calibration.routing.features import fit_features
from calibration.routing.predictor import fit
from calibration.routing.prefill import fit_prefill
from calibration.routing.router import Router, histograms

BUDGET = 0.05
VOCABULARY = 4096  # docs-llama's
Distribution = dict[int, float]
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
    features = fit_features(
        random.integers(0, 2000, (64, 64)), np.zeros((VOCABULARY, 8), np.float32), [" word"] * VOCABULARY
    )
    hard_N = random.random(200)
    prompts = [np.where(random.random(20) < hard, 3000, 5) for hard in hard_N]
    features_NF = np.stack([features.extract(prompt) for prompt in prompts])
    predictor = fit(features_NF, np.exp(-4 + 3 * hard_N)).predictor
    features.projected_VD[UNREADABLE[0]] = np.nan
    return Router(
        features, predictor, "this", ("dense", "built"), BUDGET, threshold, *histograms(features_NF), len(features_NF),
        seen=SEEN,
    )  # fmt: skip


def distributions(chance_N: np.ndarray[Any, Any], seed: int) -> list[Distribution]:
    """The 64 likeliest next tokens of N prompts, hard with `chance_N`: all of one entropy, 40 of each of its topic."""
    random = np.random.default_rng(seed)
    log_T = np.log(np.arange(TRITON.top, 0, -1.0) / (TRITON.top * (TRITON.top + 1) / 2) * 0.99)
    rows = []
    for chance in chance_N:
        topic = 100 if random.random() < chance else 200
        tokens = np.concatenate([topic + random.permutation(40), 1000 + random.permutation(TRITON.top - 40)])
        rows.append(dict(zip(tokens.tolist(), log_T.tolist(), strict=True)))
    return rows


def losses(next_tokens: list[Distribution], seed: int) -> np.ndarray[Any, Any]:
    """Losses of prompts: three times as much where the next token is of the hard topic, with noise."""
    hard_N = np.array([any(100 <= token < 140 for token in next_token) for next_token in next_tokens])
    return np.exp(-3 + np.log(3) * hard_N + 0.3 * np.random.default_rng(seed).standard_normal(len(hard_N)))


@cache
def prefill_router() -> Router:
    """`learned_router` with components of the next token, which its losses depend on alone: 0.05, or 0.15 if hard."""
    rows = distributions(np.full(200, 0.5), seed=6)
    features, prefill = learned_router().features, fit_prefill(rows, VOCABULARY)
    features_NF = np.stack([np.concatenate([features.extract(EASY), prefill.extract(row)]) for row in rows])
    predictor = fit(features_NF, losses(rows, seed=6)).predictor
    return Router(
        features, predictor, "this", ("dense", "built"), BUDGET, 0.1, *histograms(features_NF), len(features_NF),
        seen=SEEN, prefill=prefill,
    )  # fmt: skip


EASY = [5, 6, 7, 8]
HARD = [3000, 3001, 3002]
UNREADABLE = [666, 5]
