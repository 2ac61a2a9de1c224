"""The way through a model, block by block: what the pruned blocks give out is what the next one is calibrated on."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calibration.blocks import Blocks, Stream, run
from calibration.inputs import gather, shared_inputs
from calibration.solvers import Pattern, Solver, Statistics
from calibration.tune import tune
from plugins.errors import UserError


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    `error` is the squared change of the layer's output over the calibration tokens by its own pruning, relative; what a
    tuning of the whole block changes after it is not in it.
    """

    name: str
    out_features: int
    in_features: int
    pruned: bool  # the layer is sparse in the pattern now
    zeros: float  # share of the weight
    error: float | None
    seconds: float
    note: str = ""  # why the layer was left as it was


def report(
    name: str, weight_NK: Tensor, pruned: bool, error: float | None = None, seconds: float = 0.0, note: str = ""
) -> LayerReport:
    """The report of a layer by the weight that it has now."""
    out_features, in_features = weight_NK.shape
    zeros = 1 - int(weight_NK.count_nonzero()) / weight_NK.numel()
    return LayerReport(name, out_features, in_features, pruned, zeros, error, seconds, note)


class Walk:
    """One way through one model with one solver.

    States are the hidden states [B, T, D] float32 that enter a block: of the model as "pruned" so far, and as "dense"
    as it was, where the solver compares the two. A solver that looks at no inputs has none.
    """

    def __init__(self, source: Path, tokens_BT: Tensor, solver: Solver, pattern: Pattern, layers: Sequence[str]):
        self.blocks = Blocks(source)
        self.tokens_BT, self.solver, self.pattern = tokens_BT, solver, pattern
        self.arguments = self.blocks.arguments(tokens_BT.shape[1])
        self.layers_of = _by_block(layers, self.blocks)

    def first_states(self) -> dict[str, Tensor]:
        """The states that enter the first block."""
        names = ["pruned"] * self.solver.needs_inputs + ["dense"] * self.solver.needs_dense_inputs
        return {name: self.blocks.embed(self.tokens_BT) for name in names}

    def prune_block(
        self, number: int, states: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[LayerReport], dict[str, Tensor]]:
        """The new weights of block `number` by tensor name, as stored; its reports; the states that leave it."""
        block, arguments = self.blocks.load(number), self.arguments[number]
        streams = {name: Stream(copy.deepcopy(block) if name == "dense" else block, states[name]) for name in states}
        names, prefix = self.layers_of[number], f"model.layers.{number}."
        reports = self._prune_layers(prefix, block, names, streams, arguments)
        left = {"dense": run(streams["dense"], arguments)} if "dense" in streams else {}
        if self.solver.tunes_blocks and (tuned := [name for name in names if not reports[name].note]):
            tune(streams["pruned"], tuned, left["dense"], arguments)
            for name in tuned:
                block.get_submodule(name).weight.copy_(self._as_stored(prefix + name, block.get_submodule(name).weight))
        if "pruned" in streams:
            left["pruned"] = run(streams["pruned"], arguments)
        weights = {
            f"{prefix}{name}.weight": self._as_stored(prefix + name, block.get_submodule(name).weight) for name in names
        }
        return weights, list(reports.values()), left

    def _prune_layers(
        self,
        prefix: str,
        block: nn.Module,
        names: list[str],
        streams: dict[str, Stream],
        arguments: dict[str, Any],
    ) -> dict[str, LayerReport]:
        """Prunes the block's layers one by one in the order of the forward pass, in place."""
        groups = shared_inputs(streams["pruned"], names, arguments) if self.solver.needs_inputs else [names]
        reports = {}
        for group in groups:
            statistics: Statistics | None = None
            for name in group:
                weight_NK = block.get_submodule(name).weight
                note = self._reason_to_keep(weight_NK)
                if self.solver.needs_inputs and not statistics and not note:
                    statistics = gather(name, streams["pruned"], arguments, streams.get("dense"))
                started = time.perf_counter()
                kept_NK = weight_NK if note else self.solver.prune(prefix + name, weight_NK, statistics, self.pattern)
                stored_NK = self._as_stored(prefix + name, kept_NK)
                error = None if note or not statistics else _error(weight_NK, stored_NK, statistics)
                seconds = time.perf_counter() - started
                reports[name] = report(prefix + name, stored_NK, self.pattern.holds(stored_NK), error, seconds, note)
                weight_NK.copy_(stored_NK)
        return reports

    def _reason_to_keep(self, weight_NK: Tensor) -> str:
        if not self.pattern.fits(weight_NK.shape[1]):
            return f"{weight_NK.shape[1]} inputs do not divide into groups of {self.pattern.group}"
        return f"{self.pattern} already: mask kept" if self.pattern.holds(weight_NK) else ""

    def _as_stored(self, name: str, weight_NK: Tensor) -> Tensor:
        """The weight in the source's dtype, in which a small one may become 0; never -0."""
        dtype = self.blocks.weights.dtype(f"{name}.weight")
        stored_NK = weight_NK.to(dtype) + 0.0
        if not torch.isfinite(stored_NK).all():
            raise UserError(f"pruning '{name}' gave weights that are not finite as {dtype}: leave it out with exclude")
        return stored_NK


def _by_block(layers: Sequence[str], blocks: Blocks) -> list[list[str]]:
    """Names within the block, by block. Raises UserError for a name that is no linear layer of a block."""
    by_block: list[list[str]] = [[] for _ in range(blocks.count)]
    for name in layers:
        parts = name.split(".", 3)
        try:
            number = int(parts[2])
            layer = blocks.skeleton.layers[number].get_submodule(parts[3])
        except (IndexError, ValueError, AttributeError):
            layer = None
        if parts[:2] != ["model", "layers"] or not isinstance(layer, nn.Linear):
            raise UserError(f"'{name}' is no linear layer of a decoder block: only those can be pruned")
        by_block[number].append(parts[3])
    return by_block


def _error(before_NK: Tensor, after_NK: Tensor, statistics: Statistics) -> float:
    change_NK = before_NK - after_NK.float()
    lost = (change_NK @ statistics.hessian * change_NK).sum()
    return float(lost / (before_NK @ statistics.hessian * before_NK).sum())
