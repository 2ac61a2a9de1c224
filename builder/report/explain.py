"""Explains, layer by layer, whether its sparse kernel runs, whether it pays, and why."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder import checkpoint
from builder.checkpoint import LayerFacts
from builder.checkpoint.tensor_checks import check_values
from builder.checkpoint.violations import Code
from builder.engines.predicted_tactics import predict_tactics, read_tactics
from builder.recipe import load
from plugins.common import defaults
from plugins.common.defaults import SPARSE_KERNELS
from plugins.common.errors import UserError
from plugins.common.json_files import read_json
from plugins.common.patterns import TENSOR_CORE, keep_and_group
from plugins.sparsity.segments import Segments


def explain(artifact: Path, gpu: str | None = None, layers: str = "*") -> dict[str, Any]:
    """Facts of every linear layer of a build, an engine or a checkpoint.

    Kernel times are the engine's own where they were measured, else the roofline's for `gpu`, and are marked so. Raises
    UserError where `artifact` is neither, or no layer matches.
    """
    weights, engine = _places(artifact)
    tactics = read_tactics(engine) if engine else None
    facts: dict[str, LayerFacts] = {}
    if weights is not None:
        facts = {layer.shape.name: layer for layer in checkpoint.read(weights).layers()}
    if tactics is None or (gpu is not None and (tactics["device"] or {}).get("sm") is None):
        if weights is None:
            raise UserError(
                f"'{artifact}' contains no checkpoint to predict from: give the build that contains the engine"
            )
        tactics = predict_tactics(weights, gpu or defaults.GPU)
    why_dense = _why_dense(artifact)
    names = [name for name in tactics["layers"] if fnmatch.fnmatchcase(name, layers)]
    if not names:
        raise UserError(
            f"no linear layer matches '{layers}': layers are named like '{next(iter(tactics['layers']), '')}'"
        )
    return {
        "artifact": str(artifact),
        "source": tactics["source"],
        "gpu": tactics["gpu"],
        "layers": [_row(name, tactics["layers"][name], facts.get(name), why_dense.get(name)) for name in names],
    }


def _places(artifact: Path) -> tuple[Path | None, Path | None]:
    """(checkpoint, engine) of a build, an engine or a checkpoint."""
    if (artifact / "engine.json").is_file():
        return None, artifact
    if (artifact / "checkpoint").is_dir():
        split = artifact / "checkpoint-trtllm"  # an engine of TensorRT names its layers as this one does
        return split if split.is_dir() else artifact / "checkpoint", artifact / "engine"
    if (artifact / "config.json").is_file():
        return artifact, None
    raise UserError(f"'{artifact}' is not a build, an engine or a checkpoint: give the --out of a build")


def _why_dense(artifact: Path) -> dict[str, str]:
    """Why the recipe left layers dense, by name, from the build's plan.json; empty without one."""
    try:
        layers, recipe = read_json(artifact / "plan.json")["layers"], artifact / "recipe.yaml"
        sparsity = load(str(recipe)).sparsity if recipe.is_file() else None
        budget = sparsity and sparsity.budget
        limit = f" ({budget.describe(budget.largest_loss)})" if budget else ""
        lost = f"its pruning does not fit the budget{limit}"
        return {x["name"]: lost if x["sparse"] else x["reason"] for x in layers}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # a checkpoint or an engine outside a build


def _row(name: str, tactic: dict[str, Any], facts: LayerFacts | None, why_dense: str | None) -> dict[str, Any]:
    reason = tactic["reason"]
    cannot = any(bucket["kernel"] == "none" for bucket in tactic["buckets"])
    row = {
        "name": name,
        "out_features": tactic["out_features"],
        "in_features": tactic["in_features"],
        "format": tactic["format"],
        "sparse": tactic["sparse"],
        "pattern": tactic.get("pattern", TENSOR_CORE),
        "runs_dense": not (cannot or runs_sparse(tactic)),
        "reason": reason if tactic["sparse"] or why_dense is None else f"dense: {why_dense}",
        "buckets": tactic["buckets"],
    }
    if facts is not None:
        row |= {"zeros": facts.zeros, "valid_pattern": _valid(facts), "fraction": facts.shape.fraction}
        row |= {"axis": facts.segments.axis} if facts.segments else {}
    return row


def runs_sparse(tactic: Mapping[str, Any]) -> bool:
    """Whether a sparse kernel takes the layer at any number of tokens."""
    by_buckets = any(bucket["kernel"] in SPARSE_KERNELS for bucket in tactic["buckets"])
    return by_buckets if tactic.get("runs_sparse") is None else bool(tactic["runs_sparse"])


def _valid(facts: LayerFacts) -> bool:
    """Whether the stored weight holds the checkpoint's pattern in all of its sparse segments.

    A layer without segments is looked at as a whole, whatever the checkpoint declares.
    """
    rows, pattern = facts.shape.out_features, facts.shape.pattern
    if facts.shape.in_features % keep_and_group(pattern)[1]:
        return False
    segments = facts.segments or Segments.split("rows", rows, rows, pattern=pattern)
    violations = (violation for weight in facts.weights for violation in check_values(weight, None, segments))
    return not any(violation.code == Code.SPARSITY for violation in violations)
