"""The stage that puts the questions of a budget of exact match to the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from builder.artifacts.cache import CachedOutput
from builder.context import BuildContext, Outputs, data_digest
from builder.pipeline.stage import Stage
from builder.planning.model_config import architecture, read_config
from calibration.config import Budget
from calibration.evaluation.answer_loss import Answers, loss_interval, questions_needed
from plugins.common.errors import UserError
from plugins.common.json_files import read_json, write_json

if TYPE_CHECKING:
    from calibration.evaluation.exact_match import Question


def _budget(context: BuildContext) -> Budget | None:
    """The budget, if its limit is on exact match."""
    budget = context.recipe.sparsity and context.recipe.sparsity.budget
    return budget if budget and budget.questions else None


def questions_digest(context: BuildContext) -> str:
    """The sha256 of the questions' content."""
    budget = _budget(context)
    return data_digest(budget.questions or "") if budget else ""


def questions_of(context: BuildContext) -> list[Question]:
    """The budget's questions, if it has any. Raises UserError where they do not suit the model or the limit."""
    from calibration.evaluation.exact_match import read_questions

    if not (budget := _budget(context)):
        return []
    positions = architecture(read_config(context.model)).max_position_embeddings
    engine = context.recipe.engine
    length = min(positions, engine.max_seq_len, positions if engine.chunked_prefill else engine.max_num_tokens)
    assert budget.questions is not None
    return read_questions(budget.questions, context.model, length, budget.largest_loss)


def check_questions(context: BuildContext) -> None:
    """Before any stage: raises UserError for questions that do not suit, and warns of too few to show the limit."""
    budget, count = _budget(context), len(questions_of(context))
    if budget and count < (needed := questions_needed(budget.largest_loss)):
        context.console.warn(
            f"'{budget.questions}' has {count} questions, so that the loss may be {loss_interval(0, 0, count)[1]:.1%} "
            f"(95% interval) even if no answer changes: give {needed} to show exact_match_loss="
            f"{budget.largest_loss:.2%}"
        )


def answers_of(outputs: Outputs) -> Answers | None:
    """The dense model's answers to the budget's questions; None where it has none."""
    return _read(outputs["questions"]) if "questions" in outputs else None


def _read(output: CachedOutput) -> Answers:
    return Answers(**read_json(output.path / "answers.json"))


def _run_questions(context: BuildContext, outputs: Outputs, out: Path, work: Path) -> None:
    """answers.json: the dense model's answers."""
    from calibration.evaluation.evaluate import in_precision
    from calibration.evaluation.exact_match import ask
    from calibration.quantization.quantize import load_model

    model = in_precision(load_model(context.model), context.recipe.accuracy.compute)
    answers = ask(model, questions_of(context), context.model, context.console.progress)
    write_json(out / "answers.json", vars(answers))


def _check_answers(context: BuildContext, output: CachedOutput) -> None:
    """Raises UserError where the dense model's answers leave nothing to lose."""
    answers, budget = _read(output), _budget(context)
    assert budget is not None
    count, right = len(answers.right), sum(answers.right)
    if right / count <= budget.largest_loss:
        raise UserError(
            f"the dense model answers {right or 'none'} of the {count} questions with the expected words, so that no "
            f"build can lose more than exact_match_loss={budget.largest_loss:.2%}",
            "write the answers as the model gives them, or set another limit in sparsity.budget",
        )
    context.console.print(f"  the dense model answers {right} of {count} questions")


QUESTIONS = Stage(
    name="questions",
    enabled=lambda context: _budget(context) is not None,
    inputs=lambda context, outputs: {"model": context.model_digest, "questions": questions_digest(context)},
    config=lambda context, outputs: context.recipe.accuracy.compute,
    run=_run_questions,
    code=("calibration.evaluation.evaluate", "calibration.evaluation.exact_match"),
    after=_check_answers,
)
