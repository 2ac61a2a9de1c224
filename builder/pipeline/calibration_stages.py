"""The stages that calibrate: text, layer selection, pruning, recovery and adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder.artifacts.cache import CachedOutput, digest_of
from builder.context import BuildContext, Outputs, data_digest
from builder.pipeline.stage import CALIBRATION_TOOLS, Stage
from plugins.common.errors import UserError
from plugins.common.files import write_json
from plugins.sparsity.declaration import Declaration


def needs_text(context: BuildContext) -> bool:
    """Whether any wanted stage reads calibration tokens."""
    recipe = context.recipe
    sparsity = recipe.sparsity
    pruning = sparsity is not None and bool(sparsity.needs_text or sparsity.adapter_rank)
    return pruning or _selects(context) or recipe.quantization.wanted


def tokens_of(outputs: Outputs) -> Any:
    """The calibration tokens [samples, length] int64."""
    import numpy as np

    return np.load(outputs["calibration"].path / "tokens.npy")


def _calibration_inputs(context: BuildContext, outputs: Outputs) -> Mapping[str, str]:
    data = context.recipe.calibration.data
    if data is None:
        raise UserError("calibration.data is not set: name text, for example --set calibration.data=texts.jsonl")
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
    wanted=needs_text,
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

    if message := warning(json.loads((output.path / "perplexity.json").read_text())):
        context.console.warn(message)


TEXT_CHECK = Stage(
    name="text_check",
    until="checkpoint",
    wanted=lambda context: needs_text(context) and context.recipe.accuracy.data is not None,
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


def _selects(context: BuildContext) -> bool:
    """Whether the recipe asks for a share of the weights, or for a budget to find one."""
    sparsity = context.recipe.sparsity
    return sparsity is not None and (sparsity.budget is not None or sparsity.fraction is not None)


def _run_prices(context: BuildContext, outputs: Outputs, out: Path, work: Path) -> None:
    """prices.json: what each channel costs where it alone goes 2:4."""
    from builder.pipeline.layer_selection import price

    write_json(out / "prices.json", price(context, tokens_of(outputs), work))


PRICES = Stage(
    name="prices",
    until="checkpoint",
    wanted=_selects,
    inputs=lambda context, outputs: {"model": context.model_digest, "tokens": outputs["calibration"].digest},
    config=lambda context, outputs: context.plan.sparse_layers,
    run=_run_prices,
    code=("builder.pipeline.layer_selection",),
    tools=CALIBRATION_TOOLS,
)


def _selection_inputs(context: BuildContext, outputs: Outputs) -> Mapping[str, str]:
    inputs = {
        "model": context.model_digest,
        "tokens": outputs["calibration"].digest,
        "prices": outputs["prices"].digest,
    }
    assert context.recipe.sparsity is not None
    if context.recipe.sparsity.budget:
        data = context.recipe.accuracy.data
        if data is None:
            raise UserError("a budget needs text to measure the loss on: set accuracy.data")
        inputs["held_out"] = data_digest(data)
    return inputs


def _selection_config(context: BuildContext, outputs: Outputs) -> Any:
    from builder.engines import measured_tactics

    recipe = context.recipe
    assert recipe.sparsity is not None
    config: dict[str, Any] = {"fraction": recipe.sparsity.fraction, "ranks": recipe.engine.tensor_parallel}
    if recipe.sparsity.budget:
        config |= {
            "sparsity": recipe.sparsity.model_dump(mode="json", exclude={"adapter_rank"}),  # it changes no choice
            "accuracy": recipe.accuracy.model_dump(mode="json"),
            "quantization": recipe.quantization.model_dump(mode="json"),
            "gpu": context.plan.predicted["gpu"],
            **measured_tactics.fingerprint(),
        }
    return config


def _run_selection(context: BuildContext, outputs: Outputs, out: Path, work: Path) -> None:
    """selection.json: the channels that go 2:4, and, under a budget, the front that they were chosen from."""
    from builder.pipeline.layer_selection import select

    prices = json.loads((outputs["prices"].path / "prices.json").read_text())
    write_json(out / "selection.json", select(context, tokens_of(outputs), prices, work))


def _report_selection(context: BuildContext, output: CachedOutput) -> None:
    chosen = json.loads((output.path / "selection.json").read_text())
    if chosen["fraction"]:
        context.console.say(f"  {chosen['fraction']:.1%} of the candidates' weights go 2:4")
    else:
        context.console.warn("sparsity.fraction is less than one step of any layer: all layers stay dense")


SELECTION = Stage(
    name="selection",
    until="checkpoint",
    wanted=_selects,
    inputs=_selection_inputs,
    config=_selection_config,
    run=_run_selection,
    code=("builder.pipeline.layer_selection",),
    tools=CALIBRATION_TOOLS,
    after=_report_selection,
)


def pruning_target(context: BuildContext, outputs: Outputs) -> Declaration:
    """What becomes 2:4: as the selection chose; without one all the plan's candidates, whole."""
    if "selection" not in outputs:
        return Declaration(tuple(context.plan.sparse_layers))
    return Declaration.parse(json.loads((outputs["selection"].path / "selection.json").read_text())["declaration"])


def _sparsify_inputs(context: BuildContext, outputs: Outputs) -> Mapping[str, str]:
    assert context.recipe.sparsity is not None
    inputs = {"model": context.model_digest}
    if context.recipe.sparsity.needs_text:
        inputs["tokens"] = outputs["calibration"].digest
    if "selection" in outputs:
        inputs["selection"] = outputs["selection"].digest
    return inputs


def _run_sparsify(context: BuildContext, outputs: Outputs, out: Path, work: Path) -> None:
    """model/: the pruned Hugging Face model, masks folded; layers.json: what became of each layer."""
    from calibration.pruning.sparsify import sparsify

    sparsity = context.recipe.sparsity
    assert sparsity is not None
    tokens = tokens_of(outputs) if sparsity.needs_text else None
    target, progress = pruning_target(context, outputs), context.console.progress
    reports = sparsify(context.model, tokens, sparsity, target, out / "model", work, progress)
    write_json(out / "layers.json", [vars(report) for report in reports])


SPARSIFY = Stage(
    name="sparsify",
    until="checkpoint",
    wanted=lambda context: context.recipe.sparsity is not None,
    inputs=_sparsify_inputs,
    config=lambda context, outputs: {
        "method": context.recipe.sparsity and context.recipe.sparsity.method,
        "pattern": context.recipe.sparsity and context.recipe.sparsity.pattern,
        "target": digest_of(pruning_target(context, outputs).to_json()),
    },
    run=_run_sparsify,
    code=("calibration.pruning.sparsify",),
    tools=CALIBRATION_TOOLS,
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
    until="checkpoint",
    wanted=lambda context: context.recipe.sparsity is not None and context.recipe.recovery is not None,
    inputs=lambda context, outputs: {
        "model": context.model_digest,
        "pruned": outputs["sparsify"].digest,
        "text": data_digest(recovery_text(context)),
    },
    config=_recover_config,
    run=_run_recover,
    code=("calibration.data.windows", "calibration.recovery.recover"),
    tools=CALIBRATION_TOOLS,
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

    weights, sparsity = pruned_weights(outputs), context.recipe.sparsity
    assert weights is not None
    assert sparsity is not None
    assert sparsity.adapter_rank is not None
    dense, pruned, progress = context.model, weights.path / "model", context.console.progress
    reports = compensate(dense, pruned, tokens_of(outputs), sparsity.adapter_rank, out / "adapter", work, progress)
    write_json(out / "layers.json", [vars(report) for report in reports])


ADAPTER = Stage(
    name="adapter",
    until="checkpoint",
    wanted=lambda context: context.recipe.sparsity is not None and context.recipe.sparsity.adapter_rank is not None,
    inputs=_adapter_inputs,
    config=lambda context, outputs: {"rank": context.recipe.sparsity and context.recipe.sparsity.adapter_rank},
    run=_run_adapter,
    code=("calibration.lora.eora",),
    tools=CALIBRATION_TOOLS,
)
