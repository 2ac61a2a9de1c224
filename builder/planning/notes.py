"""Notes on a plan's figures."""

from __future__ import annotations

from pathlib import Path

from builder.planning.kv_capacity import eviction_notes
from builder.recipe import Recipe
from calibration.evaluation.answer_loss import questions_needed
from plugins.common.patterns import TENSOR_CORE


def notes(recipe: Recipe, prunes: bool, dense_bytes: int, built_bytes: int) -> tuple[str, ...]:
    """A sentence each. `prunes`: whether any layer is a candidate for pruning; bytes are those of all weights."""
    lines = eviction_notes(recipe.engine, recipe.accuracy.sequence_length)
    if recipe.sparsity and not prunes:
        lines.append("no layer is pruned: sparsity.layers and sparsity.exclude leave none")
    if recipe.sparsity and recipe.sparsity.budget:
        budget = recipe.sparsity.budget
        limit = budget.describe(budget.largest_loss)
        lines.append(
            f"bytes and times are those of all candidates pruned: the build prunes only what fits the budget ({limit})"
        )
        if budget.questions:
            lines.append(
                f"the budget counts answers to '{budget.questions}': a loss of {budget.largest_loss:.2%} takes "
                f"{questions_needed(budget.largest_loss)} questions to show"
            )
    if recipe.sparsity and recipe.sparsity.pattern == TENSOR_CORE:
        lines.append(
            "2:4 gains its full time on GPUs with sparse tensor cores (SM80 and later); a CPU saves bytes, and time "
            "only where reading weights is the limit"
        )
    elif recipe.sparsity:
        lines.append(
            f"{recipe.sparsity.pattern} saves bytes and no multiplications: it gains time only where reading weights "
            "is the limit, on a GPU up to 64 tokens"
        )
    if recipe.routing:
        first = recipe.routing.variants[0]
        held = (dense_bytes, "of dense weights") if first == "dense" else (_weight_bytes(Path(first)), f"of '{first}'")
        lines.append(
            f"routing holds two engines: {held[0] / 1e6:.4g} MB {held[1]} and {built_bytes / 1e6:.4g} MB of the "
            "build's, each with its own KV cache; they share the tokenizer"
        )
    return tuple(lines)


def _weight_bytes(build: Path) -> int:
    """Bytes of the weight files of another build's engine; 0 before it is built."""
    return sum(file.stat().st_size for file in (build / "engine").glob("*.safetensors"))
