"""The most sparsity under a budget for the loss of accuracy, with one or two builds evaluated, at most three.

The prices of channels (`calibration.budget.channel_prices`) add up to a predicted KL from the dense model. A method
that reconstructs takes back part of it, by a factor that the first build shows and the second one is chosen by. What
is chosen was measured, and was within the budget.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from calibration.budget.allocation import Allocation, Allocator
from calibration.config import Budget
from calibration.evaluation.answer_loss import Answers
from plugins.common.errors import GateError, UserError

TAKEN_BACK = {"reconstruct": 0.5, "sparsegpt": 0.8}  # of the predicted KL this share is left, before a build shows it
NEAR = 0.8  # of the budget: what the first build may leave unused
MARGIN = 0.9  # of the budget, that the second build aims at
MOST_BUILDS = 3  # the third only after two that are over the budget
TINY = 1e-12  # nats
PREDICTED = 6  # points of the predicted front

Measure = Callable[[Allocation], Mapping[str, Any]]
"""Measures a build: its accuracy by the names of LIMITS."""


@dataclass(frozen=True)
class Point:
    """An allocation. `measured`: whether `loss`, in what the budget counts, was measured and not predicted.

    `nats`: the KL that it stands for.
    """

    allocation: Allocation
    loss: float
    nats: float
    measured: bool

    def to_dict(self, chosen: bool) -> dict[str, Any]:
        """For selection.json."""
        return {
            "fraction": self.allocation.fraction,
            "increase": self.loss,
            "seconds_saved": self.allocation.gain,
            "measured": self.measured,
            "chosen": chosen,
        }


@dataclass(frozen=True)
class Selection:
    """The allocation chosen, its measured loss in what the budget counts, and all points, predicted ones too."""

    allocation: Allocation
    measured_loss: float
    pareto: list[dict[str, Any]]


class Goal:
    """A budget's measure: how it follows from KL, and back. `answers`: the dense model's, to the budget's questions."""

    def __init__(self, budget: Budget, answers: Answers | None = None):
        self.budget, self.answers = budget, answers
        self.whole = self._nats(budget.largest_loss)  # the budget as a KL

    def point(self, allocation: Allocation, measured: Mapping[str, Any]) -> Point:
        """Of a measured build."""
        loss = self.budget.loss(measured)
        nats = self._nats(max(loss, 0.0))
        if self.answers:  # few answers say little: those that changed by chance only must not look like room for more
            nats = max(nats, float(measured["kl"]))
        return Point(allocation, loss, nats, measured=True)

    def predicted(self, allocation: Allocation, nats: float) -> Point:
        """Of a build with this KL."""
        if self.answers:
            loss = self.answers.predicted_loss(nats)
        else:
            loss = {"perplexity_increase": math.expm1, "kl": float, "top1_agreement": math.sqrt}[self.budget.limit](
                nats
            )
        return Point(allocation, loss, nats, measured=False)

    def _nats(self, loss: float) -> float:
        """The KL of such a loss. The share of tokens that change grows with its root."""
        if self.answers:
            return self.answers.kl_of(loss)
        return {"perplexity_increase": math.log1p(loss), "kl": loss, "top1_agreement": loss**2}[self.budget.limit]


def search(
    allocator: Allocator, budget: Budget, method: str, measure: Measure, answers: Answers | None = None
) -> Selection:
    """Measures one allocation, a second where the first is over the budget or leaves much of it unused, and a third
    only where both are over it. `answers`: the dense model's, for a budget of exact match.

    Raises UserError where nothing gains, GateError with the smallest loss measured where none is within the budget.
    """
    if not allocator.steps:
        raise UserError("no layer would save time when pruned, so there is nothing to select: remove sparsity")
    goal, limit, started = Goal(budget, answers), budget.largest_loss, time.monotonic()
    share, points, within = TAKEN_BACK.get(method, 1.0), list[Point](), list[Point]()
    aim = goal.whole
    for build in range(1, MOST_BUILDS + 1):
        allocation = allocator.within(aim / share)
        if not allocation.gain:  # not even one step: the cheapest shows the limit
            allocation = allocator.within(allocator.steps[0].cost)
        if any(point.allocation == allocation for point in points):
            break
        points.append(goal.point(allocation, measure(allocation)))
        last = points[-1]
        share = max(last.nats / max(last.allocation.cost, TINY), 0.05)
        spent = (time.monotonic() - started) / 60
        late = budget.minutes is not None and 2 * spent > budget.minutes
        within = [point for point in points if point.loss <= limit]
        if within and (build > 1 or late or _unused(allocator, goal, last) < 1 - NEAR):
            break
        aim = MARGIN * goal.whole
    if not within:
        least = min(points, key=lambda point: point.loss)
        raise GateError(
            f"nothing fits under sparsity.budget ({budget.describe(limit)}): the smallest loss reached is "
            f"{budget.describe(least.loss)} with {least.allocation.fraction:.0%} of the weights {allocator.pattern}; "
            "raise the budget, or remove sparsity"
        )
    best = max(within, key=lambda point: point.allocation.gain)
    front = [*points, *_predicted(allocator, goal, share)]
    return Selection(best.allocation, best.loss, [point.to_dict(point is best) for point in front])


def _unused(allocator: Allocator, goal: Goal, point: Point) -> float:
    """The share of the budget that is left; none where everything is sparse already."""
    if point.allocation.fraction > 0.999 or goal.whole <= 0:
        return 0.0
    return 1 - point.nats / goal.whole


def _predicted(allocator: Allocator, goal: Goal, share: float) -> list[Point]:
    """Allocations of growing fraction with their predicted losses."""
    allocations = [allocator.of_fraction((number + 1) / PREDICTED) for number in range(PREDICTED)]
    return [goal.predicted(each, share * each.cost) for each in allocations]
