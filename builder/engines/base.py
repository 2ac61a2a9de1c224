"""What every backend offers: requests in, tokens out, and the logits that evaluation reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from plugins.common.request import Request, Token

if TYPE_CHECKING:
    import torch

__all__ = ["Engine", "Request", "Token"]


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
