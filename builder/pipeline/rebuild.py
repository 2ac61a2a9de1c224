"""Commands on a finished build, engine or checkpoint: measure it again, rebuild its engine, deploy it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.config import Benchmark, Workload
from builder import recipe
from builder.artifacts.filesystem import remove, sha256_tree
from builder.artifacts.install import claimed, publish
from builder.artifacts.manifest import MANIFEST, as_bytes, is_build, make_manifest, now, record_folder, source_digest
from builder.checkpoint import Checkpoint
from builder.config import DeployConfig, EngineConfig
from builder.console import Console
from builder.engines.trtllm import version_lock
from builder.hardware import machine
from builder.pipeline import measure
from builder.pipeline.build import pick_backend
from builder.pipeline.open_router import shadow_share
from builder.pipeline.reference_build import reference_engine
from builder.planning.hub import find_model
from builder.verify import verify
from calibration.config import Accuracy
from plugins.common.errors import UserError


def evaluate(
    artifact: Path, model: str | None, data: str | None, samples: int | None, tasks: tuple[str, ...], console: Console
) -> dict[str, Any]:
    """The accuracy block of an engine, on the build's own text and against its own dense model unless named."""
    engine, built = _engine(artifact), _recipe(artifact)
    config = built.accuracy if built else Accuracy()
    config = config.model_copy(
        update={"data": data or config.data, "samples": samples or config.samples, "tasks": tasks}
    )
    if config.data is None:
        raise UserError("no text to evaluate on: give it with --data")
    return measure.accuracy(_dense(built, model), engine, config, console.progress)


def benchmark_config(input_tokens: int, output_tokens: int, concurrency: str, requests: int, rounds: int) -> Benchmark:
    """The command line's workload. Raises UserError for a concurrency that is not a list of numbers."""
    try:
        levels = tuple(int(level) for level in concurrency.split(","))
        workload = Workload(
            input_tokens=input_tokens, output_tokens=output_tokens, concurrency=levels, requests=requests
        )
        if min(levels) < 1:
            raise ValueError
        return Benchmark(workloads=(workload,), rounds=rounds)
    except ValueError:
        raise UserError(
            f"--concurrency '{concurrency}', --input-tokens {input_tokens}, --output-tokens {output_tokens}, "
            f"--requests {requests}, --rounds {rounds}: each must be 1 or more, for example --concurrency 1,8"
        ) from None


def bench(
    artifact: Path, model: str | None, baseline: Path | None, config: Benchmark, out: Path | None, console: Console
) -> list[dict[str, Any]]:
    """Measures an engine in process against the dense model or the engine of `baseline`, another build.

    Writes the raw records into `out`. Raises UserError for a baseline that is a build of another model.
    """
    engine = _engine(artifact)
    version_lock.require(engine)
    other = None if baseline is None else _baseline_engine(artifact, baseline, model)
    dense = _dense(_recipe(artifact), model)
    with _folder(out) as place:
        return measure.performance(dense, engine, config, place, console.progress, other)


def bench_endpoints(
    artifact: Path, model: str | None, baseline: Path | None, config: Benchmark, url: str, dense_url: str | None,
    out: Path | None, console: Console,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measures two OpenAI-compatible endpoints; writes the raw records into `out`."""
    if baseline is not None:
        raise UserError(
            f"--baseline '{baseline}' excludes --url: serve that build, and give its endpoint with --dense-url"
        )
    if dense_url is None:
        raise UserError(f"--url '{url}' is measured against the dense baseline: give its endpoint with --dense-url")
    with _folder(out) as place:
        return measure.endpoints(dense_url, url, _dense(_recipe(artifact), model), config, place, console.progress)


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """`out`, or a temporary directory."""
    with tempfile.TemporaryDirectory() as scratch:
        place = out or Path(scratch)
        place.mkdir(parents=True, exist_ok=True)
        yield place


def _baseline_engine(artifact: Path, baseline: Path, model: str | None) -> Path:
    """The engine of the build that --baseline names. Raises UserError where no comparison with it is fair."""
    if model is not None:
        raise UserError(f"--baseline '{baseline}' and --model '{model}' exclude each other: give one of them")
    engine = _engine(baseline)
    version_lock.require(engine)
    digests = {source_digest(each, "model") for each in (artifact, baseline)}
    if len(digests) > 1 or None in digests:
        raise UserError(
            f"--baseline '{baseline}' and '{artifact}' are not builds of the same model",
            "build both from one model",
        )
    return engine


def build_engine(
    checkpoint: Path, out: Path, backend: str, overrides: tuple[str, ...], gpu: str, console: Console
) -> dict[str, Any]:
    """Builds an engine from a checkpoint directory, of either format. Raises UserError where no backend can."""
    from builder import checkpoint as checkpoints
    from builder.engines import registry

    started = now()
    opened = checkpoints.read(checkpoint)
    verify(checkpoint, progress=console.progress).require()
    config = _engine_config(opened, overrides)
    backend = _backend_of(opened, backend, config)
    with claimed(out) as place, tempfile.TemporaryDirectory(dir=place.parent, prefix=".engine-") as scratch:
        folder = Path(scratch) / "checkpoints"
        folder.mkdir()
        (folder / opened.kind).symlink_to(checkpoint.resolve())
        engine = Path(scratch) / "engine"
        registry.build(backend, folder, engine, config, gpu, console.progress)
        facts = registry.engine_facts(engine)
        manifest = make_manifest(
            sha256_tree(engine),
            recipe={"engine": config.model_dump(mode="json")},
            tools=machine.versions(),
            gpu=machine.gpu(),
            sources={"checkpoint": checkpoints.digest(checkpoint)},
            stages=[],
            started=started,
            finished=now(),
        )
        publish({path.name: path for path in engine.iterdir()}, place, {MANIFEST: as_bytes(manifest)})
    return facts


def _engine_config(checkpoint: Checkpoint, overrides: tuple[str, ...]) -> EngineConfig:
    """The engine section: a checkpoint that is split already sets the number of ranks, where the user does not."""
    config = recipe.load("any/model", overrides=[f"engine.{override}" for override in overrides]).engine
    if checkpoint.kind == "hf":
        return config
    split = {"tensor_parallel": checkpoint.mapping.tp, "pipeline_parallel": checkpoint.mapping.pp}
    return config.model_copy(update={key: n for key, n in split.items() if key not in config.model_fields_set})


def _backend_of(source: Checkpoint, requested: str, config: EngineConfig) -> str:
    """The backend to build for. Raises UserError where it does not read this kind of checkpoint."""
    can_read = ("tensorrt",) if source.kind == "trtllm" else ("pytorch", "torch")
    if requested not in ("auto", *can_read):
        kinds = {"hf": "a unified Hugging Face", "trtllm": "a TensorRT-LLM"}
        other = next(kind for kind in kinds if kind != source.kind)
        part = {"hf": "checkpoint", "trtllm": "checkpoint-trtllm"}[other]
        raise UserError(
            f"'{source.directory}' is {kinds[source.kind]} checkpoint, and {requested} needs {kinds[other]} one: "
            f"name OUT/{part} of a build for engine.backend={requested}, or use --backend {can_read[0]}"
        )
    parallel = config.tensor_parallel * config.pipeline_parallel
    if requested == "auto" and len(can_read) == 1:
        requested = can_read[0]
    needs = {"kv_cache": source.kv_cache, "parallel": parallel, "features": source.features}
    return pick_backend(requested, source.format, bool(source.sparse_layers), can_read, **needs)[0]


def deploy(build: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Writes build/triton and notes it in the manifest."""
    version_lock.require(build / "engine")
    config = DeployConfig(**options, engine_path="../../engine")
    repository = build / "triton"
    if is_build(build):  # all of its triton/ is ours: the new model replaces the one that the build wrote
        with tempfile.TemporaryDirectory(dir=build.resolve().parent, prefix=f".{build.name}-triton-") as scratch:
            _write_repository(build, Path(scratch) / "triton", config)
            remove(repository)
            (Path(scratch) / "triton").rename(repository)
        record_folder(build, "triton")
    else:
        _write_repository(build, repository, config)
    return {
        "repository": str(repository),
        "model": config.model_name,
        "files": list(sha256_tree(repository)),
        "message": _how_to_start(build, repository, config.model_name),
    }


def _write_repository(build: Path, out: Path, config: DeployConfig) -> None:
    """The build's engine; with the dense model and a router in front of both, where the build has one."""
    from builder.deploy.repository import write_repository
    from builder.deploy.routed_repository import write_routed_repository

    engine, router = build / "engine", build / "routing"
    if not router.is_dir():
        write_repository(engine, out, config)
        return
    routed = config.model_copy(update={"router_path": "../../routing", "shadow": shadow_share(router)})
    built = _recipe(build)
    assert built is not None
    assert built.routing is not None, "only a build with a routing section has a router"
    other = reference_engine(built.routing, source_digest(build, "model"))
    write_routed_repository(engine, other or _dense(built, None), router, out, routed)


def _how_to_start(build: Path, repository: Path, model: str) -> str:
    if (repository / "make_repository.py").is_file():
        return f"run {repository}/make_repository.py in NVIDIA's Triton container (see docs/deploy.md)"
    return f"{repository} serves '{model}': start it with twofour serve {build}"


def _engine(artifact: Path) -> Path:
    """The engine directory that `artifact` is or holds. Raises UserError where it is neither."""
    for place in (artifact, artifact / "engine"):
        if (place / "engine.json").is_file():
            return place
    raise UserError(f"'{artifact}' is neither a build nor an engine: give the --out of twofour build or twofour engine")


def _recipe(artifact: Path) -> recipe.Recipe | None:
    """The recipe in a build; None for an engine outside a build."""
    path = artifact / "recipe.yaml"
    return recipe.load(str(path)) if path.is_file() else None


def _dense(built: recipe.Recipe | None, model: str | None) -> Path:
    if model is not None:
        return find_model(model)
    if built is None:
        raise UserError("an engine does not record its dense model: give it with --model")
    return find_model(built.model, built.revision)
