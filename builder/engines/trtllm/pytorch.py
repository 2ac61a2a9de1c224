"""The pytorch backend: TensorRT-LLM from 1.0 on, without TensorRT. Nothing is compiled: a checkpoint is served.

    engine/
      config.json  model*.safetensors  hf_quant_config.json  tokenizer files     the unified checkpoint, linked
      twofour_sparse/{__init__.py, layers.json}      the model again, with sparse layers (`--custom_module_dirs`)
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

from builder.artifacts.filesystem import write_json
from builder.checkpoint import Checkpoint, read
from builder.engines.base import EngineConfig
from builder.engines.trtllm import artifact, launch, version_lock
from builder.hardware.nvidia_smi import gpus
from builder.planning import compatibility
from calibration.quantization.trtllm_config import for_transformers_4
from plugins.common.errors import UserError

MODULE = "twofour_sparse"
MODEL_MODULE = {  # architecture -> module of tensorrt_llm._torch.models that defines it
    "LlamaForCausalLM": "modeling_llama",
    "MistralForCausalLM": "modeling_mistral",
    "Qwen2ForCausalLM": "modeling_qwen",
    "Qwen3ForCausalLM": "modeling_qwen3",
}

_UNMEASURED = (
    "the sparse kernels were not timed: the skinny one takes few tokens, cuSPARSELt more; TensorRT-LLM's log says how "
    "many layers run on them when it loads the engine"
)

# The class must be defined here, under this package's name: workers import the class by where it is defined.
_INIT_PY = '''\
"""{architecture} once more, with this engine's 2:4 layers on sparse kernels. TensorRT-LLM imports this package."""

from pathlib import Path

from tensorrt_llm._torch.models import {module}
from tensorrt_llm._torch.models.modeling_utils import register_auto_model

from plugins.tensorrt_llm.pytorch_backend import SparseLinears


@register_auto_model("{architecture}")
class {architecture}(SparseLinears, {module}.{architecture}):
    layers_file = Path(__file__).with_name("layers.json")
'''


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
    found = read(checkpoint)
    _check(found, config)
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(checkpoint.iterdir()):
        if path.suffix == ".safetensors":
            _link(path, out / path.name)
        elif path.name in ("hf_quant_config.json", "model.safetensors.index.json", "sparsity.json"):
            shutil.copyfile(path, out / path.name)
    write_json(out / "config.json", for_transformers_4(found.config))
    artifact.copy_tokenizer(checkpoint, out)
    if found.sparse_layers:
        _write_module(out / MODULE, found, tactics)
    if tactics is not None:
        write_json(out / "tactics.json", tactics)
    artifact.write_llm_args(out, config, "pytorch", found.kv_cache)
    remarks = [_UNMEASURED] if found.sparse_layers and (tactics is None or tactics["source"] != "measured") else []
    artifact.write_facts(out, "pytorch", found.format, found.kv_cache, checkpoint, config, remarks)
    here = version_lock.current("pytorch")
    version_lock.write(out, here)
    sparse = bool(found.sparse_layers)
    launch.write(out, config, _serve(config, sparse), here.container, "pytorch", modules=sparse, preload=False)


def _check(found: Checkpoint, config: EngineConfig) -> None:
    if found.kind != "hf":
        raise UserError(
            f"'{found.directory}' is a TensorRT-LLM checkpoint: name the unified one beside it (checkpoint)"
        )
    device = gpus()[0] if gpus() else None
    compatibility.check_architecture(found.architecture.name, "pytorch").require()
    compatibility.check(
        found.format,
        bool(found.sparse_layers),
        "pytorch",
        device.sm if device else None,
        kv_cache=found.kv_cache,
        parallel=config.tensor_parallel * config.pipeline_parallel,
        tensorrt_llm=version_lock.installed("tensorrt_llm"),
    ).require()
    compatibility.check_shards(found.layers(), config.tensor_parallel).require()
    sizes = (found.architecture.num_heads, found.architecture.num_blocks)
    compatibility.check_mapping(*sizes, config.tensor_parallel, config.pipeline_parallel, "pytorch").require()


def _write_module(directory: Path, found: Checkpoint, tactics: Mapping[str, Any] | None) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    architecture = found.architecture.name
    page = _INIT_PY.format(architecture=architecture, module=MODEL_MODULE[architecture])
    (directory / "__init__.py").write_text(page, encoding="utf8")
    layers = {name: _choices(tactics, name) for name in found.sparse_layers}
    write_json(directory / "layers.json", {"layers": layers})


def _choices(tactics: Mapping[str, Any] | None, layer: str) -> list[tuple[int, str]] | None:
    """(tokens, kernel) of a layer that was measured; None where nothing was."""
    if tactics is None or tactics["source"] != "measured" or layer not in tactics["layers"]:
        return None
    return [(bucket["tokens"], bucket["kernel"]) for bucket in tactics["layers"][layer]["buckets"]] or None


def _serve(config: EngineConfig, sparse: bool) -> list[str]:
    words = ["trtllm-serve", "$engine", "--backend", "pytorch"]
    words += ["--tp_size", str(config.tensor_parallel), "--pp_size", str(config.pipeline_parallel)]
    words += ["--custom_module_dirs", f"$engine/{MODULE}"] if sparse else []
    return [*words, "--extra_llm_api_options", "$engine/llm_args.yaml"]


def _link(source: Path, target: Path) -> None:
    """The same bytes under a second name; a copy where the disks differ."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
