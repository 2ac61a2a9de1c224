"""Decode steps of fixed shape, replayed as CUDA graphs: one launch instead of a thousand.

A step is made for a number of rows and a length, both rounded up to a power of two, when it is first needed. Rows
beyond the running requests write to block 0 of the cache, which no request ever reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from builder.engines.torch_backend.attention import Decode
from builder.engines.torch_backend.decoder import Decoder
from builder.engines.torch_backend.kv_cache import KVCache, blocks_for, table_of

SHORTEST = 256  # positions
WARM_UPS = 2  # runs before a capture, in which libraries plan and allocate


class DecodeSteps:
    """Runs one decode iteration of B requests; the same logits as `Decode`'s own shapes give."""

    def __init__(self, model: Decoder, cache: KVCache, max_batch_size: int, max_seq_len: int) -> None:
        self._model, self._cache = model, cache
        self._max_batch_size, self._max_seq_len = max_batch_size, max_seq_len
        self._steps: dict[tuple[int, int], _Step] = {}

    def run(self, tokens: Sequence[int], positions: Sequence[int], blocks: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits [B, V] of the last tokens at their positions, each sequence in its `blocks`.

        The next call overwrites them.
        """
        rows = _round_up(len(tokens), 1, self._max_batch_size)
        length = _round_up(max(positions) + 1, SHORTEST, self._max_seq_len)
        if (rows, length) not in self._steps:
            self._steps[rows, length] = _Step(self._model, self._cache, rows, length)
        return self._steps[rows, length].run(tokens, positions, blocks)


class _Step:
    """One shape: its input buffers, and on CUDA the graph that reads them."""

    def __init__(self, model: Decoder, cache: KVCache, rows: int, length: int) -> None:
        self._model, self._cache, self._rows, self._length = model, cache, rows, length
        self._inputs = torch.zeros(2, rows, dtype=torch.int64, device=model.device)  # tokens, positions
        self._table = torch.zeros(rows, blocks_for(length), dtype=torch.int32, device=model.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        if model.device.type == "cuda":
            self._capture()

    def run(self, tokens: Sequence[int], positions: Sequence[int], blocks: Sequence[Sequence[int]]) -> torch.Tensor:
        padding = self._rows - len(tokens)
        self._table.copy_(table_of([*blocks, *[()] * padding], self._table.shape[1]))
        self._inputs.copy_(torch.tensor([[*tokens, *[0] * padding], [*positions, *[0] * padding]]))
        if self._graph is None:
            self._logits = self._forward()
        else:
            self._graph.replay()
        return self._logits[: len(tokens)]

    def _forward(self) -> torch.Tensor:
        tokens, positions = self._inputs
        batch = Decode(self._cache, self._table, positions, self._length, ragged=True)
        return self._model.logits(self._model.hidden(tokens[:, None], positions[:, None], batch)[:, 0])

    def _capture(self) -> None:
        stream = torch.cuda.Stream(self._model.device)
        stream.wait_stream(torch.cuda.current_stream(self._model.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._forward()
        torch.cuda.current_stream(self._model.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._forward()


def _round_up(number: int, least: int, most: int) -> int:
    """The next power of two from `least`, at most `most`."""
    return min(max(1 << (number - 1).bit_length(), least), most)
