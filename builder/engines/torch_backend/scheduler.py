"""Decides what the next iteration runs: iteration-level batching (Orca, Yu et al., OSDI 2022).

Requests wait in order, are prefilled as soon as the batch and the token budget allow, and then decode together. A
sequence takes blocks of the KV cache as it grows, and begins with those that hold its prompt's first tokens already. At
most one prompt is half prefilled between two iterations (chunked prefill). Where blocks run out, the newest sequence
returns its own and is recomputed later (preemption by recomputation, as in vLLM).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from builder.engines.torch_backend.attention import Slice
from builder.engines.torch_backend.block_pool import BlockPool, digests
from builder.engines.torch_backend.kv_cache import blocks_for
from builder.planning.kv_capacity import BLOCK
from plugins.common.request import Request


@dataclass
class Sequence:
    """A request under way."""

    request: Request
    cached: int = 0  # tokens that went into the cache
    tokens: list[int] = field(default_factory=list)  # generated
    blocks: list[int] = field(default_factory=list)  # of the cache, in order
    published: list[bytes] = field(default_factory=list)  # digests of the full blocks that others may share
    length: int = 0  # tokens of the context that it was admitted with
    evicted: int = 0  # tokens that left the cache again

    @property
    def context(self) -> list[int]:
        """The prompt and the generated tokens."""
        return [*self.request.input_ids, *self.tokens]

    @property
    def slots(self) -> int:
        """Slots of its blocks that hold a token."""
        return self.cached - self.evicted

    @property
    def prefilled(self) -> bool:
        return self.cached >= self.length

    @property
    def grows(self) -> bool:
        """Whether it may need another block."""
        return len(self.blocks) < blocks_for(len(self.request.input_ids) + self.request.max_new_tokens)


class Scheduler:
    """Holds every request between `add` and its last token."""

    def __init__(self, max_batch_size: int, max_num_tokens: int, chunked_prefill: bool, pool: BlockPool) -> None:
        self._max_batch_size = max_batch_size
        self._max_num_tokens = max_num_tokens
        self._chunked = chunked_prefill
        self._pool = pool
        self._waiting: deque[Sequence] = deque()
        self._prefilling: list[Sequence] = []
        self.running: list[Sequence] = []
        self.reused_tokens = 0  # of prompts, read from the cache instead of computed
        self.preemptions = 0

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._prefilling or self.running)

    def holds(self, request_id: str) -> bool:
        """Whether a request is queued or running."""
        return any(sequence.request.id == request_id for sequence in self._all())

    def add(self, request: Request) -> None:
        self._waiting.append(Sequence(request))

    def cancel(self, request_id: str) -> None:
        """Forgets a request, where there is one."""
        self._waiting = deque(s for s in self._waiting if s.request.id != request_id)
        self._drop({request_id})

    def decode(self) -> list[Sequence]:
        """The running sequences, oldest first, each with a block for its next token.

        Where there are too few blocks the newest sequences wait again and are recomputed later.
        """
        for sequence in list(self.running):
            missing = blocks_for(sequence.slots + 1) - len(sequence.blocks)
            while missing > self._pool.free and sequence in self.running:
                self._preempt((self._prefilling or self.running)[-1])
            if sequence in self.running:
                sequence.blocks += self._pool.take(missing)
        return list(self.running)

    def shrink(self, sequence: Sequence, slots: int) -> None:
        """Releases the blocks behind a sequence's first `slots`, which hold all that stays of it."""
        count = blocks_for(slots)
        self._pool.release(sequence.blocks[count:])
        sequence.blocks, sequence.evicted = sequence.blocks[:count], sequence.cached - slots

    def _preempt(self, sequence: Sequence) -> None:
        self._pool.release(sequence.blocks)
        sequence.blocks, sequence.published, sequence.cached, sequence.evicted = [], [], 0, 0
        (self._prefilling if sequence in self._prefilling else self.running).remove(sequence)
        self._waiting.appendleft(sequence)
        self.preemptions += 1

    def prefill(self) -> list[tuple[Sequence, Slice]]:
        """The contexts, or slices of them, to run now: at most max_num_tokens tokens."""
        slices, budget = [], self._max_num_tokens
        while budget > 0:
            sequence = self._next(budget)
            if sequence is None:
                break
            length = min(sequence.length - sequence.cached, budget)
            slices.append((sequence, Slice(tuple(sequence.blocks), sequence.cached, length)))
            sequence.cached += length
            budget -= length
        return slices

    def _next(self, budget: int) -> Sequence | None:
        """The first sequence of whose context a part is to be computed, with blocks for all of it."""
        for sequence in self._prefilling:
            if not sequence.prefilled:
                return sequence
        if not self._waiting or len(self.running) + len(self._prefilling) == self._max_batch_size:
            return None
        sequence = self._waiting[0]
        context = sequence.context
        prefix = list(digests(context[:-1])) if self._pool.reuse else []  # the last token's logits must be computed
        shared = self._pool.held(prefix)
        cached, missing = len(shared) * BLOCK, blocks_for(len(context)) - len(shared)
        in_slices = self._chunked or len(context) > self._max_num_tokens  # a preempted one may outgrow an iteration
        if len(context) - cached > budget and not in_slices:
            return None
        spare = sum(s.grows for s in (*self.running, *self._prefilling))
        if missing + spare > self._pool.free - self._pool.unused(shared):
            return None
        self._waiting.popleft()
        self._pool.share(shared)
        sequence.blocks = shared + self._pool.take(missing)
        sequence.cached, sequence.length, sequence.published = cached, len(context), prefix[: len(shared)]
        self.reused_tokens += cached
        self._prefilling.append(sequence)
        return sequence

    def finish(self, ended: set[str]) -> None:
        """Ends an iteration: what it filled may be shared, prefilled requests join the running ones, `ended` leave."""
        for sequence in (*self.running, *self._prefilling):
            self._publish(sequence)
        self.running += [s for s in self._prefilling if s.prefilled]
        self._prefilling = [s for s in self._prefilling if not s.prefilled]
        self._drop(ended)

    def _publish(self, sequence: Sequence) -> None:
        first = len(sequence.published)
        if not self._pool.reuse or sequence.cached < (first + 1) * BLOCK:
            return
        filled = sequence.context[first * BLOCK : sequence.cached]
        parent = sequence.published[-1] if first else b""
        for block, digest in zip(sequence.blocks[first:], digests(filled, parent), strict=False):
            self._pool.publish(block, digest)
            sequence.published.append(digest)

    def _drop(self, ended: set[str]) -> None:
        for sequence in (*self.running, *self._prefilling):
            if sequence.request.id in ended:
                self._pool.release(sequence.blocks)
        self.running = [s for s in self.running if s.request.id not in ended]
        self._prefilling = [s for s in self._prefilling if s.request.id not in ended]

    def _all(self) -> list[Sequence]:
        return [*self._waiting, *self._prefilling, *self.running]
