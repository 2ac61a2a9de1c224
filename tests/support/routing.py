"""A router's facts for tests of what uses them: two features, uniform over ten bins on the training prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

BUDGET = 0.05


@dataclass
class Policy:
    threshold: float = 0.1
    build_id: str = "this"
    variants: tuple[str, ...] = ("dense", "built")
    budget_kl: float = BUDGET
    reference_FB: np.ndarray[Any, Any] = field(default_factory=lambda: np.full((2, 10), 0.1))
    edges: np.ndarray[Any, Any] = field(default_factory=lambda: np.tile(np.arange(0.1, 0.95, 0.1), (2, 1)))
