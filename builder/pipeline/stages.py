"""The pipeline: its stages in order, from calibration text to a measured engine."""

from __future__ import annotations

from typing import Literal

from builder.artifacts.cache import CachedOutput
from builder.context import BuildContext
from builder.pipeline.engine_stages import BENCHMARK, CHECKPOINT, ENGINE, EVALUATE, REFERENCE
from builder.pipeline.pruning_stages import ADAPTER, PRICES, RECOVER, SELECTION, SPARSIFY
from builder.pipeline.questions_stage import QUESTIONS
from builder.pipeline.routing_stage import ROUTING
from builder.pipeline.stage import run_stage
from builder.pipeline.text_stages import CALIBRATION, TEXT_CHECK

Until = Literal["checkpoint", "engine", "evaluate", "benchmark", "deploy"]
UNTIL: tuple[Until, ...] = ("checkpoint", "engine", "evaluate", "benchmark", "deploy")

STAGES = (
    CALIBRATION,
    QUESTIONS,
    TEXT_CHECK,
    PRICES,
    SELECTION,
    SPARSIFY,
    RECOVER,
    ADAPTER,
    CHECKPOINT,
    ENGINE,
    REFERENCE,
    EVALUATE,
    ROUTING,
    BENCHMARK,
)


def run_stages(context: BuildContext, until: Until) -> dict[str, CachedOutput]:
    """Runs the enabled stages, up to and including `until`. Returns their outputs by stage name."""
    outputs: dict[str, CachedOutput] = {}
    stages = [stage for stage in STAGES if UNTIL.index(stage.until) <= UNTIL.index(until) and stage.enabled(context)]
    for number, stage in enumerate(stages, start=1):
        outputs[stage.name] = run_stage(stage, context, outputs, f" ({number} of {len(stages)})")
    return outputs
