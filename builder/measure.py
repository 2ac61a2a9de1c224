"""What is measured on a built engine: accuracy and speed, each against the dense model on the same backend."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.config import Benchmark
from builder.engines import backends
from calibration.config import Accuracy

if TYPE_CHECKING:
    from benchmarks.compare import Comparison

Progress = Callable[[str, int, int], None]


def accuracy(model: Path, engine: Path, config: Accuracy, progress: Progress) -> dict[str, Any]:
    """The report's `accuracy` block: perplexity, KL and agreement on the recipe's held-out text."""
    from calibration.data import windows
    from calibration.evaluate import evaluate

    assert config.data is not None
    text = windows(config.data, model, config.sequence_length, config.samples)
    dense, built = backends.load_dense(model, engine), backends.load(engine)
    found = evaluate(dense.logits, built.logits, text.tokens, text.documents, progress).to_dict()
    if config.tasks:
        from calibration.tasks import lm_eval_tasks

        found["tasks"] = {"dense": lm_eval_tasks(dense, model, config.tasks), "built": lm_eval_tasks(built, model, config.tasks)}
    return found


def performance(model: Path, engine: Path, config: Benchmark, out: Path, progress: Progress) -> list[dict[str, Any]]:
    """Writes performance.json (the report's `performance`) and records.jsonl into `out`; returns the points."""
    from benchmarks.compare import compare

    dense, built = backends.load_dense(model, engine), backends.load(engine)
    return _write(compare(dense, built, config, _vocabulary(model), progress), out)


def _write(measured: Comparison, out: Path) -> list[dict[str, Any]]:
    (out / "performance.json").write_text(json.dumps(measured.points, indent=1) + "\n", encoding="utf8")
    measured.write_records(out / "records.jsonl")
    return measured.points


def _vocabulary(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text())["vocab_size"])


def endpoints(
    dense_url: str, built_url: str, model: Path, config: Benchmark, out: Path, progress: Progress
) -> list[dict[str, Any]]:
    """As `performance`, of two OpenAI-compatible endpoints that serve the dense baseline and the build."""
    from benchmarks.compare import compare
    from benchmarks.drivers import openai

    dense, built = openai.Endpoint(dense_url), openai.Endpoint(built_url)
    return _write(compare(dense, built, config, _vocabulary(model), progress, drive=openai.run), out)
