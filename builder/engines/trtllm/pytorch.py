"""The pytorch backend: TensorRT-LLM from 1.0 on, without TensorRT. Nothing is compiled: a checkpoint is served.

    engine/
      config.json  model*.safetensors  hf_quant_config.json  tokenizer files     the unified checkpoint, linked
      twofour_sparse/                                the model again, with sparse layers (trtllm/sparse_package.py)
      llm_args.yaml  launch/                         how to serve it
      engine.json  lock.json  sparsity.json

A dense checkpoint has no twofour_sparse/: TensorRT-LLM serves it alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder.checkpoint import Checkpoint, read
from builder.config import EngineConfig
from builder.engines.trtllm import artifact, hf_config, launch, sparse_package, version_lock
from builder.planning import compatibility, sharding
from calibration.data.tokenizer_files import copy_tokenizer
from plugins.common.errors import UserError
from plugins.common.json_files import write_json
from plugins.common.nvidia_smi import gpus
from plugins.tensorrt_llm import releases

_UNMEASURED = (
    "the sparse kernels were not timed: the skinny one runs at few tokens, cuSPARSELt at more; TensorRT-LLM's log "
    "counts the layers that run on them when it loads the engine"
)


def build(
    checkpoint: Path,
    out: Path,
    config: EngineConfig,
    *,
    tactics: Mapping[str, Any] | None = None,
) -> None:
    """Writes the engine directory from a unified Hugging Face checkpoint. Needs neither a GPU nor TensorRT-LLM.

    `tactics` is kept as tactics.json; where it was measured, it also chooses the kernels, else the skinny one takes few
    tokens and cuSPARSELt more. Raises UserError where the PyTorch backend cannot serve the checkpoint.
    """
    opened = read(checkpoint)
    _check(opened, config)
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(checkpoint.iterdir()):
        if path.suffix == ".safetensors":
            _link(path, out / path.name)
        elif path.name in ("model.safetensors.index.json", "sparsity.json"):
            shutil.copyfile(path, out / path.name)
    hf_config.write(out, opened)
    copy_tokenizer(checkpoint, out)
    if opened.whole_sparse_layers:
        sparse_package.write(out, opened, tactics)
    if tactics is not None:
        write_json(out / "tactics.json", tactics)
    artifact.write_llm_args(out, config, "pytorch", opened.kv_cache)
    measured = tactics is not None and tactics["source"] == "measured"
    remarks = [_UNMEASURED] if opened.whole_sparse_layers and not measured else []
    if hybrid := opened.declaration.hybrid:
        remarks.append(f"{len(hybrid)} layers are 2:4 in part and run dense: this backend's kernels take whole layers")
    version = version_lock.installed("tensorrt_llm")
    if version is not None and releases.is_newer(version):
        remarks.append(releases.caution(version))
    artifact.write_facts(out, "pytorch", opened.format, opened.kv_cache, checkpoint, config, remarks)
    here = version_lock.current("pytorch")
    version_lock.write(out, here)
    sparse = bool(opened.whole_sparse_layers)
    launch.write(out, config, _serve(config, sparse), here.container, "pytorch", modules=sparse, preload=False)


def _check(checkpoint: Checkpoint, config: EngineConfig) -> None:
    if checkpoint.kind != "hf":
        raise UserError(
            f"'{checkpoint.directory}' is a TensorRT-LLM checkpoint: give the unified one next to it (checkpoint)"
        )
    device = gpus()[0] if gpus() else None
    compatibility.check_architecture(checkpoint.architecture.name, "pytorch").require()
    compatibility.check(
        checkpoint.format,
        bool(checkpoint.whole_sparse_layers),
        "pytorch",
        device.sm if device else None,
        kv_cache=checkpoint.kv_cache,
        parallel=config.tensor_parallel * config.pipeline_parallel,
        features=checkpoint.features,
        tensorrt_llm=version_lock.installed("tensorrt_llm"),
    ).require()
    sharding.check_shards(checkpoint.shapes(), config.tensor_parallel).require()
    sizes = (checkpoint.architecture.num_heads, checkpoint.architecture.num_blocks)
    sharding.check_mapping(*sizes, config.tensor_parallel, config.pipeline_parallel, "pytorch").require()


def _serve(config: EngineConfig, sparse: bool) -> list[str]:
    program = ["python3", "-m", sparse_package.NAME] if sparse else ["trtllm-serve"]
    ranks = ["--tp_size", str(config.tensor_parallel), "--pp_size", str(config.pipeline_parallel)]
    return [*program, "$engine", "--backend", "pytorch", *ranks, "--extra_llm_api_options", "$engine/llm_args.yaml"]


def _link(source: Path, target: Path) -> None:
    """The same bytes under a second name; a copy where the disks differ."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
