"""A LoRA adapter that recovers part of each layer's pruning error, computed without training.

EoRA: Liu et al., 2024, arXiv:2410.21271. Each layer gets the B A that brings its outputs, over its inputs in the
pruned model, closest to those of its dense weight.

Suffixes: B samples, T tokens of a sample, D hidden size, N out_features, K in_features, R rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calibration.config import check_adapter_rank
from calibration.lora import peft_format
from calibration.lora.low_rank import low_rank, output_error
from calibration.model.block_store import BlockStore
from calibration.model.block_walk import BlockWalk
from calibration.model.blocks import Blocks
from calibration.model.channel_order import ChannelOrder
from calibration.model.device import device, return_freed_memory
from calibration.model.weights import Weights
from calibration.pruning.block_pruner import by_block
from calibration.pruning.input_statistics import walk_block
from plugins.common.errors import UserError
from plugins.common.linear_shape import LinearShape
from plugins.common.progress import Progress
from plugins.sparsity.declaration import Declaration


@dataclass(frozen=True)
class Compensation:
    """What the adapter, as it is stored, gives one layer."""

    name: str
    taken_back: float  # share of the squared output error that pruning left; 0 where it left none


@torch.no_grad()
def compensate(
    dense: Path,
    pruned: Path,
    tokens: np.ndarray[Any, np.dtype[np.int64]],
    rank: int,
    out: Path,
    work: Path,
    progress: Progress,
) -> list[Compensation]:
    """Writes the adapter of the layers that `pruned/sparsity.json` names to `out`.

    `dense` and `pruned` are Hugging Face directories of one shape; the layers' inputs come from `tokens`
    [samples, length]. `work` keeps the finished blocks: an interrupted run resumes after them, and its output is
    byte-identical. Raises UserError for a rank above a layer's smaller side, where no layer of a block is pruned, and
    for inputs that are not finite.
    """
    return_freed_memory()
    blocks, tokens_BT = Blocks(pruned, device()), torch.from_numpy(tokens)
    originals = Weights(dense, ChannelOrder(blocks.config, Declaration.read(pruned).order))
    names = _pruned_layers(pruned)
    layers_of = by_block(names, blocks)
    for name in names:
        N, K = blocks.skeleton.get_submodule(name.removeprefix("model.")).weight.shape
        check_adapter_rank(rank, LinearShape(N, K, name=name))
    finished = BlockStore(work, _key(blocks, originals, tokens, rank, names))
    walk = EoraPass(blocks, originals, tokens_BT, rank, finished)
    for number in range(finished.count(), blocks.count):
        progress("adapter", number, blocks.count)
        factors, reports = walk.compensate_block(number, layers_of[number])
        finished.add(number, factors, [asdict(report) for report in reports])
    progress("adapter", blocks.count, blocks.count)
    tensors = {
        name: finished.weight(number, name)
        for number, layers in enumerate(layers_of)
        for layer in layers
        for name in peft_format.tensor_names(f"model.layers.{number}.{layer}")
    }
    linears = [f"model.{name}" for name, module in blocks.skeleton.named_modules() if isinstance(module, nn.Linear)]
    peft_format.write(out, tensors, rank, names, sorted(set(linears) - set(names)))
    return [Compensation(**report) for number in range(blocks.count) for report in finished.reports(number)]


def _key(
    blocks: Blocks, originals: Weights, tokens: np.ndarray[Any, np.dtype[np.int64]], rank: int, names: Sequence[str]
) -> str:
    """Of everything that changes the adapter."""
    facts = [rank, names, tokens.shape, blocks.config.to_dict(), originals.sha256(), blocks.weights.sha256()]
    return hashlib.sha256(json.dumps(facts, default=str).encode() + tokens.tobytes()).hexdigest()


class EoraPass(BlockWalk):
    """One way through the pruned model, block by block, with the hidden states in files."""

    def __init__(self, blocks: Blocks, originals: Weights, tokens_BT: Tensor, rank: int, finished: BlockStore):
        super().__init__(blocks, tokens_BT, finished)
        self.originals, self.rank = originals, rank

    def compensate_block(self, number: int, names: Sequence[str]) -> tuple[dict[str, Tensor], list[Compensation]]:
        """The adapter's tensors of block `number` by name, and the reports of its layers `names`.

        Reads the states that enter the block and writes those that leave it.
        """
        block = self.blocks.load(number)
        factors: dict[str, Tensor] = {}
        reports: dict[str, Compensation] = {}
        for group, statistics in walk_block(self, number, block, names, "pruned"):
            for name in group:
                full, weight_NK = f"model.layers.{number}.{name}", block.get_submodule(name).weight
                tensors, reports[name] = self._compensate(full, weight_NK, statistics.hessian)
                factors |= tensors
        return factors, [reports[name] for name in names]

    def _compensate(self, full: str, weight_NK: Tensor, hessian_KK: Tensor) -> tuple[dict[str, Tensor], Compensation]:
        """The adapter's tensors of one layer, in the dtype of its weight."""
        error_NK = self.originals.read(f"{full}.weight").to(weight_NK.device).float() - weight_NK
        dtype = self.blocks.weights.dtype(f"{full}.weight")
        b_NR, a_RK = (factor.to(dtype) for factor in low_rank(full, error_NK, hessian_KK, self.rank))
        before = output_error(error_NK, hessian_KK)
        after = output_error(error_NK - b_NR.float() @ a_RK.float(), hessian_KK)
        report = Compensation(full, 1 - after / before if before > 0 else 0.0)
        return dict(zip(peft_format.tensor_names(full), (a_RK, b_NR), strict=True)), report


def _pruned_layers(pruned: Path) -> list[str]:
    layers = list(Declaration.read(pruned).pruned)
    if not layers:
        raise UserError("no layer is pruned, so an adapter has no error to recover: remove sparsity.adapter_rank")
    return layers
