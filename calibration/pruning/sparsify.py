"""Prunes a Hugging Face model into a copy of it: our solvers block by block, or ModelOpt's on the whole model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibration.config import Sparsity
from calibration.model.block_store import BlockStore
from calibration.model.blocks import HEAD, Blocks
from calibration.model.device import device
from calibration.model.weights import Weights, copy_with
from calibration.pruning import modelopt
from calibration.pruning.block_pruner import LayerReport, Outcome, SequentialPruner, report
from calibration.pruning.lm_head_refit import refit_head
from calibration.pruning.solvers import SOLVERS, Pattern
from plugins.common.errors import UserError
from plugins.common.progress import Progress
from plugins.sparsity.declaration import Declaration
from plugins.sparsity.segments import Segments

Changed = dict[str, Callable[[], Tensor]]  # what reads the new tensor, by the tensor's name


@torch.no_grad()
def sparsify(
    source: Path,
    tokens: np.ndarray[Any, np.dtype[np.int64]] | None,
    config: Sparsity,
    target: Declaration,
    out: Path,
    work: Path,
    progress: Progress,
) -> list[LayerReport]:
    """Prunes the Hugging Face directory `source` to `target` into `out`, with the same files and dtypes.

    Layers that the target does not name stay as they are, up to the order of their channels. A method that refits the
    output head reports it behind the layers. `tokens` [samples, length] are what the layers' inputs are taken from;
    None for a method that reads none. `work` keeps the finished blocks: an interrupted run resumes after them, to the
    same bytes. Writes `out/sparsity.json`. Raises UserError for an architecture that cannot be pruned, weights that do
    not fit the config, a target that does not fit the model, and inputs that are not finite.
    """
    tokens_BT = torch.from_numpy(np.empty((0, 1), np.int64) if tokens is None else tokens)
    if not target.pruned and not target.order:
        reports, changed = list[LayerReport](), Changed()
    elif config.method in SOLVERS:
        reports, changed = _walk(source, tokens_BT, config, target, work, progress)
    else:
        reports, changed = _modelopt(source, tokens_BT, config, target, progress)
    copy_with(source, out, changed, lambda name: changed[name]())
    pruned = {layer.name for layer in reports if layer.pruned}
    whole = [layer for layer in target.layers if layer in pruned]
    hybrid = {layer: segments for layer, segments in target.hybrid.items() if layer in pruned}
    Declaration(tuple(whole), hybrid, target.order, config.method, target.pattern).write(out)
    return reports


def _walk(
    source: Path, tokens_BT: Tensor, config: Sparsity, target: Declaration, work: Path, progress: Progress
) -> tuple[list[LayerReport], Changed]:
    blocks = Blocks(source, device(), target.order)
    facts = [config.method, target.to_json(), blocks.config.to_dict()]
    key = hashlib.sha256(json.dumps(facts, default=str).encode())
    key.update(blocks.weights.sha256().encode() + tokens_BT.numpy().tobytes())
    finished = BlockStore(work, key.hexdigest())
    walk = SequentialPruner(
        blocks, tokens_BT, SOLVERS[config.method](), Pattern.parse(target.pattern), _segments(target, blocks), finished
    )
    for number in range(finished.count(), blocks.count):
        progress("sparsify", number, blocks.count)
        weights, reports = walk.prune_block(number)
        finished.add(number, weights, [asdict(layer) for layer in reports])
    progress("sparsify", blocks.count, blocks.count)
    all_reports: list[LayerReport] = []
    moved = [name for name in blocks.weights if blocks.weights.moves(name)]
    changed: Changed = {name: partial(blocks.weights.read, name) for name in moved}
    for number in range(blocks.count):
        layer_reports = [LayerReport(**layer) for layer in finished.reports(number)]
        tensors = [f"{layer.name}.weight" for layer in layer_reports if layer.pruned]
        changed |= {name: partial(finished.weight, number, name) for name in tensors}
        all_reports += layer_reports
    if walk.refits_head and any(layer.outcome == Outcome.PRUNED for layer in all_reports):
        head_report, head_VD = refit_head(blocks, walk.left("pruned"), walk.left("dense"))
        changed[f"{HEAD}.weight"] = lambda: head_VD
        all_reports.append(head_report)
    return all_reports, changed


def _segments(target: Declaration, blocks: Blocks) -> dict[str, Segments]:
    """Of each layer to prune, in the model's order. Raises UserError where they do not fit its weight."""
    segments: dict[str, Segments] = {}
    for name in target.pruned:
        try:
            layer = blocks.skeleton.get_submodule(name.removeprefix("model."))
            N, K = layer.out_features, layer.in_features
        except AttributeError:
            raise UserError(f"'{name}' is not a linear layer of a decoder block: only those can be pruned") from None
        own = segments[name] = target.hybrid.get(name) or Segments.split("rows", N, N, pattern=target.pattern)
        if own.size != (size := N if own.axis == "rows" else K):
            raise UserError(
                f"the segments of '{name}' cover {own.size} of its {size} {own.axis}", "make them cover all"
            )
    return segments


def _modelopt(
    source: Path, tokens_BT: Tensor, config: Sparsity, target: Declaration, progress: Progress
) -> tuple[list[LayerReport], Changed]:
    if target.hybrid or target.order:
        raise UserError(f"sparsity.method '{config.method}' prunes whole layers only: use reconstruct or sparsegpt")
    weights = Weights(source)
    pruned = modelopt.prune(source, tokens_BT, config.method, target.layers, progress)
    reports: list[LayerReport] = []
    changed: Changed = {}
    for name, weight_NK in pruned.items():
        holds = Pattern.parse(target.pattern).holds(weight_NK)
        outcome, note = (Outcome.PRUNED, "") if holds else (Outcome.SKIPPED, "ModelOpt skips a layer of this size")
        reports.append(report(name, weight_NK, holds, outcome, note=note))
        if holds:
            changed[f"{name}.weight"] = partial(weight_NK.to, weights.dtype(f"{name}.weight"))
    return reports, changed
