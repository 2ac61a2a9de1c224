"""Whether a model divides over ranks: tensor parallelism must cut no sparse group, pipeline parallelism no block."""

from __future__ import annotations

from collections.abc import Sequence

from builder.planning.compatibility_rules import Verdict
from plugins.common.linear_shape import LinearShape
from plugins.common.patterns import keep_and_group

ROW_PARALLEL = ("self_attn.o_proj", "mlp.down_proj", "attention.dense", "mlp.proj")
"""Ends of the names of layers split along in_features, in either checkpoint format; others split along out_features."""


def is_row_parallel(name: str) -> bool:
    """Whether tensor parallelism splits this layer's in_features; names of either checkpoint format."""
    return name.endswith(ROW_PARALLEL)


def check_shards(layers: Sequence[LinearShape], tensor_parallel: int) -> Verdict:
    """Whether every layer of the unsplit model divides over the ranks, with no split inside a group.

    The answer is about the first layer that does not. A row-parallel layer loses whole columns, and with them the
    groups that straddle the cut; a column-parallel layer loses rows, which never breaks a group.
    """
    for layer in layers:
        reason = _cut(layer, tensor_parallel)
        if reason:
            fits = [n for n in range(1, tensor_parallel) if not any(_cut(other, n) for other in layers)]
            return Verdict.no(reason, f"use engine.tensor_parallel={max(fits)}")
    return Verdict.yes(f"every layer splits over {tensor_parallel} ranks")


def check_mapping(heads: int, blocks: int, tensor_parallel: int, pipeline_parallel: int, backend: str) -> Verdict:
    """Whether attention heads divide over the tensor-parallel ranks, and decoder blocks over the stages.

    The PyTorch backend gives the first stages one block more where they do not divide; engines require an even split.
    """
    if heads % tensor_parallel:
        return Verdict.no(
            f"the model has {heads} attention heads, which tensor_parallel {tensor_parallel} does not divide",
            f"use engine.tensor_parallel={_largest_divisor(heads, tensor_parallel)}",
        )
    if blocks % pipeline_parallel and (backend == "tensorrt" or blocks < pipeline_parallel):
        return Verdict.no(
            f"the model has {blocks} decoder blocks, which pipeline_parallel {pipeline_parallel} does not divide",
            f"use engine.pipeline_parallel={_largest_divisor(blocks, pipeline_parallel)}",
        )
    return Verdict.yes(f"heads and blocks divide over {tensor_parallel} x {pipeline_parallel} ranks")


def _largest_divisor(size: int, below: int) -> int:
    return max(n for n in range(1, below) if size % n == 0)


def _cut(layer: LinearShape, ranks: int) -> str:
    """Why one layer cannot be split over the ranks; empty if it can."""
    if layer.name == "lm_head":  # TensorRT-LLM pads the vocabulary to the ranks
        return ""
    row = is_row_parallel(layer.name)
    axis, size = ("in_features", layer.in_features) if row else ("out_features", layer.out_features)
    if size % ranks:
        return f"'{layer.name}' has {axis} {size}, which tensor_parallel {ranks} does not divide"
    _, group = keep_and_group(layer.pattern)
    if row and layer.sparse and (size // ranks) % group:
        return (
            f"'{layer.name}' has in_features {size}: tensor_parallel {ranks} gives each rank {size // ranks}, "
            f"which cuts a {layer.pattern} group of {group}"
        )
    return ""
