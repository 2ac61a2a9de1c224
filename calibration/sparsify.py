"""Prunes a model block by block: what the pruned blocks give out is what the next block is calibrated on."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calibration.blocks import Blocks, Stream, run
from calibration.config import Sparsity
from calibration.inputs import gather, shared_inputs
from calibration.resume import Finished
from calibration.solvers import SOLVERS, Pattern, Solver, Statistics
from calibration.weights import copy_with
from plugins.errors import UserError

VERSION = 1  # of the results: raised whenever the same input gives other weights
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer. `error` is the squared change of its output over the calibration tokens, relative."""

    name: str
    out_features: int
    in_features: int
    pruned: bool  # holds the pattern now; false: `note` says why it stayed as it was
    zeros: float  # share of the weight
    error: float | None
    seconds: float
    note: str = ""


@torch.no_grad()
def sparsify(
    source: Path,
    tokens: np.ndarray[Any, np.dtype[np.int64]],
    config: Sparsity,
    layers: Sequence[str],
    out: Path,
    work: Path,
    progress: Progress,
) -> list[LayerReport]:
    """Prunes `layers` (module names) of the Hugging Face directory `source` into `out`, with the same files and dtypes.

    `tokens` [samples, length] are what the layers' inputs are taken from. `work` keeps the finished blocks: a run that
    was killed goes on behind them, to the same bytes. Writes `out/sparsity.json`. Raises UserError for an architecture
    that cannot be pruned, weights that do not fit the config, and inputs that are not finite.
    """
    walk = _Walk(source, torch.from_numpy(tokens), config, layers)
    finished = Finished(work, walk.key())
    done, states = finished.states()
    states = states or walk.first_states()
    for number in range(done, walk.blocks.count):
        progress("sparsify", number, walk.blocks.count)
        weights, reports, states = walk.prune_block(number, states)
        finished.add(number, weights, [asdict(report) for report in reports], states)
    progress("sparsify", walk.blocks.count, walk.blocks.count)

    reports = [LayerReport(**report) for number in range(walk.blocks.count) for report in finished.reports(number)]
    pruned = [report.name for report in reports if report.pruned]
    copy_with(
        source,
        out,
        (f"{name}.weight" for name in pruned),
        lambda name: finished.weight(int(name.split(".")[2]), name),
    )
    declared = {"pattern": config.pattern, "method": config.method, "layers": pruned}
    (out / "sparsity.json").write_text(json.dumps(declared, indent=2) + "\n")
    return reports


class _Walk:
    """One way through the model with one solver."""

    def __init__(self, source: Path, tokens_BT: Tensor, config: Sparsity, layers: Sequence[str]):
        self.blocks = Blocks(source)
        self.tokens_BT, self.config, self.layers = tokens_BT, config, layers
        self.pattern = Pattern.parse(config.pattern)
        self.solver: Solver = SOLVERS[config.method]()
        self.arguments = self.blocks.arguments(tokens_BT.shape[1])
        self.layers_of = _by_block(layers, self.blocks)

    def key(self) -> str:
        """Of everything that decides the result."""
        facts = [VERSION, self.config.pattern, self.config.method, list(self.layers), self.blocks.config.to_dict()]
        digest = hashlib.sha256(json.dumps(facts, default=str).encode())
        digest.update(self.blocks.weights.sha256().encode())
        digest.update(self.tokens_BT.numpy().tobytes())
        return digest.hexdigest()

    def first_states(self) -> dict[str, Tensor]:
        """The hidden states that enter the first block, by the model that gives them."""
        if not self.solver.needs_inputs:
            return {}
        hidden_BTD = self.blocks.embed(self.tokens_BT)
        return (
            {"pruned": hidden_BTD, "dense": hidden_BTD.clone()}
            if self.solver.needs_dense_inputs
            else {"pruned": hidden_BTD}
        )

    def prune_block(
        self, number: int, states: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[LayerReport], dict[str, Tensor]]:
        """The pruned weights by tensor name, the reports, and the hidden states that enter the next block."""
        block, arguments = self.blocks.load(number), self.arguments[number]
        streams = {name: Stream(copy.deepcopy(block) if name == "dense" else block, states[name]) for name in states}
        prefix = f"model.layers.{number}."
        weights: dict[str, Tensor] = {}
        reports = []
        for group in self._groups(self.layers_of[number], streams, arguments):
            statistics: Statistics | None = None
            for name in group:
                layer = block.get_submodule(name)
                if note := self._reason_to_keep(layer):
                    reports.append(_report(prefix + name, layer.weight, pruned=False, note=note))
                    continue
                if self.pattern.holds(layer.weight):
                    stored, note = (
                        self._stored(prefix + name, layer.weight),
                        f"{self.config.pattern} already: mask kept",
                    )
                    weights[f"{prefix}{name}.weight"] = stored
                    reports.append(_report(prefix + name, stored, pruned=True, note=note))
                    continue
                if statistics is None and self.solver.needs_inputs:
                    statistics = gather(name, streams["pruned"], arguments, streams.get("dense"))
                started = time.perf_counter()
                stored = self._prune(prefix + name, layer, statistics)
                weights[f"{prefix}{name}.weight"] = stored
                reports.append(
                    _report(
                        prefix + name,
                        stored,
                        pruned=True,
                        error=_error(layer.weight, stored, statistics),
                        seconds=time.perf_counter() - started,
                    )
                )
                layer.weight.copy_(stored)
        return weights, reports, {name: run(stream, arguments) for name, stream in streams.items()}

    def _groups(self, names: list[str], streams: dict[str, Stream], arguments: dict[str, Any]) -> list[list[str]]:
        return shared_inputs(streams["pruned"], names, arguments) if self.solver.needs_inputs else [names]

    def _reason_to_keep(self, layer: nn.Linear) -> str:
        if not self.pattern.fits(layer.in_features):
            return f"{layer.in_features} inputs do not divide into groups of {self.pattern.group}"
        return ""

    def _prune(self, name: str, layer: nn.Linear, statistics: Statistics | None) -> Tensor:
        """The pruned weight as it is stored: rounded to the source's dtype, where a tiny weight may become zero."""
        return self._stored(name, self.solver.prune(name, layer.weight, statistics, self.pattern))

    def _stored(self, name: str, pruned_NK: Tensor) -> Tensor:
        stored_NK = pruned_NK.to(self.blocks.weights.dtype(f"{name}.weight")) + 0.0
        if not torch.isfinite(stored_NK).all():
            raise UserError(
                f"pruning '{name}' gave weights that are not finite in {stored_NK.dtype}: leave it out with exclude"
            )
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


def _error(before_NK: Tensor, after_NK: Tensor, statistics: Statistics | None) -> float | None:
    if statistics is None:
        return None
    change_NK = before_NK - after_NK.float()
    hessian_KK = statistics.hessian
    return float((change_NK @ hessian_KK * change_NK).sum() / (before_NK @ hessian_KK * before_NK).sum())


def _report(
    name: str, weight_NK: Tensor, *, pruned: bool, error: float | None = None, seconds: float = 0.0, note: str = ""
) -> LayerReport:
    zeros = 1 - int(weight_NK.count_nonzero()) / weight_NK.numel()
    return LayerReport(name, weight_NK.shape[0], weight_NK.shape[1], pruned, zeros, error, seconds, note)
