"""Which layers to prune: the most predicted time saved under a budget for the measured loss, as an integer program.

Each layer may take one of its options (2:4, an 8-bit format, both) or stay as it is. The costs of single options, in
nats a token, are added up to predict a selection's loss. As losses do not quite add up, a selection is then measured:
one over the budget is cut off together with everything that contains it (more pruning never helps, it is assumed), the
costs are fitted to what was measured, and the next best selection is tried.

The program is solved with CBC through PuLP. What a layer saves comes from the caller: nothing here knows kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pulp

from plugins.common.errors import GateError, UserError

TRIES = 12  # measurements: each one prunes and evaluates
MARGIN = 0.25  # a selection predicted to be this much over the budget is still worth a measurement
WORTH = 0.01  # and one that saves this much more than the best so far
DEVIATION = 0.5  # how far a layer's cost is believed to be off, relative
NOISE = 0.02  # how far the sum is believed to be off where all costs are right, relative
GAP, NODES = 1e-3, 5_000  # where the solver may stop: relative to the best possible, and in its search tree
PREDICTED = 6  # points of the predicted front
FLOOR = 1e-7  # nats: a cost measured below nothing is chance

Floats = np.ndarray[Any, np.dtype[np.float64]]
Choices = dict[str, str]  # layer -> option
Measure = Callable[[Choices], float]


@dataclass(frozen=True)
class Option:
    """What a layer could become: `cost` in nats a token when it alone does, `gain` in seconds saved, `bytes` saved."""

    layer: str
    choice: str
    cost: float
    gain: float
    bytes: int = 0


@dataclass(frozen=True)
class Point:
    """A selection. `measured` says whether `increase`, of the perplexity, relative, was measured or predicted."""

    choices: Choices
    increase: float
    seconds_saved: float
    bytes_saved: int
    measured: bool

    @property
    def layers(self) -> list[str]:
        """Those that do not stay as they are."""
        return list(self.choices)


@dataclass(frozen=True)
class Selection:
    """The best selection whose measured increase is within the budget."""

    layers: list[str]
    choices: Choices
    measured_increase: float
    seconds_saved: float
    proven: bool  # no other selection that fits saves more, if more pruning never helps
    pareto: list[dict[str, Any]]  # as `_Search.pareto` gives them

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def select_layers(
    cost: Mapping[str, float],
    gain: Mapping[str, float],
    budget: float,
    measure: Callable[[list[str]], float],
    bytes_saved: Mapping[str, int] | None = None,
    **limits: Any,
) -> Selection:
    """`select` where each layer is pruned to 2:4 or not: `cost` in nats, `gain` in seconds, by layer."""
    if cost.keys() != gain.keys():
        raise UserError(f"layers with a cost or a gain alone: {sorted(cost.keys() ^ gain.keys())}")
    saved = bytes_saved or {}
    options = [Option(layer, "2:4", cost[layer], gain[layer], saved.get(layer, 0)) for layer in cost]
    return select(options, budget, lambda choices: measure(list(choices)), **limits)


def select(
    options: Sequence[Option],
    budget: float,
    measure: Measure,
    tries: int = TRIES,
    margin: float = MARGIN,
    worth: float = WORTH,
) -> Selection:
    """The options, at most one a layer, that save most while `measure`, the perplexity increase, is within `budget`.

    Stops after `tries` measurements, or when whatever would save more (by `worth`, relative) is predicted to be over
    the budget by more than `margin`. With an infinite margin, no `worth` and enough tries the result is proven. What
    saves nothing is never taken.
    Raises GateError with the smallest increase measured where nothing fits.
    """
    search = _Search([option for option in options if option.gain > 0], budget, measure, tries, worth)
    if not search.options:
        raise UserError("no layer would save time when pruned, so there is nothing to select: leave sparsity out")
    proven = search.run(margin)
    if search.best is None:
        raise GateError(_nothing_fits(search))
    best = search.points[search.best]
    return Selection(best.layers, best.choices, best.increase, best.seconds_saved, proven, search.pareto())


def _nothing_fits(search: _Search) -> str:
    least = min(search.points, key=lambda point: point.increase)
    what = least.layers[0] if len(least.layers) == 1 else f"{len(least.layers)} layers"
    return (
        f"no layer fits under sparsity.budget perplexity_increase {search.budget:.3%}: the smallest increase reached "
        f"is {least.increase:.3%}, with {what} pruned; raise the budget, or leave sparsity out"
    )


class _Search:
    """The state of one selection: what was measured so far, and the costs fitted to it."""

    def __init__(self, options: Sequence[Option], budget: float, measure: Measure, tries: int, worth: float):
        self.options, self.budget, self.measure = list(options), budget, measure
        self.tries, self.worth = tries, worth
        self.prior = np.array([max(option.cost, FLOOR) for option in options])
        self.costs = self.prior.copy()
        self.gains = np.array([option.gain for option in options])
        self.taken: list[Floats] = []  # 0 or 1 for each option, of each point
        self.points: list[Point] = []
        self.best: int | None = None

    def run(self, margin: float) -> bool:
        """Measures until nothing more is worth it. Returns whether the best is proven."""
        while len(self.points) < self.tries:
            x = self._next(margin)
            if x is None:
                return self.worth == 0 and self.best is not None and self._solve(most_gain=False) is None
            self._try(x)
        while self.best is None and len(self.points) < 2 * self.tries and (x := self._next_single()) is not None:
            self._try(x)
        return False

    def _next(self, margin: float) -> Floats | None:
        """What to measure: the best that is predicted to fit, or else the likeliest to fit of what would be better."""
        limit = math.log1p(self.budget)
        x = self._solve(most_gain=True, limit=limit)
        if x is not None:
            return x
        if self.best is None:
            return self._next_single()
        x = self._solve(most_gain=False)
        return x if x is not None and float(self.costs @ x) <= limit * (1 + margin) else None

    def _next_single(self) -> Floats | None:
        """The cheapest option, alone, that was not measured yet."""
        for at in np.argsort(self.prior, kind="stable"):
            x = np.zeros(len(self.options))
            x[at] = 1
            if not any(np.array_equal(x, taken) for taken in self.taken):
                return x
        return None

    def _try(self, x: Floats) -> None:
        choices = self._choices(x)
        self.points.append(self._point(x, float(self.measure(choices)), measured=True))
        self.taken.append(x)
        if self.points[-1].increase <= self.budget:
            self.best = len(self.points) - 1  # it saves more than the one before: the program asks for it
        self._fit()

    def _choices(self, x: Floats) -> Choices:
        return {option.layer: option.choice for option, one in zip(self.options, x, strict=True) if one}

    def _point(self, x: Floats, increase: float, measured: bool) -> Point:
        saved = sum(option.bytes for option, one in zip(self.options, x, strict=True) if one)
        return Point(self._choices(x), increase, float(self.gains @ x), saved, measured)

    def pareto(self) -> list[dict[str, Any]]:
        """Points that no other of their kind beats in both, by increase: the measured, and what the fit predicts."""
        limits = np.linspace(0, self.costs.sum(), PREDICTED + 1)[1:]
        solved = [x for limit in limits if (x := self._solve(most_gain=True, limit=limit, free=True)) is not None]
        predicted = [self._point(x, math.expm1(float(self.costs @ x)), measured=False) for x in solved]
        best = None if self.best is None else self.points[self.best]
        return [
            {
                "layers": point.layers,
                "choices": point.choices,
                "increase": point.increase,
                "seconds_saved": point.seconds_saved,
                "bytes": point.bytes_saved,
                "measured": point.measured,
                "chosen": point is best,
            }
            for points in (self.points, predicted)
            for point in _front(points)
        ]

    def _fit(self) -> None:
        """Costs nearest to the prior, scaled, that explain what was measured: a Gaussian posterior mean."""
        taken_PO = np.array(self.taken)
        loss_P = np.log1p([point.increase for point in self.points])
        sums_P = taken_PO @ self.prior
        scaled = self.prior * max(float(sums_P @ loss_P / (sums_P @ sums_P)), 0.1)
        spread_O = (DEVIATION * scaled) ** 2
        covariance_PP = (taken_PO * spread_O) @ taken_PO.T + np.diag((NOISE * (taken_PO @ scaled)) ** 2)
        correction_P = np.linalg.solve(covariance_PP, loss_P - taken_PO @ scaled)
        self.costs = np.maximum(scaled + spread_O * (taken_PO.T @ correction_P), FLOOR)

    def _solve(self, most_gain: bool, limit: float = math.inf, free: bool = False) -> Floats | None:
        """The selection of most gain within `limit`, or of least cost; `free` of what was measured, or else better."""
        problem = pulp.LpProblem("selection", pulp.LpMaximize)
        x = [pulp.LpVariable(f"x{at}", cat="Binary") for at in range(len(self.options))]
        gains, costs = self.gains / self.gains.max(), self.costs / self.costs.max()  # near 1, as solvers like it
        gain, cost = pulp.lpDot(gains.tolist(), x), pulp.lpDot(costs.tolist(), x)
        tie = 0.1 / costs.sum()  # of selections alike, the cheaper; whatever is better still gets its turn
        problem += gain - tie * cost if most_gain else tie * gain - cost
        if math.isfinite(limit):
            problem += cost <= limit / self.costs.max()
        for layer in dict.fromkeys(option.layer for option in self.options):
            problem += (
                pulp.lpSum(one for one, option in zip(x, self.options, strict=True) if option.layer == layer) <= 1
            )
        least = 0.0 if free or self.best is None else self.points[self.best].seconds_saved / self.gains.max()
        problem += gain >= least * (1 + max(self.worth, 1e-6)) + 1e-6 * float(gains.min())
        for taken, point in zip(self.taken, self.points, strict=True):
            if point.increase > self.budget and not free:
                problem += pulp.lpSum(one for one, was in zip(x, taken, strict=True) if was) <= int(taken.sum()) - 1
        problem.solve(pulp.PULP_CBC_CMD(msg=False, threads=1, gapRel=GAP, maxNodes=NODES))
        if pulp.LpStatus[problem.status] != "Optimal":
            return None
        return np.array([round(one.value()) for one in x], dtype=float)


def _front(points: Sequence[Point]) -> list[Point]:
    front: list[Point] = []
    for point in sorted(points, key=lambda each: (each.increase, -each.seconds_saved)):
        if not front or point.seconds_saved > front[-1].seconds_saved:
            front.append(point)
    return front
