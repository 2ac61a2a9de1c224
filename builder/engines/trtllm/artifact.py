"""The files that TensorRT-LLM's two backends share in an engine directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from builder.checkpoint import digest
from builder.config import EngineConfig
from builder.hardware import machine
from builder.planning.kv_capacity import SHARES, SINKS
from plugins.common.json_files import write_json


def weight_bytes(checkpoint: Path) -> int:
    """Bytes of all safetensors files of a checkpoint."""
    return sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))


def write_facts(
    out: Path,
    backend: str,
    number_format: str,
    kv_cache: str,
    checkpoint: Path,
    config: EngineConfig,
    remarks: Sequence[str],
    reuse: bool = True,
) -> None:
    """Writes `engine.json`, the engine's facts. A build's report shows `remarks`.

    `reuse` is whether the engine can use blocks of its KV cache again at all.
    """
    write_json(
        out / "engine.json",
        {
            "backend": backend,
            "format": number_format,
            "kv_cache": kv_cache,
            "checkpoint_sha256": digest(checkpoint),
            "versions": machine.versions("tensorrt-llm", "tensorrt", "torch", "twofour"),
            "max_batch_size": config.max_batch_size,
            "max_seq_len": config.max_seq_len,
            "max_num_tokens": config.max_num_tokens,
            "tensor_parallel": config.tensor_parallel,
            "pipeline_parallel": config.pipeline_parallel,
            "chunked_prefill": config.chunked_prefill,
            "kv_cache_block_reuse": config.kv_cache_block_reuse and reuse and config.kv_cache_budget is None,
            "kv_cache_memory": config.kv_cache_memory,
            "kv_cache_budget": config.kv_cache_budget,
            "remarks": list(remarks),
        },
    )


def llm_args(config: EngineConfig, backend: str, kv_cache: str, reuse: bool = True) -> dict[str, Any]:
    """LlmArgs fields for `--extra_llm_api_options`: the recipe's keys, and none that only some releases know.

    `reuse` is whether the engine can use blocks of its KV cache again at all.
    """
    cache: dict[str, Any] = {
        "enable_block_reuse": config.kv_cache_block_reuse and reuse,
        "free_gpu_memory_fraction": SHARES[backend],
    }
    if isinstance(config.kv_cache_memory, float):
        cache["free_gpu_memory_fraction"] = config.kv_cache_memory
    elif config.kv_cache_memory:
        cache["max_gpu_total_bytes"] = config.kv_cache_memory
    if backend == "pytorch" and kv_cache != "none":
        cache["dtype"] = kv_cache  # a TensorRT engine has its cache's dtype built in, and refuses the key
    args: dict[str, Any] = {
        "tensor_parallel_size": config.tensor_parallel,
        "pipeline_parallel_size": config.pipeline_parallel,
        "max_batch_size": config.max_batch_size,
        "max_seq_len": config.max_seq_len,
        "max_num_tokens": config.max_num_tokens,
        "enable_chunked_prefill": config.chunked_prefill,
        "kv_cache_config": cache,
    }
    if config.kv_cache_budget is not None:
        cache["enable_block_reuse"] = False
        if backend == "pytorch":  # RocketKV, Behnam et al., arXiv 2502.14051
            args["sparse_attention_config"] = {"algorithm": "rocket", "prompt_budget": config.kv_cache_budget}
        else:  # StreamingLLM, Xiao et al., arXiv 2309.17453
            cache["max_attention_window"], cache["sink_token_length"] = [config.kv_cache_budget], SINKS
    if backend == "pytorch" and not config.cuda_graphs:
        args["cuda_graph_config"] = None  # on by default; null is off
    return args


def write_llm_args(out: Path, config: EngineConfig, backend: str, kv_cache: str, reuse: bool = True) -> None:
    text = yaml.safe_dump(llm_args(config, backend, kv_cache, reuse), sort_keys=False)
    (out / "llm_args.yaml").write_text(text, encoding="utf8")
