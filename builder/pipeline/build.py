"""One command from a recipe to a proven, measured build: runs the line, then puts the result in place at once."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.roofline import roofline
from builder.artifacts.cache import Cache, CachedOutput, default_store
from builder.artifacts.install import claimed, publish
from builder.artifacts.manifest import MANIFEST, as_bytes, make_manifest, now
from builder.console import Console
from builder.context import BuildContext, Outputs
from builder.hardware import machine
from builder.pipeline.questions_stage import check_questions
from builder.pipeline.reference_build import reference_engine
from builder.pipeline.stages import UNTIL, Until, run_stages
from builder.planning.compatibility import check, choose_backend
from builder.planning.compatibility_rules import BACKENDS
from builder.planning.hub import find_config, find_model
from builder.planning.lengths import check_lengths
from builder.planning.model_config import architecture
from builder.planning.plan import Plan, make_plan
from builder.planning.sharding import check_mapping, check_shards
from builder.recipe import Recipe
from builder.report.assemble import assemble
from builder.source_check import check_settings, check_source
from calibration.data.documents import find_file
from plugins.common import defaults
from plugins.common.errors import GateError
from plugins.common.json_files import read_json


def build(
    recipe: Recipe,
    out: Path,
    console: Console,
    store: Path | None = None,
    until: Until = "deploy",
    gpu: str = defaults.GPU,
    wait: bool = True,
) -> dict[str, Any]:
    """Builds `recipe` into `out` and returns the report, whose gates may have failed (see `require_gates`).

    Raises UserError for wrong input and GateError for a checkpoint that does not verify, with `out` untouched.
    """
    started = now()
    plan = resolve(recipe, gpu, until=until)
    recovery = recipe.recovery.data if recipe.recovery else None
    prompts = recipe.routing.prompts if recipe.routing else None
    questions = recipe.sparsity.budget.questions if recipe.sparsity and recipe.sparsity.budget else None
    for data in (recipe.calibration.data, recipe.accuracy.data, recovery, prompts, questions):
        if data is not None:
            find_file(data)  # a wrong path is an error now, not after the stages before it
    plan, model = check_files(recipe, plan)
    for note in plan.source_notes:
        console.warn(note)
    with claimed(out) as place:
        context = BuildContext(recipe, plan, model, Cache(store or default_store(), console.print), console, wait)
        if recipe.routing:
            reference_engine(recipe.routing, context.model_digest)
        check_questions(context)
        outputs = run_stages(context, until)
        report = assemble(context, outputs, UNTIL.index(until) >= UNTIL.index("benchmark"))
        _publish(context, outputs, report, place, until, started)
    return report


def require_gates(report: dict[str, Any], out: Path) -> None:
    """Raises GateError where a gate of the report failed."""
    if failed := [gate["message"] for gate in report["gates"] if not gate["passed"]]:
        raise GateError(f"{'; '.join(failed)}: see {out / 'report' / 'report.html'}")


def check_files(recipe: Recipe, plan: Plan) -> tuple[Plan, Path]:
    """The plan with what its model's files gave cause to note, and their directory. Raises UserError."""
    model = find_model(recipe.model, recipe.revision)
    return dataclasses.replace(plan, source_notes=tuple(check_source(model))), model


def resolve(
    recipe: Recipe, gpu: str, batch: int = defaults.BATCH, context: int = defaults.CONTEXT, until: Until = "deploy"
) -> Plan:
    """The plan with its backend chosen. Raises UserError where no backend can run the recipe."""
    plan = make_plan(recipe, gpu, batch, context)
    engine = recipe.engine
    check_shards(plan.shapes, engine.tensor_parallel).require()
    combination = (_engine_format(plan), bool(plan.sparse_layers))
    needs: dict[str, Any] = {"kv_cache": recipe.quantization.kv_cache, "features": plan.features}
    parallel = engine.tensor_parallel * engine.pipeline_parallel
    backend, reason = pick_backend(engine.backend, *combination, parallel=parallel, **needs)
    check_mapping(plan.heads, plan.blocks, engine.tensor_parallel, engine.pipeline_parallel, backend).require()
    config, source = find_config(recipe.model, recipe.revision)
    shapes, evaluated = architecture(config, source), recipe.accuracy.data is not None
    check_lengths(recipe, shapes.max_position_embeddings, backend, until)
    settings = check_settings(config, shapes, source, backend, evaluated, engine.max_seq_len)
    notes = [*plan.notes, *settings, *([f"backend {reason}"] if engine.backend == "auto" else [])]
    card = roofline.gpu(gpu)
    if machine.sm() is None:  # it will run elsewhere: such as on the card that times are predicted for
        there = check(*combination, backend, card.sm, **needs)
        notes += [] if there.ok else [f"not on {card.name}: {there.reason}; {there.instead}"]
    return dataclasses.replace(plan, backend=backend, notes=tuple(notes))


def pick_backend(
    requested: str, number_format: str, sparse: bool, among: Sequence[str] = BACKENDS, **needs: Any
) -> tuple[str, str]:
    """The backend to build for here, and why. Raises UserError where `requested`, or with "auto" any, cannot.

    `among` are those that "auto" may take; `needs` are kv_cache, parallel and features, as `check` takes them.
    """
    if requested == "auto":
        trtllm = machine.versions("tensorrt-llm").get("tensorrt-llm")
        return choose_backend(number_format, sparse, machine.sm(), trtllm, among=among, **needs)
    return requested, check(number_format, sparse, requested, machine.sm(), **needs).require().reason


def _publish(
    context: BuildContext, outputs: Outputs, report: dict[str, Any], out: Path, until: Until, started: str
) -> None:
    """Checkpoints, adapter, engine, model repository, report and manifest, swapped into `out` in one rename."""
    from benchmarks.report.render import render

    checkpoints = outputs["checkpoint"].path
    parts = {"checkpoint": Part(outputs["checkpoint"], "hf")}
    if (checkpoints / "trtllm").is_dir():
        parts["checkpoint-trtllm"] = Part(outputs["checkpoint"], "trtllm")
    if "adapter" in outputs:
        parts["adapter"] = Part(outputs["adapter"], "adapter")
    if "engine" in outputs:
        parts["engine"] = Part(outputs["engine"])
    if "routing" in outputs and report["routing"]["decision"]["serve"] == "router":
        parts["routing"] = Part(outputs["routing"], "router")
    if "benchmark" in outputs:
        parts["report/records.jsonl"] = Part(outputs["benchmark"], "records.jsonl")
    files = {
        "recipe.yaml": yaml.safe_dump(context.recipe.model_dump(mode="json"), sort_keys=False).encode(),
        "plan.json": as_bytes(context.plan.to_dict()),
    }
    with tempfile.TemporaryDirectory() as scratch:
        if until == "deploy":
            _deploy(outputs["engine"].path, Path(scratch) / "triton")
        if "checkpoint-trtllm" in parts and "engine" not in parts:
            from builder.engines.trtllm import tensorrt

            tensorrt.prepare(checkpoints / "trtllm", Path(scratch) / "engine", context.recipe.engine)
        render(report, Path(scratch) / "report")
        files |= {
            path.relative_to(scratch).as_posix(): path.read_bytes()
            for path in sorted(Path(scratch).rglob("*"))
            if path.is_file()
        }
    files[MANIFEST] = as_bytes(_manifest(context, outputs, parts, files, started))
    publish({name: part.path for name, part in parts.items()}, out, files)


def _deploy(engine: Path, triton: Path) -> None:
    from builder.config import DeployConfig
    from builder.deploy.repository import write_repository

    write_repository(engine, triton, DeployConfig(engine_path="../../engine"))


@dataclasses.dataclass(frozen=True)
class Part:
    """What of a stage's output goes into OUT: all of it, or the file or folder named `inner`."""

    entry: CachedOutput
    inner: str = ""

    @property
    def path(self) -> Path:
        return self.entry.path / self.inner

    def digests(self, name: str) -> dict[str, str]:
        """sha256 by path in OUT, where the part is called `name`: as the store read them."""
        files = self.entry.files
        if self.inner in files:
            return {name: files[self.inner]}
        prefix = f"{self.inner}/" if self.inner else ""
        return {f"{name}/{path[len(prefix) :]}": files[path] for path in files if path.startswith(prefix)}


def _manifest(
    context: BuildContext, outputs: Outputs, parts: Mapping[str, Part], files: Mapping[str, bytes], started: str
) -> dict[str, Any]:
    subjects = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    for name, part in parts.items():
        subjects |= part.digests(name)
    sources = {"model": context.model_digest}
    if "calibration" in outputs:
        calibration = read_json(outputs["calibration"].path / "calibration.json")
        sources["calibration"] = calibration["sha256"]
    return make_manifest(
        subjects,
        recipe=context.recipe.model_dump(mode="json"),
        tools=machine.versions(),
        gpu=machine.gpu(),
        sources=sources,
        stages=list(outputs.values()),
        started=started,
        finished=now(),
    )


def _engine_format(plan: Plan) -> str:
    """Of the quantized layers, or of all where none is."""
    formats = {shape.format for shape in plan.shapes} & {"int8", "fp8"}
    return formats.pop() if formats else plan.shapes[0].format
