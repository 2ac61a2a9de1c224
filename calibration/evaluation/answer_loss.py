"""The loss of exact match between two models on the same questions, its interval and its prediction. Imports no torch.

Interval: the score interval for a difference of paired proportions (Tango, Statistics in Medicine 17, 1998). Unlike
that of a bootstrap it has a width where no answer changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

CONFIDENCE = 0.95
Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
HALVINGS = 60  # of an interval of numbers: to a double's precision


@dataclass(frozen=True)
class Answers:
    """Of one model: whether each answer is right, and the margins of the right ones.

    A margin is by how much the largest logit exceeds the second, for each token of the expected answer.
    """

    right: list[bool]
    margins: list[list[float]]

    def predicted_loss(self, kl: float) -> float:
        """The share of all answers that change where the build's KL per token from this model is `kl`, in nats.

        Errors of the logits of standard deviation s cause a KL of about s**2 / 2 and move a margin by s * sqrt(2).
        """
        if kl <= 0:
            return 0.0
        error = NormalDist(0, 2 * math.sqrt(kl))
        kept = sum(math.prod(map(error.cdf, margins)) for margins in self.margins)
        return (len(self.margins) - kept) / len(self.right)

    def kl_of(self, loss: float) -> float:
        """The KL per token with this predicted loss, nats."""
        low, high = math.log(1e-9), math.log(1e3)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.predicted_loss(math.exp(middle)) < loss else (low, middle)
        return math.exp(low)


def compare_answers(dense: Sequence[bool], built: Sequence[bool]) -> dict[str, Any]:
    """Exact match of both models, and the build's loss with its interval, as shares of the questions."""
    lost = sum(before and not after for before, after in zip(dense, built, strict=True))
    gained = sum(after and not before for before, after in zip(dense, built, strict=True))
    return {
        "exact_match": {"questions": len(dense), "dense": sum(dense) / len(dense), "built": sum(built) / len(built)},
        "exact_match_loss": (lost - gained) / len(dense),
        "exact_match_loss_interval": list(loss_interval(lost, gained, len(dense))),
    }


def exact_match_change(compared: Mapping[str, Any]) -> str:
    """The result of `compare_answers` for a person: by how much exact match changes, with its interval."""
    low, high = compared["exact_match_loss_interval"]
    return f"exact match {-compared['exact_match_loss']:+.2%} ({-high:+.2%} to {-low:+.2%})"


def loss_interval(lost: int, gained: int, questions: int) -> tuple[float, float]:
    """The 95% interval of (lost - gained) / questions."""
    loss = (lost - gained) / questions

    def bound(end: float, score: float) -> float:
        inside, outside = loss, end
        for _ in range(HALVINGS):
            middle = (inside + outside) / 2
            near = abs(_score(middle, lost, gained, questions)) < score
            inside, outside = (middle, outside) if near else (inside, middle)
        return inside

    return bound(-1.0, Z), bound(1.0, Z)


def _score(loss: float, lost: int, gained: int, questions: int) -> float:
    """Of the hypothesis that the true loss is `loss`; McNemar's at 0."""
    b = (2 * questions - lost + gained) * loss - lost - gained
    share_gained = (math.sqrt(max(0.0, b * b + 8 * questions * gained * loss * (1 - loss))) - b) / (4 * questions)
    variance = questions * (2 * share_gained + loss * (1 - loss))
    return (lost - gained - questions * loss) / math.sqrt(variance) if variance > 0 else 0.0


def questions_needed(limit: float) -> int:
    """The fewest questions whose interval lies within `limit` where no answer changes."""
    return math.ceil(Z * Z * (1 - limit) / limit)
