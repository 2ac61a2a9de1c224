"""Decides what the next iteration runs: iteration-level batching (Orca, Yu et al., OSDI 2022).

Requests wait in order, are prefilled as soon as a cache row and the token budget allow, and then decode together.
Running requests keep rows 0 to B - 1 of the cache, so that decode reads one contiguous block; a row freed in the middle
is filled by the last. At most one prompt is half prefilled between two iterations (chunked prefill): it has row B.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from builder.engines.request import Request
from builder.engines.torch_backend.attention import Slice


@dataclass
class Sequence:
    """A request under way."""

    request: Request
    row: int = -1
    cached: int = 0  # tokens in the cache
    tokens: list[int] = field(default_factory=list)  # generated

    @property
    def prefilled(self) -> bool:
        return self.cached >= len(self.request.input_ids)


@dataclass(frozen=True)
class Move:
    """To do in the KV cache: copy the first `length` positions of cache row `source` to `target`."""

    source: int
    target: int
    length: int


class Scheduler:
    """Holds every request between `add` and its last token."""

    def __init__(self, max_batch_size: int, max_num_tokens: int, chunked_prefill: bool) -> None:
        self._max_batch_size = max_batch_size
        self._max_num_tokens = max_num_tokens
        self._chunked = chunked_prefill
        self._waiting: deque[Sequence] = deque()
        self._prefilling: list[Sequence] = []
        self.running: list[Sequence] = []  # running[i] is in cache row i

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._prefilling or self.running)

    def holds(self, request_id: str) -> bool:
        """Whether a request is queued or running."""
        return any(sequence.request.id == request_id for sequence in self._all())

    def add(self, request: Request) -> None:
        self._waiting.append(Sequence(request))

    def cancel(self, request_id: str) -> list[Move]:
        """Forgets a request, where there is one. Returns what to copy."""
        self._waiting = deque(s for s in self._waiting if s.request.id != request_id)
        return self._drop({request_id})

    def prefill(self) -> list[tuple[Sequence, Slice]]:
        """The prompts, or slices of them, to run now: at most max_num_tokens tokens."""
        budget, slices = self._max_num_tokens, []
        while budget > 0:
            sequence = self._next(budget)
            if sequence is None:
                break
            length = min(len(sequence.request.input_ids) - sequence.cached, budget)
            slices.append((sequence, Slice(sequence.row, sequence.cached, length)))
            sequence.cached += length
            budget -= length
        return slices

    def _next(self, budget: int) -> Sequence | None:
        """The first sequence with prompt tokens left, given a row."""
        for sequence in self._prefilling:
            if not sequence.prefilled:
                return sequence
        rows = len(self.running) + len(self._prefilling)
        if not self._waiting or rows == self._max_batch_size:
            return None
        if len(self._waiting[0].request.input_ids) > budget and not self._chunked:
            return None
        sequence = self._waiting.popleft()
        sequence.row = rows
        self._prefilling.append(sequence)
        return sequence

    def finish(self, ended: set[str]) -> list[Move]:
        """Ends an iteration: prefilled requests join the running ones, `ended` leave. Returns what to copy."""
        self.running += [s for s in self._prefilling if s.prefilled]
        self._prefilling = [s for s in self._prefilling if not s.prefilled]
        return self._drop(ended) if ended else []

    def _drop(self, ended: set[str]) -> list[Move]:
        self.running = [s for s in self.running if s.request.id not in ended]
        self._prefilling = [s for s in self._prefilling if s.request.id not in ended]
        free = set(range(len(self.running))) - {s.row for s in self.running}
        moves = [_move(s, free.pop()) for s in self.running if s.row >= len(self.running)]
        self.running.sort(key=lambda s: s.row)
        for row, sequence in enumerate(self._prefilling, start=len(self.running)):
            if sequence.row != row:
                moves.append(_move(sequence, row))
        return moves

    def _all(self) -> list[Sequence]:
        return [*self._waiting, *self._prefilling, *self.running]


def _move(sequence: Sequence, row: int) -> Move:
    move = Move(sequence.row, row, sequence.cached)
    sequence.row = row
    return move
