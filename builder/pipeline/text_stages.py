"""The stages of text: the calibration tokens, and a check that they suit the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.artifacts.cache import CachedOutput
from builder.context import BuildContext, Outputs, data_digest
from builder.pipeline.stage import CALIBRATION_TOOLS, Stage
from plugins.common.errors import UserError
from plugins.common.json_files import read_json, write_json

if TYPE_CHECKING:
    from calibration.evaluation.exact_match import Question


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
    until="checkpoint",
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
    until="checkpoint",
    enabled=lambda context: needs_text(context) and context.recipe.accuracy.data is not None,
    inputs=lambda context, outputs: {
        "model": context.model_digest,
        "tokens": outputs["calibration"].digest,
        "held_out": data_digest(context.recipe.accuracy.data or ""),
    },
    config=lambda context, outputs: context.recipe.accuracy.sequence_length,
    run=_run_text_check,
    code=("calibration.evaluation.text_check",),
    tools=CALIBRATION_TOOLS,
    after=_warn_of_text,
)


def questions_of(context: BuildContext) -> list[Question]:
    """The budget's questions. Raises UserError where they do not suit the model or the limit."""
    from calibration.evaluation.exact_match import read_questions

    sparsity = context.recipe.sparsity
    assert sparsity is not None
    assert sparsity.budget is not None
    assert sparsity.budget.questions is not None
    assert sparsity.budget.exact_match_loss is not None
    return read_questions(sparsity.budget.questions, context.model, sparsity.budget.exact_match_loss)


def _has_questions(context: BuildContext) -> bool:
    sparsity = context.recipe.sparsity
    return sparsity is not None and sparsity.budget is not None and sparsity.budget.questions is not None


def _run_questions(context: BuildContext, outputs: Outputs, out: Path, work: Path) -> None:
    """answered.json: whether the dense model answers each question with the expected words."""
    from calibration.evaluation.exact_match import are_answered
    from calibration.quantization.quantize import load_model

    questions = questions_of(context)
    answered = are_answered(load_model(context.model), questions, context.model, context.console.progress)
    if not any(answered):
        raise UserError(
            f"the dense model answers none of the {len(answered)} questions with the expected words, so that there is "
            "nothing to lose",
            "write the answers as the model gives them, or set another limit in sparsity.budget",
        )
    context.console.print(f"  the dense model answers {sum(answered)} of {len(answered)} questions")
    write_json(out / "answered.json", answered)


QUESTIONS = Stage(
    name="questions",
    until="checkpoint",
    enabled=_has_questions,
    inputs=lambda context, outputs: {
        "model": context.model_digest,
        "questions": data_digest(context.recipe.sparsity.budget.questions or ""),  # type: ignore[union-attr]
    },
    config=lambda context, outputs: context.recipe.sparsity.budget.exact_match_loss,  # type: ignore[union-attr]
    run=_run_questions,
    code=("calibration.evaluation.exact_match",),
    tools=CALIBRATION_TOOLS,
)
