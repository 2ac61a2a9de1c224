"""One command from a recipe to a proven, measured build: runs the line, then puts the result in place at once."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

import yaml

from builder import machine
from builder.compatibility import check, check_shards, choose_backend
from builder.console import Console
from builder.files import sha256_tree
from builder.line import Line
from builder.manifest import MANIFEST, as_bytes, make_manifest, now
from builder.plan import Plan, make_plan
from builder.publish import claimed, publish
from builder.recipe import Recipe
from builder.report import assemble
from builder.source import find_model
from builder.store import Store
from calibration.text import find_file
from plugins.errors import GateError

Until = Literal["checkpoint", "engine", "evaluate", "benchmark", "deploy"]
STAGES: tuple[Until, ...] = ("checkpoint", "engine", "evaluate", "benchmark", "deploy")


def default_store() -> Path:
    """Where stage outputs are kept unless --store says otherwise: shared by all builds of this user."""
    cache = os.environ.get("TWOFOUR_STORE")
    return Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twofour"


def build(
    recipe: Recipe,
    out: Path,
    console: Console,
    store: Path | None = None,
    until: Until = "deploy",
    gpu: str = "H100-SXM",
    wait: bool = True,
) -> dict[str, Any]:
    """Builds `recipe` into `out` and returns the report, whose gates may have failed (see `require_gates`).

    Raises UserError for wrong input and GateError for a checkpoint that does not verify, with `out` untouched.
    """
    started = now()
    plan = resolve(recipe, gpu)
    model = find_model(recipe.model, recipe.revision, recipe.trust_remote_code)
    for data in (recipe.calibration.data, recipe.accuracy.data):
        if data is not None:
            find_file(data)  # a wrong path is told now, not after the stages before it
    with claimed(out) as place:
        line = Line(recipe, plan, model, Store(store or default_store(), console.say), console, wait)
        run(line, until)
        report = assemble(line)
        _publish(line, report, place, until, started)
    return report


def require_gates(report: dict[str, Any], out: Path) -> None:
    """Raises GateError where a gate of the report failed."""
    if failed := [gate["words"] for gate in report["gates"] if not gate["passed"]]:
        raise GateError(f"{'; '.join(failed)}: see {out / 'report' / 'report.html'}")


def resolve(recipe: Recipe, gpu: str, batch: int = 8, context: int = 1024) -> Plan:
    """The plan with its backend chosen. Raises UserError where no backend can run what the recipe asks for."""
    plan = make_plan(recipe, gpu, batch, context)
    engine, kv_cache = recipe.engine, recipe.quantization.kv_cache
    parallel = engine.tensor_parallel * engine.pipeline_parallel
    number_format = _engine_format(plan)
    check_shards(plan.layers, engine.tensor_parallel).require()
    sparse = bool(plan.sparse_layers)
    if engine.backend == "auto":
        trtllm = machine.versions("tensorrt-llm").get("tensorrt-llm")
        backend, words = choose_backend(
            number_format, sparse, machine.sm(), trtllm, kv_cache=kv_cache, parallel=parallel
        )
        return dataclasses.replace(plan, backend=backend, notes=(*plan.notes, f"backend {words}"))
    check(number_format, sparse, engine.backend, machine.sm(), kv_cache=kv_cache, parallel=parallel).require()
    return plan


def run(line: Line, until: Until) -> None:
    """Runs the stages up to and with `until`."""
    reached = STAGES.index(until)
    line.checkpoint()
    if reached >= STAGES.index("engine"):
        line.engine()
    if reached >= STAGES.index("evaluate"):
        line.accuracy()
    if reached >= STAGES.index("benchmark"):
        line.performance()


def _publish(line: Line, report: dict[str, Any], out: Path, until: Until, started: str) -> None:
    """Checkpoints, engine, model repository, report and manifest, swapped into `out` in one rename."""
    from benchmarks.report.render import render

    entries = line.entries
    checkpoints = entries["checkpoint"].path
    parts = {"checkpoint": checkpoints / "hf"}
    if (checkpoints / "trtllm").is_dir():
        parts["checkpoint-trtllm"] = checkpoints / "trtllm"
    if "engine" in entries:
        parts["engine"] = entries["engine"].path
    if "benchmark" in entries:
        parts["report/records.jsonl"] = entries["benchmark"].path / "records.jsonl"
    files = {
        "recipe.yaml": yaml.safe_dump(line.recipe.model_dump(mode="json"), sort_keys=False).encode(),
        "plan.json": as_bytes(line.plan.to_dict()),
    }
    with tempfile.TemporaryDirectory() as scratch:
        if until == "deploy":
            _deploy(entries["engine"].path, Path(scratch) / "triton")
        if "checkpoint-trtllm" in parts and "engine" not in parts:
            from builder.engines import tensorrt

            tensorrt.prepare(checkpoints / "trtllm", Path(scratch) / "engine", line.recipe.engine)
        render(report, Path(scratch) / "report")
        files |= {
            path.relative_to(scratch).as_posix(): path.read_bytes()
            for path in sorted(Path(scratch).rglob("*"))
            if path.is_file()
        }
    files[MANIFEST] = as_bytes(_manifest(line, parts, files, started))
    publish(parts, out, files)


def _deploy(engine: Path, triton: Path) -> None:
    from builder.deploy.config import DeployConfig
    from builder.deploy.triton import write_repository

    write_repository(engine, triton, DeployConfig(engine_path="../../engine"))


def _manifest(line: Line, parts: dict[str, Path], files: dict[str, bytes], started: str) -> dict[str, Any]:
    import hashlib

    subjects = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    for name, path in parts.items():
        if path.is_dir():
            subjects |= {f"{name}/{inner}": digest for inner, digest in sha256_tree(path).items()}
        else:
            subjects[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    sources = {"model": line.model_digest}
    if "calibration" in line.entries:
        calibration = json.loads((line.entries["calibration"].path / "calibration.json").read_text())
        sources["calibration"] = calibration["sha256"]
    return make_manifest(
        subjects,
        recipe=line.recipe.model_dump(mode="json"),
        tools=machine.versions(),
        gpu=machine.gpu(),
        sources=sources,
        stages=list(line.entries.values()),
        started=started,
        finished=now(),
    )


def _engine_format(plan: Plan) -> str:
    formats = {layer.format for layer in plan.layers} & {"int8", "fp8"}
    return formats.pop() if formats else ("fp16" if plan.layers[0].format == "fp16" else "bf16")
