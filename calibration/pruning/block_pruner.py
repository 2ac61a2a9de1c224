"""Sequential pruning: each block is calibrated on the outputs of the blocks pruned before it."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import torch
from torch import Tensor, nn

from calibration.model.activation_file import ActivationFile
from calibration.model.block_store import BlockStore
from calibration.model.block_walk import BlockWalk
from calibration.model.blocks import HALVES, Blocks, Stream, forward_half
from calibration.model.device import return_freed_memory
from calibration.pruning.block_finetune import finetune_block
from calibration.pruning.input_statistics import collect_statistics, shared_inputs
from calibration.pruning.solvers import Pattern, Solver, Statistics
from calibration.pruning.solvers.masks import sparse_part
from plugins.common.errors import UserError
from plugins.sparsity.segments import Segments


class Outcome(StrEnum):
    """The outcome of pruning for one layer."""

    PRUNED = "pruned"
    ALREADY_SPARSE = "already sparse"  # its mask was kept
    INDIVISIBLE = "indivisible"  # its inputs do not divide into groups
    SKIPPED = "skipped"  # by ModelOpt
    REFITTED = "refitted"  # the output head, to the pruned blocks
    NOT_REFITTED = "not refitted"  # the output head: the fit is not better


@dataclass(frozen=True)
class LayerReport:
    """The outcome for one layer, with the weight that it has now.

    `error` is the squared change of the layer's output over the calibration tokens by its own pruning, relative; what a
    tuning of the whole block changes after it is not in it.
    """

    name: str
    out_features: int
    in_features: int
    pruned: bool  # the layer is sparse in the pattern now, in its sparse segments
    zeros: float  # share of the weight
    error: float | None
    seconds: float
    outcome: Outcome
    note: str = ""  # details of the outcome, for people
    fraction: float = 0.0  # of the weight that is in sparse segments


def report(
    name: str,
    weight_NK: Tensor,
    pruned: bool,
    outcome: Outcome,
    error: float | None = None,
    seconds: float = 0.0,
    note: str = "",
    fraction: float = 0.0,
) -> LayerReport:
    """The report of a layer by the weight that it has now."""
    out_features, in_features = weight_NK.shape
    zeros = 1 - int(weight_NK.count_nonzero()) / weight_NK.numel()
    return LayerReport(name, out_features, in_features, pruned, zeros, error, seconds, outcome, note, fraction)


class SequentialPruner(BlockWalk):
    """One way through one model with one solver.

    `segments` are those of each layer to prune. Two streams of hidden states go through the blocks: of the model as
    "pruned" so far, and as "dense" as it was, where the solver compares the two. A solver that looks at no inputs has
    none. They are kept in `finished`.
    """

    def __init__(
        self,
        blocks: Blocks,
        tokens_BT: Tensor,
        solver: Solver,
        pattern: Pattern,
        segments: Mapping[str, Segments],
        finished: BlockStore,
    ):
        super().__init__(blocks, tokens_BT, finished)
        self.solver, self.pattern, self.segments = solver, pattern, segments
        self.layers_of = by_block(list(segments), blocks)
        self.refits_head = solver.refits_head and blocks.has_untied_lm_head
        self.streams = ["pruned"] * solver.needs_inputs + ["dense"] * solver.needs_dense_inputs

    def prune_block(self, number: int) -> tuple[dict[str, Tensor], list[LayerReport]]:
        """The new weights of block `number` by tensor name, as stored, and its reports.

        Reads the states that enter the block and writes those that leave it.
        """
        arguments, names = self.arguments[number], self.layers_of[number]
        block = self.blocks.load(number)
        forms = {"pruned": block, "dense": self._dense(block) if "dense" in self.streams else block}
        entering = {name: self.entering(number, name) for name in self.streams}
        middle = {name: self.states(number, f"{name}-middle") for name in self.streams}
        leaving = {name: self.states(number + 1, name) for name in self.streams}
        if number + 1 == self.blocks.count and not self.refits_head:
            leaving.pop("pruned", None)  # nothing wants them
        tunes = self.solver.tunes_blocks

        reports = self._prune_half("self_attn", number, forms, entering, middle)
        final = {name: states for name, states in leaving.items() if name == "dense" or not tunes}
        reports |= self._prune_half("mlp", number, forms, middle, final)

        pruned = [name for name in names if tunes and reports[name].outcome == Outcome.PRUNED]
        tuned = {name: self.segments[_full(number, name)] for name in pruned}
        if tuned:
            del forms["dense"]  # what it gives out is in a file: its memory is free for the gradients
            return_freed_memory()
            finetune_block(Stream(block, entering["pruned"]), tuned, leaving["dense"], arguments)
        weights = self._round(number, block)
        if tunes and "pruned" in leaving:
            self.send(entering["pruned"], partial(block, **arguments), leaving["pruned"])
        return weights, [reports[name] for name in names]

    def left(self, name: str) -> ActivationFile:
        """The states of one stream that left the last block, once that is finished."""
        return self.states(self.blocks.count, name)

    def _dense(self, block: nn.Module) -> nn.Module:
        """A copy that stays as it is, with its linear layers in the dtype that they compute in."""
        dense = copy.deepcopy(block)
        for module in dense.modules():
            if isinstance(module, nn.Linear):
                module.to(self.dtype)
        return dense

    def _prune_half(
        self,
        half: str,
        number: int,
        forms: dict[str, nn.Module],
        entering: dict[str, ActivationFile],
        leaving: dict[str, ActivationFile],
    ) -> dict[str, LayerReport]:
        """Prunes the half's layers one by one in the order of the forward pass, in place.

        Writes the states `leaving` the half of the streams that have such, the pruned one's with the pruned weights.
        """
        block, last, arguments = forms["pruned"], HALVES[half][1], self.arguments[number]
        names = [name for name in self.layers_of[number] if name.startswith(half)]
        streams = {name: Stream(forms[name], states) for name, states in entering.items()}
        groups = shared_inputs(streams["pruned"], half, names, arguments) if streams and names else [names]
        inputs = self.inputs(number, block.get_submodule(last))
        reports = {}
        for group in groups:
            return_freed_memory()
            statistics: Statistics | None = None
            for name in group:
                outcome, note = self._outcome(block.get_submodule(name).weight)
                if streams and not statistics and outcome == Outcome.PRUNED:
                    keep = inputs if name == last and "pruned" in leaving else None
                    leave = leaving.get("dense") if name == last else None
                    with self.products:
                        statistics = collect_statistics(
                            name, streams["pruned"], arguments, streams.get("dense"), keep, leave
                        )
                reports[name] = self._prune_layer(number, name, block, statistics, outcome, note)
        gathered = last in reports and reports[last].outcome == Outcome.PRUNED
        for form, states in leaving.items():
            if not gathered:
                self.send(entering[form], partial(forward_half, forms[form], half, arguments=arguments), states)
            elif form == "pruned":
                self._add(block.get_submodule(last), inputs, entering[form], states)
        return reports

    def _prune_layer(
        self, number: int, name: str, block: nn.Module, statistics: Statistics | None, outcome: Outcome, note: str
    ) -> LayerReport:
        """Prunes one layer in place if its `outcome` is to be pruned."""
        started = time.perf_counter()
        weight_NK, full = block.get_submodule(name).weight, _full(number, name)
        segments = self.segments[full]
        prunes = outcome == Outcome.PRUNED
        kept_NK = self.solver.prune(full, weight_NK, statistics, self.pattern, segments) if prunes else weight_NK
        stored_NK = self._as_stored(full, kept_NK)
        error = _error(weight_NK, stored_NK, statistics) if prunes and statistics else None
        seconds = time.perf_counter() - started
        weight_NK.copy_(stored_NK)
        pruned = self.pattern.holds(sparse_part(stored_NK, segments))
        return report(full, stored_NK, pruned, outcome, error, seconds, note, segments.fraction if pruned else 0.0)

    def _add(self, layer: nn.Module, inputs: ActivationFile, entering: ActivationFile, leaving: ActivationFile) -> None:
        """Adds the layer's outputs to the states that enter its half."""
        with self.products:
            pairs = zip(entering.batches(), inputs.batches(), strict=True)
            leaving.write(state_BTD + layer(input_BTK) for state_BTD, input_BTK in pairs)

    def _round(self, number: int, block: nn.Module) -> dict[str, Tensor]:
        """The block's weights as they are stored, by tensor name; the block gets the same values."""
        weights = {}
        for name in self.layers_of[number]:
            full, weight_NK = _full(number, name), block.get_submodule(name).weight
            weights[f"{full}.weight"] = stored_NK = self._as_stored(full, weight_NK)
            weight_NK.copy_(stored_NK)
        return weights

    def _outcome(self, weight_NK: Tensor) -> tuple[Outcome, str]:
        """What is to become of a layer, and the reason where it is left as it is."""
        if not self.pattern.fits(weight_NK.shape[1]):
            reason = f"{weight_NK.shape[1]} inputs do not divide into groups of {self.pattern.group}"
            return Outcome.INDIVISIBLE, reason
        if self.pattern.holds(weight_NK):
            return Outcome.ALREADY_SPARSE, f"{self.pattern} already: mask kept"
        return Outcome.PRUNED, ""

    def _as_stored(self, name: str, weight_NK: Tensor) -> Tensor:
        """The weight in the source's dtype, in which a small one may become 0; never -0."""
        dtype = self.blocks.weights.dtype(f"{name}.weight")
        stored_NK = weight_NK.to(dtype) + 0.0
        if not torch.isfinite(stored_NK).all():
            raise UserError(
                f"pruning '{name}' gave weights that are not finite in {dtype}: exclude it with sparsity.exclude"
            )
        return stored_NK


def _full(number: int, name: str) -> str:
    return f"model.layers.{number}.{name}"


def by_block(layers: Sequence[str], blocks: Blocks) -> list[list[str]]:
    """Names within the block, by block. Raises UserError for a name that is not a linear layer of a block."""
    names: list[list[str]] = [[] for _ in range(blocks.count)]
    for name in layers:
        parts = name.split(".", 3)
        try:
            number = int(parts[2])
            layer = blocks.skeleton.layers[number].get_submodule(parts[3])
        except (IndexError, ValueError, AttributeError):
            layer = None
        if parts[:2] != ["model", "layers"] or not isinstance(layer, nn.Linear):
            raise UserError(f"'{name}' is not a linear layer of a decoder block: only those can be pruned")
        names[number].append(parts[3])
    return names


def _error(before_NK: Tensor, after_NK: Tensor, statistics: Statistics) -> float:
    change_NK = before_NK - after_NK.float()
    lost = (change_NK @ statistics.hessian * change_NK).sum()
    return float(lost / (before_NK @ statistics.hessian * before_NK).sum())
