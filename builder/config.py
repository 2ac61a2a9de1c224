"""The recipe's `engine:` section and the options of `twofour deploy`. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from plugins.common.config_base import Config, Memory

Backend = Literal["auto", "tensorrt", "pytorch", "torch"]


class EngineConfig(Config):
    """The engine and its limits."""

    backend: Backend = "auto"
    """`auto` selects the first of tensorrt, pytorch and torch that runs on this machine, and prints it."""
    max_batch_size: int = Field(default=64, ge=1)
    """Maximum requests that run together."""
    max_seq_len: int = Field(default=2048, ge=2)
    """Maximum tokens of a request, prompt and answer; limited to the model's positions."""
    max_num_tokens: int = Field(default=8192, ge=1)
    """Maximum tokens of one iteration, over all requests."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Number of GPUs to split each layer over."""
    pipeline_parallel: int = Field(default=1, ge=1)
    """Number of GPUs to distribute the blocks over."""
    cuda_graphs: bool = True
    """Replay decode steps from CUDA graphs."""
    chunked_prefill: bool = False
    """Split long prompts over several iterations."""
    kv_cache_memory: Memory | None = None
    """KV cache memory per device: an amount, or a share of the memory that is free when the engine opens; at most what
    `max_batch_size` sequences of `max_seq_len` tokens need. null: 45% in the torch engine, so that a dense baseline
    fits next to it; 90% in TensorRT-LLM."""
    kv_cache_block_reuse: bool = True
    """Share the KV cache blocks of common prompt prefixes."""
    kv_cache_budget: int | None = Field(default=None, ge=256, multiple_of=64)
    """Tokens per sequence in the KV cache; the least attended are evicted (docs/accuracy.md). null: all."""


class DeployConfig(Config):
    """The options of `twofour deploy`."""

    model_name: str = "llm"
    streaming: bool | None = None  # None: yes without a response cache; Triton cannot combine them
    response_cache: bool = False
    dynamic_batching: bool = False  # send requests to the engine in groups; it batches continuously either way
    max_queue_delay_microseconds: int = Field(default=0, ge=0)  # how long dynamic batching waits for a group
    max_queue_size: int = Field(default=0, ge=0)  # requests that may wait behind the running batch; 0: no limit
    max_tokens: int = Field(default=64, ge=1)  # default for a request without max_tokens
    engine_path: str | None = None  # as in config.pbtxt, relative to the model's directory; None: computed
    shadow: float = 0.01  # of a router: share of the requests that both engines score
    router_path: str | None = None  # as engine_path
