"""The stages of text: the calibration tokens, and a check that they suit the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder.artifacts.cache import CachedOutput
from builder.context import BuildContext, Outputs, data_digest
from builder.pipeline.stage import Stage
from plugins.common.errors import UserError
from plugins.common.json_files import read_json, write_json


def needs_text(context: BuildContext) -> bool:
    """Whether any enabled stage reads calibration tokens."""
    recipe = context.recipe
    sparsity = recipe.sparsity
    pruning = sparsity is not None and bool(sparsity.needs_text or sparsity.adapter_rank)
    return pruning or selects_layers(context) or recipe.quantization.wanted


def selects_layers(context: BuildContext) -> bool:
    """Whether the recipe sets a share of the weights, or a budget that determines one."""
    sparsity = context.recipe.sparsity
    return sparsity is not None and (sparsity.budget is not None or sparsity.fraction is not None)


def tokens_of(outputs: Outputs) -> Any:
    """The calibration tokens [samples, length] int64."""
    import numpy as np

    return np.load(outputs["calibration"].path / "tokens.npy")


def _calibration_inputs(context: BuildContext, outputs: Outputs) -> Mapping[str, str]:
    data = context.recipe.calibration.data
    if data is None:
        raise UserError("calibration.data is not set: set it, for example --set calibration.data=texts.jsonl")
    return {"model": context.model_digest, "data": data_digest(data)}


def _run_calibration(context: BuildContext, outputs: Outputs, out: Path, work: Path) -> None:
    """tokens.npy [samples, length] int64, and calibration.json with its hash."""
    import numpy as np

    from calibration.data.windows import calibration_windows

    config = context.recipe.calibration
    windows = calibration_windows(config, context.model)
    np.save(out / "tokens.npy", windows.tokens)
    write_json(out / "calibration.json", {"sha256": windows.sha256, **config.model_dump(mode="json")})


CALIBRATION = Stage(
    name="calibration",
    enabled=needs_text,
    inputs=_calibration_inputs,
    config=lambda context, outputs: context.recipe.calibration.model_dump(mode="json"),
    run=_run_calibration,
    code=("calibration.data.windows",),
    tools=("twofour", "transformers", "datasets"),
)


def _run_text_check(context: BuildContext, outputs: Outputs, out: Path, work: Path) -> None:
    """perplexity.json: the dense model's perplexity on the calibration text and on the held-out text."""
    from calibration.data.windows import windows
    from calibration.evaluation.text_check import compare_text

    accuracy = context.recipe.accuracy
    assert accuracy.data is not None
    held_out = windows(accuracy.data, context.model, accuracy.sequence_length)
    write_json(out / "perplexity.json", compare_text(context.model, tokens_of(outputs), held_out.tokens))


def _warn_of_text(context: BuildContext, output: CachedOutput) -> None:
    from calibration.evaluation.text_check import warning

    if message := warning(read_json(output.path / "perplexity.json")):
        context.console.warn(message)


TEXT_CHECK = Stage(
    name="text_check",
    enabled=lambda context: needs_text(context) and context.recipe.accuracy.data is not None,
    inputs=lambda context, outputs: {
        "model": context.model_digest,
        "tokens": outputs["calibration"].digest,
        "held_out": data_digest(context.recipe.accuracy.data or ""),
    },
    config=lambda context, outputs: context.recipe.accuracy.sequence_length,
    run=_run_text_check,
    code=("calibration.evaluation.text_check",),
    after=_warn_of_text,
)
