"""The tensorrt backend: TensorRT-LLM checkpoint -> engine, with TensorRT-LLM 1.0 to 1.2.

    engine/
      engine.json  lock.json            the engine's facts, and the versions it may run with
      build_config.json  build.sh       the same build by hand, with trtllm-build
      hooks/{models.py, routes.json}    the model class that swaps layers for our plugin, and which layers
      launch/  llm_args.yaml            how to serve it; tokenizer files
      rank{r}.engine  config.json       TensorRT-LLM's own, once built
      build-rank{r}.log  inspector-rank{r}.json  sparsity_log.json  tactics.json      what TensorRT picked

`prepare` writes all that needs no GPU and no TensorRT-LLM; `build` does the rest.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path, PurePath

from builder.checkpoint import Description, read
from builder.config import EngineConfig
from builder.engines import measured_tactics
from builder.engines.trtllm import artifact, gpu_memory, launch, rank_processes, sparsity_report, version_lock
from builder.engines.trtllm import checkpoint as trtllm_checkpoint
from builder.engines.trtllm.build_config import HOOKS, MODEL_CLASS, build_command, build_config, pages_context, routes
from builder.planning import compatibility
from calibration.data.tokenizer_files import copy_tokenizer
from plugins.common.errors import UserError
from plugins.common.families import FAMILIES
from plugins.common.formats import OF_DTYPE
from plugins.common.json_files import write_json
from plugins.common.nvidia_smi import gpus
from plugins.common.progress import Progress
from plugins.common.templates import render
from plugins.libtwofour import bindings
from plugins.tensorrt_llm import releases
from plugins.tensorrt_llm.log import Status

__all__ = ["build", "build_command", "build_config", "prepare", "routes"]


def prepare(
    checkpoint: Path,
    out: Path,
    config: EngineConfig,
    *,
    tokenizer: Path | None = None,
    ratios: Mapping[str, float] | None = None,
) -> list[str]:
    """Writes into `out` all that needs no GPU, and returns the build command.

    `tokenizer` is a directory with tokenizer files, by default the unified checkpoint next to it. Raises UserError
    where the checkpoint cannot become this engine.
    """
    opened = trtllm_checkpoint.read(checkpoint)
    _check(opened, config)
    return _prepare(opened, out, config, routes(opened, ratios), tokenizer)


def build(
    checkpoint: Path,
    out: Path,
    config: EngineConfig,
    *,
    tokenizer: Path | None = None,
    ratios: Mapping[str, float] | None = None,
    plugin: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Builds the engine, one process a rank, and writes what TensorRT picked into tactics.json.

    First every 2:4 layer is left to TensorRT, which times its own sparse tactics. Where it picks none and our kernels
    measure faster (`ratios`, dense over sparse; measured here where not given), the engine is built again with those
    layers on `plugin`, our TensorRT plugin library. INT8 layers, for which TensorRT has no such tactic, go there first.

    Raises UserError, before the build for what is missing (TensorRT-LLM, a GPU, memory, the library), after it for the
    rank that failed, with the cause.
    """
    opened = trtllm_checkpoint.read(checkpoint)
    _check(opened, config)
    _require_machine(opened, config)
    given = ratios is not None
    plugin = plugin or _installed_plugin()
    if ratios is None:
        out_dtype = OF_DTYPE[opened.architecture.dtype]
        ratios = measured_tactics.measure(read(checkpoint).shapes(), config, out_dtype) if plugin else {}
    chosen = routes(opened, ratios if given or opened.format == "int8" else None)
    status = _build_ranks(opened, out, config, chosen, tokenizer, plugin, progress)
    better = routes(opened, ratios, [layer for layer, word in status.items() if word == "picked"])
    if "plugin" in better.values() and chosen != better and not given:
        chosen = better
        _build_ranks(opened, out, config, chosen, tokenizer, plugin, progress)
    version_lock.write(out, version_lock.current("tensorrt", plugin if "plugin" in chosen.values() else None))
    remarks = [*sparsity_report.remarks(out), *_remarks(opened, config, timed=bool(ratios))]
    reuse = pages_context(opened)
    artifact.write_facts(out, "tensorrt", opened.format, opened.kv_cache, checkpoint, config, remarks, reuse)


def _remarks(opened: Description, config: EngineConfig, timed: bool) -> list[str]:
    remarks = []
    if opened.whole_sparse_layers and not timed:
        remarks.append(
            "our plugin's kernels were not timed against TensorRT's here: every 2:4 layer was left to TensorRT"
        )
    if config.kv_cache_block_reuse and not pages_context(opened):
        remarks.append(f"KV-cache blocks are not used again: TensorRT-LLM cannot with this {opened.kv_cache} KV cache")
    return remarks


def _prepare(
    opened: Description, out: Path, config: EngineConfig, chosen: Mapping[str, str], tokenizer: Path | None
) -> list[str]:
    settings = build_config(opened, config, chosen)
    (out / HOOKS).mkdir(parents=True, exist_ok=True)
    if chosen:
        base = FAMILIES[opened.architecture.name].trtllm.tensorrt_class
        # trtllm-build loads this file under the name `models`, and its workers import it again by that name
        page = render(launch.TEMPLATE_DIRECTORY, "models.py", base=base, name=MODEL_CLASS)
        (out / HOOKS / "models.py").write_text(page, encoding="utf8")
        write_json(out / HOOKS / "routes.json", {"layers": chosen})
        shutil.copyfile(opened.directory / "sparsity.json", out / "sparsity.json")
    write_json(out / "build_config.json", settings)
    copy_tokenizer(tokenizer or _tokenizer(opened.directory), out)
    artifact.write_llm_args(out, config, "tensorrt", opened.kv_cache, reuse=pages_context(opened))
    preload = "plugin" in chosen.values()
    launch.write(out, config, _serve(config), releases.CONTAINER, "tensorrt", modules=False, preload=preload)
    by_hand = build_command(PurePath("$checkpoint"), PurePath("$engine"), config, bool(chosen), settings)
    script = out / "build.sh"
    page = render(
        launch.TEMPLATE_DIRECTORY, "build.sh", container=releases.CONTAINER, hooks=HOOKS, command=launch.shell(by_hand)
    )
    script.write_text(page, encoding="utf8")
    script.chmod(0o755)
    return build_command(opened.directory, out, config, bool(chosen), settings)


def _build_ranks(
    opened: Description,
    out: Path,
    config: EngineConfig,
    chosen: Mapping[str, str],
    tokenizer: Path | None,
    plugin: Path | None,
    progress: Progress | None,
) -> dict[str, Status]:
    """Builds all ranks and returns what became of each 2:4 layer."""
    _prepare(opened, out, config, chosen, tokenizer)
    preload = _place_plugin(plugin, out) if "plugin" in chosen.values() else None
    rank_processes.run_ranks(
        [_rank_command(opened.directory, out, rank) for rank in range(opened.ranks)],
        [out / f"build-rank{rank}.log" for rank in range(opened.ranks)],
        [_rank_environment(rank, preload) for rank in range(opened.ranks)],
        "building the TensorRT engine",
        progress,
    )
    return sparsity_report.write(out, opened, read(opened.directory).shapes(), chosen)


def _tokenizer(checkpoint: Path) -> Path:
    """The unified checkpoint next to this one, as builds place them; else this one, which may have a tokenizer."""
    beside = [checkpoint.parent / "hf", checkpoint.resolve().parent / "checkpoint"]
    return next((path for path in beside if path.is_dir()), checkpoint)


def _check(opened: Description, config: EngineConfig) -> None:
    device = gpus()[0] if gpus() else None
    compatibility.check(
        opened.format,
        bool(opened.whole_sparse_layers),
        "tensorrt",
        device.sm if device else None,
        kv_cache=opened.kv_cache,
        parallel=opened.ranks,
        tensorrt_llm=version_lock.installed("tensorrt_llm"),
    ).require()
    if config.chunked_prefill and not pages_context(opened):
        raise UserError(
            f"engine.chunked_prefill is not possible with quantization.kv_cache={opened.kv_cache} and {opened.format} "
            "weights, which TensorRT-LLM does not page for prompts: set it to false, or quantization.kv_cache=none"
        )
    for key, have, want in (
        ("tensor_parallel", opened.mapping.tp, config.tensor_parallel),
        ("pipeline_parallel", opened.mapping.pp, config.pipeline_parallel),
    ):
        if have != want:
            raise UserError(
                f"'{opened.directory.resolve()}' was exported for {key} {have} and engine.{key} is {want}: "
                f"set engine.{key}={have}, or export it again"
            )


def _require_machine(opened: Description, config: EngineConfig) -> None:
    if version_lock.installed("tensorrt_llm") is None:
        raise UserError(
            "engine.backend=tensorrt needs the package tensorrt_llm, which is not installed: run 'twofour engine' "
            f"in the container {releases.CONTAINER}, or use engine.backend=torch"
        )
    if not gpus():
        raise UserError(
            "engine.backend=tensorrt needs a GPU, and there is none: run 'twofour engine' on a machine with one"
        )
    need = gpu_memory.estimate(opened.config, artifact.weight_bytes(opened.directory), opened.kv_cache, config)
    gpu_memory.require(need, gpus(), opened.ranks, building=True)


def _installed_plugin() -> Path | None:
    try:
        return bindings.tensorrt_plugin_path()
    except UserError:
        return None


def _place_plugin(plugin: Path | None, out: Path) -> Path:
    """Copies the plugin library into the engine, where its launch files look for it."""
    if plugin is None or not plugin.is_file():
        raise UserError(
            f"the plugin library {launch.PLUGIN_LIBRARY} is missing{f' at {plugin}' if plugin else ''}: "
            "build it with 'twofour plugins build'"
        )
    return Path(shutil.copyfile(plugin, out / launch.PLUGIN_LIBRARY))


def _rank_command(checkpoint: Path, out: Path, rank: int) -> list[str]:
    program = [sys.executable, "-m", "plugins.tensorrt_llm.build_rank"]
    return [*program, str(checkpoint), str(out), "--rank", str(rank)]


def _rank_environment(rank: int, preload: Path | None) -> dict[str, str]:
    """Each rank sees one GPU: its own where there are enough, for an engine can be built on any GPU of its kind."""
    environment = {"CUDA_VISIBLE_DEVICES": str(rank % len(gpus()))}
    return environment | ({"LD_PRELOAD": str(preload)} if preload else {})


def _serve(config: EngineConfig) -> list[str]:
    # every release accepts "trt": the only name in 1.0, later an alias of "tensorrt"
    command = ["trtllm-serve", "$engine", "--backend", "trt", "--tokenizer", "$engine"]
    command += ["--tp_size", str(config.tensor_parallel), "--pp_size", str(config.pipeline_parallel)]
    return [*command, "--extra_llm_api_options", "$engine/llm_args.yaml"]
