"""The stages that write and measure: checkpoint, engine, evaluation and benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder.context import BuildContext, Outputs, data_digest
from builder.hardware import machine
from builder.pipeline.pruning_stages import pruned_weights
from builder.pipeline.questions_stage import questions_digest, questions_of
from builder.pipeline.stage import ENGINE_TOOLS, Stage
from builder.pipeline.text_stages import tokens_of
from plugins.common.json_files import write_json


def _checkpoint_inputs(context: BuildContext, outputs: Outputs) -> Mapping[str, str]:
    weights = pruned_weights(outputs)
    inputs = {"weights": weights.digest if weights else context.model_digest}
    if context.recipe.quantization.wanted:
        inputs["tokens"] = outputs["calibration"].digest
    return inputs


def _trtllm_split(context: BuildContext) -> tuple[int, int] | None:
    """(tensor parallel, pipeline parallel) of a TensorRT-LLM checkpoint, for the backend that needs one."""
    engine = context.recipe.engine
    return (engine.tensor_parallel, engine.pipeline_parallel) if context.plan.backend == "tensorrt" else None


def _run_checkpoint(context: BuildContext, outputs: Outputs, out: Path, work: Path) -> None:
    """hf/, and trtllm/ for the tensorrt backend: quantized, written by ModelOpt and verified on the files."""
    from builder.pipeline.checkpoint_stage import write_checkpoints

    weights, quantization = pruned_weights(outputs), context.recipe.quantization
    write_checkpoints(
        weights.path / "model" if weights else context.model, quantization, context.plan.quantized_layers,
        tokens_of(outputs) if quantization.wanted else None, out, _trtllm_split(context), context.console.progress,
    )  # fmt: skip


CHECKPOINT = Stage(
    name="checkpoint",
    enabled=lambda context: True,
    inputs=_checkpoint_inputs,
    config=lambda context, outputs: {
        "quantization": context.recipe.quantization.model_dump(mode="json"),
        "layers": context.plan.quantized_layers,
        "trtllm": _trtllm_split(context),
    },
    run=_run_checkpoint,
    code=("builder.pipeline.checkpoint_stage",),
)


def _engine_config(context: BuildContext, backend: str) -> dict[str, Any]:
    return {
        **context.recipe.engine.model_dump(mode="json"),
        "backend": backend,
        "predicted": context.plan.predicted["gpu"],
        "sm": machine.sm(),
    }


def _served_engine_config(context: BuildContext, outputs: Outputs) -> Any:
    from builder.engines import measured_tactics

    return _engine_config(context, context.plan.backend) | measured_tactics.fingerprint(
        on_cpu=context.plan.backend == "torch"
    )


def _run_engine(context: BuildContext, outputs: Outputs, out: Path, work: Path) -> None:
    """The backend's engine directory."""
    from builder.engines import registry

    checkpoint, gpu = outputs["checkpoint"].path, context.plan.predicted["gpu"]
    registry.build(context.plan.backend, checkpoint, out, context.recipe.engine, gpu, context.console.progress)


ENGINE = Stage(
    name="engine",
    until="engine",
    enabled=lambda context: True,
    inputs=lambda context, outputs: {"checkpoint": outputs["checkpoint"].digest},
    config=_served_engine_config,
    run=_run_engine,
    code=("builder.engines.registry",),
    tools=ENGINE_TOOLS,
)


def _run_reference(context: BuildContext, outputs: Outputs, out: Path, work: Path) -> None:
    """A torch engine of the same checkpoint that computes logits only."""
    from builder.engines import registry

    checkpoint, gpu = outputs["checkpoint"].path, context.plan.predicted["gpu"]
    registry.build("torch", checkpoint, out, context.recipe.engine, gpu, context.console.progress, speed_matters=False)


REFERENCE = Stage(
    name="reference",
    until="evaluate",
    # only TensorRT-LLM's own server opens an engine of its backends
    enabled=lambda context: context.plan.backend != "torch" and context.recipe.accuracy.data is not None,
    inputs=lambda context, outputs: {"checkpoint": outputs["checkpoint"].digest},
    config=lambda context, outputs: _engine_config(context, "torch"),
    run=_run_reference,
    code=("builder.engines.registry",),
    tools=ENGINE_TOOLS,
)


def _run_evaluate(context: BuildContext, outputs: Outputs, out: Path, work: Path) -> None:
    """accuracy.json: the engine against the dense model on held-out text and on the budget's questions."""
    from builder.pipeline.measure import accuracy

    engine = outputs.get("reference") or outputs["engine"]
    config, progress = context.recipe.accuracy, context.console.progress
    measured = accuracy(context.model, engine.path, config, progress, questions_of(context))
    write_json(out / "accuracy.json", measured)


EVALUATE = Stage(
    name="evaluate",
    until="evaluate",
    enabled=lambda context: context.recipe.accuracy.data is not None,
    inputs=lambda context, outputs: {
        "model": context.model_digest,
        "engine": (outputs.get("reference") or outputs["engine"]).digest,
        "data": data_digest(context.recipe.accuracy.data or ""),
        "questions": questions_digest(context),
    },
    config=lambda context, outputs: context.recipe.accuracy.model_dump(mode="json"),
    run=_run_evaluate,
    code=("builder.pipeline.measure",),
    tools=ENGINE_TOOLS,
)


def _run_benchmark(context: BuildContext, outputs: Outputs, out: Path, work: Path) -> None:
    """performance.json and records.jsonl: dense and built, interleaved on this machine."""
    from builder.pipeline.measure import performance

    config = context.recipe.benchmark
    assert config is not None
    performance(context.model, outputs["engine"].path, config, out, context.console.progress)


BENCHMARK = Stage(
    name="benchmark",
    until="benchmark",
    enabled=lambda context: context.recipe.benchmark is not None and context.plan.backend == "torch",
    inputs=lambda context, outputs: {"model": context.model_digest, "engine": outputs["engine"].digest},
    config=lambda context, outputs: {
        "benchmark": context.recipe.benchmark and context.recipe.benchmark.model_dump(mode="json"),
        "device": machine.device(),
    },
    run=_run_benchmark,
    code=("builder.pipeline.measure",),
    tools=ENGINE_TOOLS,
)
