"""Whether the engine is long enough for what the recipe measures on it."""

from __future__ import annotations

from builder.recipe import Recipe
from plugins.common.errors import UserError

MEASURED_AFTER = ("evaluate", "benchmark", "deploy")


def check_lengths(recipe: Recipe, positions: int, backend: str, until: str) -> None:
    """Raises UserError where a sequence of a stage up to `until` is longer than the engine or the model allows.

    `positions` is the model's max_position_embeddings. TensorRT-LLM's engines are not benchmarked in the build.
    """
    engine = recipe.engine
    limit = min(engine.max_seq_len, positions)
    which = f"engine.max_seq_len {limit}" if limit == engine.max_seq_len else f"the model's {limit} positions"
    length = recipe.accuracy.sequence_length
    if recipe.accuracy.data is not None and until in MEASURED_AFTER and length > limit:
        raise UserError(
            f"accuracy.sequence_length {length} is more than {which}: use --set accuracy.sequence_length={limit}"
        )
    if recipe.benchmark is None or backend != "torch" or until not in MEASURED_AFTER[1:]:
        return
    for workload in recipe.benchmark.workloads:
        total = workload.input_tokens + workload.output_tokens
        if total > limit:
            raise UserError(
                f"a benchmark workload has {workload.input_tokens} + {workload.output_tokens} tokens, "
                f"more than {which}: shorten it in benchmark.workloads, or set benchmark=null"
            )
        if workload.input_tokens > engine.max_num_tokens and not engine.chunked_prefill:
            raise UserError(
                f"a benchmark workload has {workload.input_tokens} input tokens, more than engine.max_num_tokens "
                f"{engine.max_num_tokens}: set engine.chunked_prefill=true, or raise it"
            )
