"""Triton repositories for TensorRT-LLM's own backends, made inside NVIDIA's container from the container's templates.

A repository's preprocessing, batching and postprocessing models belong to one release of TensorRT-LLM, so none is
written here: this module writes the program that takes them from the container that serves and fills in this engine.
It has never run there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from builder.config import DeployConfig
from builder.deploy.rendering import TEMPLATE_DIRECTORY, relative, replace
from builder.planning.kv_capacity import SHARES
from plugins.common.errors import UserError
from plugins.common.templates import render

TEMPLATES = {"tensorrt": "inflight_batcher_llm", "pytorch": "llmapi"}
"""The folder of the container's all_models for each backend."""

PROGRAM = "make_repository.py"


def write_repository(engine_dir: Path, engine: dict[str, Any], out: Path, config: DeployConfig) -> None:
    """Writes `out/make_repository.py` for the engine whose engine.json is `engine`.

    Raises UserError for options that only the torch engine's repository has.
    """
    for option in ("response_cache", "dynamic_batching"):
        if getattr(config, option):
            raise UserError(
                f"{option} is for torch engines, and '{engine_dir}' is a {engine['backend']} engine: drop the option"
            )
    streaming = config.streaming is not False
    page = render(
        TEMPLATE_DIRECTORY,
        PROGRAM,
        backend=engine["backend"],
        templates=TEMPLATES[engine["backend"]],
        engine_path=_engine_path(engine_dir, out, config),
        decoupled=str(streaming).lower(),
        values=holes(engine, streaming, config) if engine["backend"] == "tensorrt" else {},
    )
    replace(out / PROGRAM, page)


def _engine_path(engine_dir: Path, out: Path, config: DeployConfig) -> str:
    """The engine's path relative to `out`; the option is relative to a model's directory in it."""
    if config.engine_path is None:
        return relative(engine_dir, out, out.parent)
    return os.path.normpath(os.path.join(config.model_name, config.engine_path))


def holes(engine: dict[str, Any], streaming: bool, config: DeployConfig) -> dict[str, str]:
    """Values for the placeholders of the inflight batcher's config.pbtxt files, by TensorRT-LLM's names."""
    return {
        "triton_backend": "tensorrtllm",
        "triton_max_batch_size": str(engine["max_batch_size"]),
        "decoupled_mode": str(streaming),
        "batching_strategy": "inflight_fused_batching",
        "max_queue_delay_microseconds": str(config.max_queue_delay_microseconds),
        "max_queue_size": str(config.max_queue_size),
        "preprocessing_instance_count": "1",
        "postprocessing_instance_count": "1",
        "bls_instance_count": "1",
        "logits_datatype": "TYPE_FP32",
        "encoder_input_features_data_type": "TYPE_FP16",
        "prompt_embedding_table_data_type": "TYPE_FP16",
        "exclude_input_in_output": "True",
        "enable_chunked_context": str(engine.get("chunked_prefill", False)),
        "enable_kv_cache_reuse": str(engine.get("kv_cache_block_reuse", True)),
        "kv_cache_free_gpu_mem_fraction": str(_kv_cache_share(engine)),
    }


def _kv_cache_share(engine: dict[str, Any]) -> float:
    """The batcher takes a share. Raises UserError for an amount."""
    memory = engine.get("kv_cache_memory")
    if isinstance(memory, int):
        raise UserError(
            f"engine.kv_cache_memory is {memory / 1e6:g} MB, and Triton's tensorrtllm backend takes a share",
            "set a share such as 80% and build the engine again",
        )
    return memory or SHARES["tensorrt"]
