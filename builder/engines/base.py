"""What every backend offers: requests in, tokens out, and the logits that evaluation reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field

from builder.engines.request import Request, Token
from plugins.common.config import Config

if TYPE_CHECKING:
    import torch

__all__ = ["Backend", "Engine", "EngineConfig", "Request", "Token"]

Backend = Literal["auto", "tensorrt", "pytorch", "torch"]


class EngineConfig(Config):
    """The engine and its limits."""

    backend: Backend = "auto"
    """`auto` takes the first of tensorrt, pytorch and torch that runs here, and prints which."""
    max_batch_size: int = Field(default=64, ge=1)
    """Requests that run together."""
    max_seq_len: int = Field(default=2048, ge=2)
    """Tokens of a request, prompt and answer; cut to what the model's positions allow."""
    max_num_tokens: int = Field(default=8192, ge=1)
    """Tokens of one iteration, over all requests."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs that each layer is split over."""
    pipeline_parallel: int = Field(default=1, ge=1)
    """GPUs that the blocks are spread over."""
    cuda_graphs: bool = True
    """Replay decode steps from CUDA graphs."""
    chunked_prefill: bool = False
    """Split long prompts over iterations."""
    kv_cache_block_reuse: bool = True
    """Share the KV cache of common prompt prefixes (TensorRT-LLM)."""


class Engine(Protocol):
    """A loaded engine. `add` and `step` let a driver or a server schedule; `generate` is the plain loop over them."""

    backend: str

    def logits(self, input_ids_BT: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, vocabulary] float32 of token ids [B, T] int64, with no cache."""

    def add(self, request: Request) -> None:
        """Queues a request. Raises UserError where it cannot fit `max_seq_len`."""

    def step(self) -> list[Token]:
        """Runs one iteration of the running batch and returns what it produced."""

    @property
    def busy(self) -> bool:
        """Whether any request is queued or running."""

    def describe(self) -> dict[str, Any]:
        """How it runs; `remarks` is what a reader of its measurements should know, a sentence each."""

    def generate(self, requests: Iterable[Request]) -> Iterator[Token]:
        """Streams the tokens of all requests, in the order they become ready."""
