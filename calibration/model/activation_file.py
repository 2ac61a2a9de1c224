"""Hidden states in files: those of a whole calibration set outgrow memory before a block does.

Suffixes: B samples, T tokens of a sample, D hidden size.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from plugins.common.files import replacing

TOKENS_AT_ONCE = 1024  # that go through a block together; fixed, as sums in another order round otherwise


def samples_at_once(length: int) -> int:
    """How many samples of `length` tokens go through a block together."""
    return max(1, TOKENS_AT_ONCE // length)


class ActivationFile:
    """Hidden states [B, T, D] of `dtype` in `path`, of which a few samples at a time are in memory."""

    def __init__(
        self,
        path: Path,
        shape_BTD: Sequence[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.path, self.shape, self.device, self.dtype = path, tuple(shape_BTD), device, dtype

    def __len__(self) -> int:
        return self.shape[0]

    def write(self, batches: Iterable[Tensor]) -> None:
        """Puts the samples of all batches into the file: whole or not at all."""
        with self.writer() as add:
            for batch_BTD in batches:
                add(batch_BTD)

    @contextmanager
    def writer(self) -> Iterator[Callable[[Tensor], object]]:
        """For batches that come up in the course of other work: what adds one to the file."""
        with replacing(self.path) as partial, partial.open("wb") as opened:
            yield lambda batch_BTD: opened.write(_bytes(batch_BTD.to(self.dtype).cpu().contiguous()))

    def read(self, samples: Iterable[int]) -> Tensor:
        """These samples [B, T, D], on the device."""
        wanted, size = list(samples), self.dtype.itemsize * math.prod(self.shape[1:])
        states_BTD = torch.empty(len(wanted), *self.shape[1:], dtype=self.dtype)
        rows = _bytes(states_BTD)
        with self.path.open("rb") as opened:
            for at, sample in enumerate(wanted):
                count = os.preadv(opened.fileno(), [rows[at * size : (at + 1) * size]], sample * size)
                assert count == size, f"'{self.path}' is cut short"
        return states_BTD.to(self.device)

    def batches(self) -> Iterator[Tensor]:
        """All samples in their order, a few at a time."""
        size = samples_at_once(self.shape[1])
        for at in range(0, len(self), size):
            yield self.read(range(at, min(at + size, len(self))))


def _bytes(states_BTD: Tensor) -> memoryview:
    """The memory of a contiguous tensor: numpy has no bfloat16."""
    return memoryview(states_BTD.view(torch.uint8).numpy()).cast("B")
