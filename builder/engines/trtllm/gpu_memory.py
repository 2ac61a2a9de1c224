"""How much GPU memory an engine takes, estimated before it is built, and whether this machine's GPUs have it.

An estimate, not a measurement: weights as stored, a full KV cache, activations of the largest batch, the runtime's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from builder.config import EngineConfig
from plugins.common.errors import UserError
from plugins.common.nvidia_smi import Gpu

RUNTIME_BYTES = 1 << 30  # CUDA context, cuBLAS and NCCL workspaces, CUDA graphs: what idle TensorRT-LLM processes hold
BUILD_COPIES = 2  # while TensorRT builds, the weights are there as network constants and as candidates' own layout
GIB = 1 << 30


@dataclass(frozen=True)
class Estimate:
    """Bytes on one GPU. `kv_cache` is what the largest batch at full length takes; serving may give it less."""

    weights: int
    kv_cache: int
    activations: int
    runtime: int = RUNTIME_BYTES

    @property
    def least(self) -> int:
        """The least memory to run: everything but the KV cache, which shrinks to the remainder."""
        return self.weights + self.activations + self.runtime

    @property
    def total(self) -> int:
        return self.least + self.kv_cache


def estimate(model: Mapping[str, Any], weight_bytes: int, kv_cache: str, config: EngineConfig) -> Estimate:
    """The memory of one rank. `model` is a `config.json` of either checkpoint, `weight_bytes` the whole model's."""
    ranks = config.tensor_parallel * config.pipeline_parallel
    hidden, heads = int(model["hidden_size"]), int(model["num_attention_heads"])
    head_size = int(model.get("head_size") or model.get("head_dim") or hidden // heads)
    kv_values = 2 * int(model["num_hidden_layers"]) * int(model.get("num_key_value_heads") or heads) * head_size
    intermediate = int(model.get("intermediate_size") or 4 * hidden) // config.tensor_parallel
    return Estimate(
        weights=weight_bytes // ranks,
        kv_cache=kv_values * (2 if kv_cache == "none" else 1) * config.max_batch_size * config.max_seq_len // ranks,
        activations=config.max_num_tokens * 2 * (4 * hidden + 2 * intermediate)  # 16 bit, a handful of buffers
        + 4 * config.max_batch_size * int(model.get("vocab_size") or 0),
    )


def require(need: Estimate, gpus: Sequence[Gpu], ranks: int, building: bool = False) -> None:
    """Raises UserError where a GPU lacks the memory, or there are fewer GPUs than ranks.

    `building` counts what TensorRT holds on top while it builds; several ranks may then share a GPU.
    """
    if not building and len(gpus) < ranks:
        raise UserError(
            f"the engine needs {ranks} GPUs and this machine has {len(gpus)}: build it with a smaller "
            "engine.tensor_parallel, or start it under Slurm"
        )
    least = need.least + (BUILD_COPIES - 1) * need.weights * building
    for number, gpu in enumerate(gpus[:ranks]):
        if gpu.memory_free < least:
            raise UserError(
                f"GPU {number} ({gpu.name}) has {gpu.memory_free / GIB:.1f} GiB free and the engine needs about "
                f"{least / GIB:.1f} GiB (weights {need.weights / GIB:.1f}): lower engine.max_num_tokens, quantize, or "
                "raise engine.tensor_parallel"
            )
