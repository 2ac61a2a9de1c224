"""Assembles report.json's content from what the stages measured, and judges the gates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from builder.artifacts.manifest import now
from builder.context import BuildContext, Outputs
from builder.engines.predicted_tactics import read_tactics
from builder.hardware import machine
from builder.report.explain import runs_sparse
from calibration.evaluation.answer_loss import exact_match_change
from calibration.quantization.trtllm_config import trtllm_name
from plugins.common.json_files import read_json

ON_CPU = (
    "A CPU has no sparse matrix instructions: {pattern} saves bytes here, and time only where reading weights is the "
    "limit. {gpu}"
)
ON_GPU = "The gain on a GPU is predicted above, never measured here."
CPU_FIGURES = "The speeds are of this CPU alone and do not transfer to a GPU."
IN_VAIN = (
    "{count} of {pruned} {pattern} layers run dense here at any number of tokens, because no sparse kernel is faster: "
    "their zeros cost accuracy and save no time. twofour explain gives the reason for each layer; sparsity.exclude "
    "keeps layers dense."
)
ADAPTER = (
    "The adapter of rank {rank} recovers {share:.0%} of the squared output error of pruning in the median layer. The "
    "engine does not apply it, and all reported numbers exclude it: it is for a server that loads LoRA adapters."
)


ELSEWHERE = (
    "This is an engine of TensorRT-LLM's {backend} backend, which only TensorRT-LLM's server opens. Accuracy, where it "
    "is given, is that of the same checkpoint on the torch engine. Speed is not measured: serve the engine "
    "(engine/launch/serve.sh), then compare it with twofour bench --url."
)


def assemble(context: BuildContext, outputs: Outputs, benchmark_reached: bool) -> dict[str, Any]:
    """The report of a build from the outputs of its stages. Measured and predicted figures are in separate blocks.

    `benchmark_reached`: whether the build went as far as the benchmark stage, also where that could not run here.
    """
    recipe, plan = context.recipe, context.plan
    report: dict[str, Any] = {
        "twofour": machine.versions("twofour").get("twofour", "unknown"),
        "model": recipe.model,
        "recipe": recipe.model_dump(mode="json"),
        "backend": plan.backend,
        "device": machine.device(),
        "created": now(),
        "predicted": plan.predicted,
        "environment": machine.environment(),
        "gates": [],
        "notes": _notes(context, outputs),
    }
    if "engine" in outputs:
        report["size"] = {
            "dense_bytes": weight_bytes(context.model),
            "built_bytes": weight_bytes(outputs["engine"].path),
        }
        report["layers"] = _layers(context, outputs)
    if "evaluate" in outputs:
        report["accuracy"] = _read(outputs["evaluate"].path / "accuracy.json")
        for engine in report["accuracy"]["engines"].values():
            engine.pop("kernel_of", None)  # is in the table of layers
    if "routing" in outputs:
        report["routing"] = _read(outputs["routing"].path / "routing.json")
    if "benchmark" in outputs:
        report["performance"] = _read(outputs["benchmark"].path / "performance.json")
    if "selection" in outputs:
        report["pareto"] = _pareto(context, outputs, report)
    report["gates"] = gates(context, outputs, report, benchmark_reached)
    return report


def gates(
    context: BuildContext, outputs: Outputs, report: dict[str, Any], benchmark_reached: bool
) -> list[dict[str, Any]]:
    """A gate for each limit of the recipe, and one for the verification of every checkpoint."""
    rows: list[dict[str, Any]] = []
    if "checkpoint" in outputs:
        text = "all checks of the written checkpoint passed"
        rows.append({"name": "verification", "passed": True, "message": text})
    if "accuracy" in report:
        from calibration.evaluation import evaluate

        rows += evaluate.gates(evaluate.Accuracy.from_dict(report["accuracy"]), context.recipe.accuracy)
        budget = context.recipe.sparsity and context.recipe.sparsity.budget
        if budget:
            value, limit = budget.loss(report["accuracy"]), budget.largest_loss
            change = exact_match_change(report["accuracy"]) if budget.questions else budget.describe(value)
            text = f"{change} under a budget of {budget.describe(limit)}"
            rows.append({"name": "budget", "limit": limit, "value": value, "passed": value <= limit, "message": text})
    benchmark = context.recipe.benchmark
    if benchmark and benchmark.min_speedup and benchmark_reached and "benchmark" not in outputs:
        text = (
            f"not measured, and at least {benchmark.min_speedup:.2f}x is required: measure it with twofour bench --url"
        )
        rows.append({"name": "speedup", "limit": benchmark.min_speedup, "passed": False, "message": text})
    if benchmark and benchmark.min_speedup and report.get("performance"):
        for point in report["performance"]:
            ratio = point["speedup"]["output_token_throughput"]["ratio"]
            text = f"output tokens per second {ratio:.2f}x at concurrency {point['concurrency']}"
            rows.append({
                "name": "speedup", "limit": benchmark.min_speedup, "value": ratio,
                "passed": ratio >= benchmark.min_speedup, "message": f"{text} (at least {benchmark.min_speedup:.2f}x)",
            })  # fmt: skip
    return rows


def weight_bytes(directory: Path) -> int:
    """Bytes of a model's or an engine's weight files."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.suffix in (".safetensors", ".engine"))


def _pareto(context: BuildContext, outputs: Outputs, report: dict[str, Any]) -> list[dict[str, Any]]:
    """The measured selections as points of size and perplexity; predicted ones stay in selection.json."""
    budget = context.recipe.sparsity and context.recipe.sparsity.budget
    if "accuracy" not in report or not budget or budget.perplexity_increase is None:
        return []
    dense = report["accuracy"]["dense"]["perplexity"]
    saved = sum(shape.bytes_saved_by_pruning for shape in context.plan.shapes)
    return [
        {
            "label": f"{point['fraction']:.0%} {context.plan.pattern}",
            "bytes": round(context.plan.built_bytes + saved * (1 - point["fraction"])),
            "perplexity": dense * (1 + point["increase"]),
            "chosen": point["chosen"],
        }
        for point in _read(outputs["selection"].path / "selection.json")["pareto"]
        if point["measured"]
    ]


def _layers(context: BuildContext, outputs: Outputs) -> list[dict[str, Any]]:
    """Each layer as written: facts from the checkpoint's files, with the plan's dense bytes."""
    from builder import checkpoint

    engine = outputs["engine"].path
    tactics = read_tactics(engine) or {"source": None, "layers": {}}
    dense = {layer.shape.name: layer.dense_bytes for layer in context.plan.layers}
    kernels = _engine_facts(context, outputs).get("kernel_of", {})
    rows = []
    for layer in checkpoint.read(outputs["checkpoint"].path / "hf").layers():
        name = layer.shape.name
        tactic = tactics["layers"].get(name) or tactics["layers"].get(trtllm_name(name), {})
        rows.append({
            "name": name,
            **layer.shape.facts,
            "zeros": layer.zeros,
            "dense_bytes": dense.get(name),
            "built_bytes": layer.packed_bytes,
            "kernel": kernels.get(name) or _measured_kernels(tactics["source"], tactic),
            "reason": tactic.get("reason"),
        })  # fmt: skip
    return rows


def _notes(context: BuildContext, outputs: Outputs) -> list[str]:
    notes, pattern = [], context.plan.pattern
    if context.plan.backend != "torch" and "engine" in outputs:
        notes.append(ELSEWHERE.format(backend=context.plan.backend))
    notes += [f"The model: {note}." for note in context.plan.source_notes]
    notes += [f"The engine: {remark}." for remark in _remarks(context, outputs)]
    notes += [] if "engine" not in outputs else pruned_in_vain(read_tactics(outputs["engine"].path), pattern)
    if machine.device()["type"] == "cpu":
        if context.recipe.sparsity:
            notes.append(ON_CPU.format(pattern=pattern, gpu=ON_GPU))
        notes += [CPU_FIGURES]
    if "sparsify" in outputs:
        reports = _read(outputs["sparsify"].path / "layers.json")
        notes += [_outcome_note(layer) for layer in reports if not layer["pruned"]]
        kept = sum(layer["outcome"] == "already sparse" for layer in reports)
        notes += [f"{kept} layers were {pattern} already: their masks were kept"] if kept else []
    if "adapter" in outputs:
        adapter = outputs["adapter"]
        share = median(layer["taken_back"] for layer in _read(adapter.path / "layers.json"))
        notes.append(ADAPTER.format(rank=adapter.record["config"]["rank"], share=share))
    return notes


def pruned_in_vain(tactics: Mapping[str, Any] | None, pattern: str) -> list[str]:
    """The note on pruned layers that were timed on this machine and run dense; none where each has a sparse kernel."""
    if tactics is None or tactics["source"] != "measured":
        return []
    pruned = [layer for layer in tactics["layers"].values() if layer["sparse"]]
    count = sum(not runs_sparse(layer) for layer in pruned)
    return [IN_VAIN.format(count=count, pruned=len(pruned), pattern=pattern)] if count else []


def _outcome_note(layer: dict[str, Any]) -> str:
    """The note on a layer that is not pruned, from layers.json."""
    if layer["outcome"] in ("refitted", "not refitted"):
        return f"'{layer['name']}' was {layer['outcome']} to the pruned blocks: {layer['note']}"
    return f"'{layer['name']}' stayed dense: {layer['note']}"


def _measured_kernels(source: str | None, tactic: dict[str, Any]) -> str | None:
    """The layer's kernels from few tokens to many, where they were timed on the device; predictions name none."""
    if source != "measured" or not tactic.get("buckets"):
        return None
    return ", ".join(dict.fromkeys(bucket["kernel"] for bucket in tactic["buckets"]))


def _remarks(context: BuildContext, outputs: Outputs) -> list[str]:
    """Remarks of the built engine, from its build and from its measurement."""
    if "engine" not in outputs:
        return []
    remarks: list[str] = _read(outputs["engine"].path / "engine.json").get("remarks", [])
    return remarks + list(_engine_facts(context, outputs).get("remarks", []))


def _engine_facts(context: BuildContext, outputs: Outputs) -> dict[str, Any]:
    """How the engine ran where this process opened it; empty where it did not."""
    facts: dict[str, Any] = {}
    if context.plan.backend == "torch" and "evaluate" in outputs:
        facts = _read(outputs["evaluate"].path / "accuracy.json")["engines"]["built"]
    elif "benchmark" in outputs:
        facts = _read(outputs["benchmark"].path / "engines.json")["built"]
    return facts


def _read(path: Path) -> Any:
    return read_json(path)
