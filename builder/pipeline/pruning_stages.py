"""The stages that prune: layer selection, pruning, recovery and adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder.artifacts.cache import CachedOutput, digest_of
from builder.context import BuildContext, Outputs, data_digest
from builder.pipeline.questions_stage import answers_of
from builder.pipeline.stage import Stage
from builder.pipeline.text_stages import selects_layers, tokens_of
from builder.planning.compatibility import has_hybrid_kernels
from plugins.common.errors import UserError
from plugins.common.json_files import read_json, write_json
from plugins.sparsity.declaration import Declaration


def _run_prices(context: BuildContext, outputs: Outputs, out: Path, work: Path) -> None:
    """prices.json: what each channel costs where it alone is pruned."""
    from builder.pipeline.layer_selection import price

    write_json(out / "prices.json", price(context, tokens_of(outputs), work))


PRICES = Stage(
    name="prices",
    enabled=selects_layers,
    inputs=lambda context, outputs: {"model": context.model_digest, "tokens": outputs["calibration"].digest},
    config=lambda context, outputs: [context.plan.pattern, *context.plan.sparse_layers],
    run=_run_prices,
    code=("builder.pipeline.layer_selection",),
)


def _selection_inputs(context: BuildContext, outputs: Outputs) -> Mapping[str, str]:
    inputs = {
        "model": context.model_digest,
        "tokens": outputs["calibration"].digest,
        "prices": outputs["prices"].digest,
    }
    if context.sparsity.budget:
        data = context.recipe.accuracy.data
        if data is None:
            raise UserError("a budget needs text to measure the loss on: set accuracy.data")
        inputs["held_out"] = data_digest(data)
        if "questions" in outputs:
            inputs["questions"] = outputs["questions"].digest
    return inputs


def _selection_config(context: BuildContext, outputs: Outputs) -> Any:
    from builder.engines import measured_tactics

    recipe, sparsity = context.recipe, context.sparsity
    config: dict[str, Any] = {
        "fraction": sparsity.fraction,
        "pattern": sparsity.pattern,
        "ranks": recipe.engine.tensor_parallel,
        "hybrid_kernels": has_hybrid_kernels(context.plan.backend),
    }
    if sparsity.budget:
        config |= {
            # a rank changes no choice, and the questions are known by their content
            "sparsity": sparsity.model_dump(mode="json", exclude={"adapter_rank": True, "budget": {"questions"}}),
            "accuracy": recipe.accuracy.model_dump(mode="json"),
            "quantization": recipe.quantization.model_dump(mode="json"),
            "gpu": context.plan.predicted["gpu"],
            **measured_tactics.fingerprint(),
        }
    return config


def _run_selection(context: BuildContext, outputs: Outputs, out: Path, work: Path) -> None:
    """selection.json: the channels that are pruned, and, under a budget, the front that they were chosen from."""
    from builder.pipeline.layer_selection import select

    prices = read_json(outputs["prices"].path / "prices.json")
    write_json(out / "selection.json", select(context, tokens_of(outputs), prices, work, answers_of(outputs)))


def _report_selection(context: BuildContext, output: CachedOutput) -> None:
    chosen = read_json(output.path / "selection.json")
    if chosen["fraction"]:
        context.console.print(
            f"  {chosen['fraction']:.1%} of the candidates' weights become {chosen['declaration']['pattern']}"
        )
    else:
        context.console.warn("sparsity.fraction is less than one step of any layer: all layers stay dense")


SELECTION = Stage(
    name="selection",
    enabled=selects_layers,
    inputs=_selection_inputs,
    config=_selection_config,
    run=_run_selection,
    code=("builder.pipeline.layer_selection",),
    after=_report_selection,
)


def pruning_target(context: BuildContext, outputs: Outputs) -> Declaration:
    """What becomes sparse: as the selection chose; without one all the plan's candidates, whole."""
    if "selection" not in outputs:
        return Declaration(tuple(context.plan.sparse_layers), pattern=context.plan.pattern)
    return Declaration.parse(read_json(outputs["selection"].path / "selection.json")["declaration"])


def _sparsify_inputs(context: BuildContext, outputs: Outputs) -> Mapping[str, str]:
    inputs = {"model": context.model_digest}
    if context.sparsity.needs_text:
        inputs["tokens"] = outputs["calibration"].digest
    if "selection" in outputs:
        inputs["selection"] = outputs["selection"].digest
    return inputs


def _run_sparsify(context: BuildContext, outputs: Outputs, out: Path, work: Path) -> None:
    """model/: the pruned Hugging Face model, masks folded; layers.json: what became of each layer."""
    from calibration.pruning.sparsify import sparsify

    tokens = tokens_of(outputs) if context.sparsity.needs_text else None
    target, progress = pruning_target(context, outputs), context.console.progress
    reports = sparsify(context.model, tokens, context.sparsity, target, out / "model", work, progress)
    write_json(out / "layers.json", [vars(report) for report in reports])


SPARSIFY = Stage(
    name="sparsify",
    enabled=lambda context: context.recipe.sparsity is not None,
    inputs=_sparsify_inputs,
    config=lambda context, outputs: {
        "method": context.sparsity.method,
        "pattern": context.sparsity.pattern,
        "target": digest_of(pruning_target(context, outputs).to_json()),
    },
    run=_run_sparsify,
    code=("calibration.pruning.sparsify",),
)


def recovery_text(context: BuildContext) -> str:
    """The text that recovery trains on. Raises UserError where the recipe names none."""
    recovery = context.recipe.recovery
    text = (recovery.data if recovery else None) or context.recipe.calibration.data
    if text is None:
        raise UserError("recovery needs text: set recovery.data or calibration.data")
    return text


def _recover_config(context: BuildContext, outputs: Outputs) -> Any:
    recipe = context.recipe
    assert recipe.recovery is not None
    return {
        "recovery": recipe.recovery.model_dump(mode="json"),
        "calibration": recipe.calibration.model_dump(mode="json"),
        "quantization": recipe.quantization.model_dump(mode="json"),
        "quantized": context.plan.quantized_layers if recipe.quantization.wanted else [],
    }


def _run_recover(context: BuildContext, outputs: Outputs, out: Path, work: Path) -> None:
    """model/: the pruned model after distillation from the dense one."""
    from calibration.data.windows import windows
    from calibration.recovery.recover import recover

    recipe = context.recipe
    assert recipe.recovery is not None
    length, chat_template = recipe.calibration.sequence_length, recipe.calibration.chat_template
    text = windows(recovery_text(context), context.model, length, chat_template=chat_template)  # all there is
    quantized = context.plan.quantized_layers if recipe.quantization.wanted else []
    recover(
        context.model, outputs["sparsify"].path / "model", text.tokens, recipe.recovery, out / "model", work,
        context.console.progress, recipe.quantization, quantized,
    )  # fmt: skip


RECOVER = Stage(
    name="recover",
    enabled=lambda context: context.recipe.sparsity is not None and context.recipe.recovery is not None,
    inputs=lambda context, outputs: {
        "model": context.model_digest,
        "pruned": outputs["sparsify"].digest,
        "text": data_digest(recovery_text(context)),
    },
    config=_recover_config,
    run=_run_recover,
    code=("calibration.data.windows", "calibration.recovery.recover"),
)


def pruned_weights(outputs: Outputs) -> CachedOutput | None:
    """The output whose model/ holds the weights to quantize; None where nothing is pruned."""
    return outputs.get("recover") or outputs.get("sparsify")


def _adapter_inputs(context: BuildContext, outputs: Outputs) -> Mapping[str, str]:
    weights = pruned_weights(outputs)
    assert weights is not None
    return {"model": context.model_digest, "weights": weights.digest, "tokens": outputs["calibration"].digest}


def _run_adapter(context: BuildContext, outputs: Outputs, out: Path, work: Path) -> None:
    """adapter/: a LoRA adapter to the pruned weights; layers.json: what it gives."""
    from calibration.lora.eora import compensate

    weights, rank = pruned_weights(outputs), context.sparsity.adapter_rank
    assert weights is not None
    assert rank is not None
    pruned, progress = weights.path / "model", context.console.progress
    reports = compensate(context.model, pruned, tokens_of(outputs), rank, out / "adapter", work, progress)
    write_json(out / "layers.json", [vars(report) for report in reports])


ADAPTER = Stage(
    name="adapter",
    enabled=lambda context: context.recipe.sparsity is not None and context.recipe.sparsity.adapter_rank is not None,
    inputs=_adapter_inputs,
    config=lambda context, outputs: {"rank": context.sparsity.adapter_rank},
    run=_run_adapter,
    code=("calibration.lora.eora",),
)
