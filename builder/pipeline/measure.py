"""Measures accuracy and speed of a built engine, each against the dense model on the same backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.config import Benchmark
from benchmarks.roofline import roofline
from benchmarks.roofline.roofline import Gpu
from benchmarks.roofline.utilization import ModelCost, add_limits
from builder.engines import registry
from builder.engines.base import Engine, Request
from builder.engines.predicted_tactics import read_tactics
from builder.hardware import machine
from builder.planning.model_config import architecture, read_config
from calibration.config import Accuracy
from calibration.evaluation.answer_loss import compare_answers
from plugins.common.errors import UserError
from plugins.common.json_files import write_json
from plugins.common.linear_shape import LinearShape
from plugins.common.progress import Progress
from plugins.common.request import tokens_by_request

if TYPE_CHECKING:
    from benchmarks.serving.compare import Comparison
    from calibration.evaluation.exact_match import Question


def accuracy(
    model: Path, engine: Path, config: Accuracy, progress: Progress, questions: Sequence[Question] = ()
) -> dict[str, Any]:
    """The report's `accuracy` block: perplexity, KL and agreement on held-out text, exact match on `questions`."""
    from calibration.data.windows import windows
    from calibration.evaluation.evaluate import evaluate

    assert config.data is not None
    text = windows(config.data, model, config.sequence_length, config.samples, key="accuracy.samples")
    precise = config.compute == "float32"
    dense, built = registry.load_dense(model, engine, precise=precise), registry.load(engine, precise=precise)
    measured = evaluate(dense.logits, built.logits, text.tokens, text.documents, progress).to_dict()
    measured["engines"] = {"dense": dense.describe(), "built": built.describe()}
    if questions:
        measured |= compare_answers(*(_right(each, questions, model) for each in (dense, built)))
    if config.tasks:
        from calibration.evaluation.lm_eval import lm_eval_tasks

        limit = config.sequence_length
        measured["tasks"] = {
            name: lm_eval_tasks(engine.logits, model, config.tasks, limit)
            for name, engine in (("dense", dense), ("built", built))
        }
    return measured


def _right(engine: Engine, questions: Sequence[Question], model: Path) -> list[bool]:
    """Whether the engine answers each question with the expected words."""
    from calibration.data.tokenizer import load_tokenizer
    from calibration.evaluation.exact_match import matches

    tokenizer = load_tokenizer(model)
    requests = [Request(str(i), each.prompt, each.max_new_tokens) for i, each in enumerate(questions)]
    answers = tokens_by_request(engine.generate(requests), len(requests))
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers]
    return [matches(text, each.answer) for text, each in zip(texts, questions, strict=True)]


def performance(
    model: Path, engine: Path, config: Benchmark, out: Path, progress: Progress, baseline: Path | None = None
) -> list[dict[str, Any]]:
    """Writes performance.json (the report's `performance`), records.jsonl and engines.json (how both sides ran) into
    `out`; returns the points. The side "dense" is the dense model on the engine's backend, or the engine `baseline`."""
    from benchmarks.serving.compare import compare

    dense = registry.load(baseline) if baseline else registry.load_dense(model, engine)
    built = registry.load(engine)
    measured = compare(dense, built, config, _vocabulary(model), progress)
    write_json(out / "engines.json", {"dense": dense.describe(), "built": built.describe()})
    if (costs := _costs(model, engine, baseline)) and (card := _this_gpu()):
        add_limits(measured.points, costs, card)
    return _write(measured, out)


def _this_gpu() -> Gpu | None:
    """The limits of this machine's GPU. A CPU has none here: what its caches allow depends on the model's size."""
    try:
        return roofline.gpu(machine.device()["name"]) if machine.sm() else None
    except UserError:
        return None  # a card that gpus.yaml does not describe: no share is computed


def _costs(model: Path, engine: Path, baseline: Path | None) -> dict[str, ModelCost]:
    """What one decode step of each side moves and multiplies, from the engine's tactics and the model's config."""
    built = _cost(model, engine)
    if built is None:
        return {}
    if baseline is None:
        values = architecture(read_config(model)).kv_values_per_token
        layers = [dataclasses.replace(layer, format="bf16", fraction=0.0) for layer in built.layers]
        return {"dense": ModelCost(layers, 2.0 * values), "built": built}
    other = _cost(model, baseline)
    return {} if other is None else {"dense": other, "built": built}


def _cost(model: Path, engine: Path) -> ModelCost | None:
    """Of an engine's decode step; None where it has no tactics."""
    tactics = read_tactics(engine)
    if tactics is None:
        return None
    layers = [LinearShape.from_facts(name, facts) for name, facts in tactics["layers"].items()]
    kv_bytes = 1 if registry.engine_facts(engine).get("kv_cache", "none") != "none" else 2
    return ModelCost(layers, float(kv_bytes * architecture(read_config(model)).kv_values_per_token))


def _write(measured: Comparison, out: Path) -> list[dict[str, Any]]:
    from benchmarks.serving.aiperf_export import export_aiperf

    write_json(out / "performance.json", measured.points)
    measured.write_records(out / "records.jsonl")
    built = (record for run in measured.runs if run.side == "built" for record in run.records)
    export_aiperf(built, out / "profile_export.jsonl")
    return measured.points


def _vocabulary(model: Path) -> int:
    return int(read_config(model)["vocab_size"])


def endpoints(
    dense_url: str, built_url: str, model: Path, config: Benchmark, out: Path, progress: Progress
) -> list[dict[str, Any]]:
    """As `performance`, of two OpenAI-compatible endpoints that serve the dense baseline and the build."""
    from benchmarks.serving.compare import compare
    from benchmarks.serving.drivers import openai

    dense, built = openai.Endpoint(dense_url), openai.Endpoint(built_url)
    return _write(compare(dense, built, config, _vocabulary(model), progress, drive=openai.run), out)
