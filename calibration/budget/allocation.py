"""Which channels of which layers go sparse: the cheapest for what they gain, by the prices of channels.

A unit is what goes sparse together: the layers of a block's MLP, which share their channels, or one layer of its
attention, of which the channels are KV heads. Of a unit the cheapest channels go first, an eighth at a time; prices
add up, to second order, so that steps are taken in the order of their price for what they gain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import Any

import numpy as np

from calibration.model.channel_order import INPUTS, Channels
from plugins.common.patterns import TENSOR_CORE, Pattern
from plugins.sparsity.declaration import Declaration
from plugins.sparsity.segments import ALIGNMENT, Axis, Segments

LEVELS = 8  # steps from a dense unit to one that is sparse as a whole


@dataclass(frozen=True)
class Unit:
    """Layers of one half of a block that go sparse together. `prices` are in the half's order of channels."""

    half: str  # "model.layers.3.mlp"
    layers: tuple[str, ...]  # "gate_proj", ...
    prices: tuple[float, ...]  # nats per token
    gain: float  # of the whole unit, in seconds or in what else counts
    weights: int  # of the whole unit
    alignment: int  # channels that a boundary's place divides by
    widths: Mapping[str, int] = field(compare=False, hash=False)  # rows or inputs a channel, by layer
    second_products: float = 0.0  # seconds that the unit's second products take while it is sparse in part

    def counts(self) -> list[int]:
        """How many channels may go sparse."""
        size = len(self.prices)
        inner = {round(level * size / LEVELS / self.alignment) * self.alignment for level in range(1, LEVELS)}
        return sorted({0, size} | {count for count in inner if 0 < count < size})


@dataclass(frozen=True)
class Step:
    """One more part of a unit: up to `count` channels. Nats a token, the gain, and the weights of that part alone."""

    unit: int
    count: int
    cost: float
    gain: float
    weights: float

    @property
    def sums(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.array([self.cost, self.gain, self.weights])


@dataclass(frozen=True)
class Allocation:
    """How many channels of each unit go sparse, and the predicted cost and gain."""

    counts: tuple[int, ...]
    cost: float
    gain: float
    fraction: float  # of the units' weights


class Allocator:
    """All the units of one model, and the steps in the order in which they are taken."""

    def __init__(
        self,
        units: Sequence[Unit],
        orders: Mapping[str, tuple[int, ...]],
        ranks: int = 1,
        pattern: Pattern = TENSOR_CORE,
    ):
        self.units, self.orders, self.ranks, self.pattern = list(units), orders, ranks, pattern
        self.steps = sorted(self._steps(), key=lambda step: step.cost / step.gain)

    def _steps(self) -> list[Step]:
        """Of each unit from its first, each at least as dear for its gain as the one before: else they are one step."""
        steps: list[Step] = []
        for number, unit in enumerate(self.units):
            size, before, gained, own = len(unit.prices), 0, 0.0, list[Step]()
            for count in unit.counts()[1:] if unit.gain > 0 else ():
                gain = count / size * unit.gain - (unit.second_products if count < size else 0.0)
                if gain <= gained:
                    continue
                weights = (count - before) / size * unit.weights
                step = Step(number, count, sum(unit.prices[before:count]), gain - gained, weights)
                while own and step.cost * own[-1].gain < own[-1].cost * step.gain:
                    last = own.pop()
                    step = Step(number, count, *(step.sums + last.sums).tolist())
                own.append(step)
                before, gained = count, gain
            steps += own
        return steps

    def of_fraction(self, fraction: float) -> Allocation:
        """With `fraction` of the units' weights sparse, as near as a step allows."""
        wanted = fraction * sum(unit.weights for unit in self.units)
        return self._take(lambda taken, step: taken + step / 2 <= wanted, which=2)

    def within(self, cost: float) -> Allocation:
        """The most gain for at most `cost` nats per token."""
        return self._take(lambda taken, step: taken + step <= cost, which=0)

    def _take(self, fits: Callable[[float, float], bool], which: int) -> Allocation:
        """The steps in order, as long as `fits` holds for the taken and the next step, by cost, gain or weights."""
        counts, taken, closed = [0] * len(self.units), np.zeros(3), set[int]()
        for step in self.steps:
            if step.unit in closed or not fits(float(taken[which]), float(step.sums[which])):
                closed.add(step.unit)
                continue
            counts[step.unit] = step.count
            taken += step.sums
        cost, gain, weights = taken.tolist()
        return Allocation(tuple(counts), cost, gain, weights / max(1, sum(unit.weights for unit in self.units)))

    def declare(self, allocation: Allocation, method: str) -> Declaration:
        """The layers and segments of an allocation."""
        layers: list[str] = []
        hybrid: dict[str, Segments] = {}
        for unit, count in zip(self.units, allocation.counts, strict=True):
            for layer in unit.layers if count else ():
                name, width = f"{unit.half}.{layer}", unit.widths[layer]
                if count == len(unit.prices):
                    layers.append(name)
                else:
                    axis: Axis = "inputs" if layer in INPUTS.values() else "rows"
                    hybrid[name] = Segments.split(
                        axis, len(unit.prices) * width, count * width, self.ranks, self.pattern
                    )
        halves = {name.rpartition(".")[0] for name in hybrid}
        order = {half: self.orders[half] for half in self.orders if half in halves}
        return Declaration(tuple(layers), hybrid, order, method, self.pattern)


def allocator(
    config: Any,
    prices: Mapping[str, Sequence[float]],
    layers: Sequence[str],
    weights: Mapping[str, int],
    gains: Mapping[str, float],
    ranks: int = 1,
    whole_layers: bool = False,
    second_products: Mapping[str, float] | None = None,
    pattern: Pattern = TENSOR_CORE,
) -> Allocator:
    """Of the candidates `layers`, with each layer's weights and gain, in a transformers `config`'s model.

    Channels are ordered by the price of their half, dealt out to the tensor-parallel `ranks` in turn. `whole_layers`
    is for a backend without kernels for hybrid layers: each layer is a unit, dense or sparse as a whole.
    `second_products`: what each layer loses of its gain while it is hybrid, by its second product.
    """
    halves = dict.fromkeys(name.rpartition(".")[0] for name in layers)
    orders: dict[str, tuple[int, ...]] = {}
    units: list[Unit] = []
    for half in halves:
        channels = Channels.of(config, half.rsplit(".", 1)[-1])
        own_ranks = ranks if channels.count % ranks == 0 else 1
        by_price = np.argsort(np.asarray(prices[half]), kind="stable")
        orders[half] = tuple(np.concatenate([by_price[rank::own_ranks] for rank in range(own_ranks)]).tolist())
        members = [name.rpartition(".")[2] for name in layers if name.rpartition(".")[0] == half]
        coupled = half.endswith(".mlp") and not whole_layers
        for together in [members] if coupled else [[layer] for layer in members]:
            names = [f"{half}.{layer}" for layer in together]
            own = np.asarray(prices[half if coupled else names[0]])[by_price]
            widths = {layer: channels.width[layer] for layer in together}
            alignment = max(own_ranks * ALIGNMENT // gcd(ALIGNMENT, width) for width in widths.values())
            aligned = alignment <= channels.count // 2 and channels.count % alignment == 0 and own_ranks == ranks
            gain, size = sum(gains[name] for name in names), sum(weights[name] for name in names)
            step = alignment if aligned and not whole_layers else channels.count
            second = sum((second_products or {}).get(name, 0.0) for name in names)
            units.append(Unit(half, tuple(together), tuple(own.tolist()), gain, size, step, widths, second))
    return Allocator(units, orders, ranks, pattern)
