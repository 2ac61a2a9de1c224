"""How many blocks the KV cache has, which are free, which are shared, and what full ones hold.

A full block is known by the digest of all tokens up to its end. A released one keeps its content until its memory is
needed, the least recently used first, so that a later prompt with the same beginning reads it (automatic prefix
caching, as in vLLM).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch

from builder.engines.torch_backend.kv_cache import blocks_for
from builder.engines.torch_backend.limits import Limits
from builder.hardware import machine
from builder.planning.kv_capacity import BLOCK, budget_bytes
from plugins.common.errors import UserError


def pool_size(limits: Limits, token_bytes: int, free: int) -> int:
    """How many blocks an engine holds: as many as its limits can use, or as its budget allows of the `free` bytes.

    Raises UserError where one sequence of max_seq_len tokens does not fit.
    """
    each = blocks_for(limits.max_seq_len)
    allowed = budget_bytes(limits.kv_cache_memory, free, "torch")
    budget = blocks_for(min(limits.kv_cache_budget or limits.max_seq_len, limits.max_seq_len))
    most = each + (limits.max_batch_size - 1) * budget  # a prompt is whole in the cache before it is evicted from
    blocks = min(most, allowed // (BLOCK * token_bytes))
    if blocks < each:
        needed = each * BLOCK * token_bytes
        raise UserError(
            f"{allowed / 1e6:.0f} MB of KV cache hold {blocks * BLOCK} tokens, fewer than engine.max_seq_len "
            f"{limits.max_seq_len}",
            f"set engine.kv_cache_memory={-(-needed // 10**6)}MB or more, or a smaller engine.max_seq_len",
        )
    return blocks


def free_bytes(device: torch.device) -> int:
    """The memory that is free on the device now."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else machine.main_memory()[1]


def digests(tokens: Sequence[int], parent: bytes = b"") -> Iterator[bytes]:
    """The digest of each full block of `tokens`, which follow the block whose digest is `parent`."""
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        parent = hashlib.sha256(parent + repr(tuple(tokens[start : start + BLOCK])).encode()).digest()
        yield parent


class BlockPool:
    """Blocks 1 to `blocks`; with `reuse`, full blocks are shared by sequences that begin with the same tokens."""

    def __init__(self, blocks: int, reuse: bool) -> None:
        self.blocks, self.reuse = blocks, reuse
        self._free = dict.fromkeys(range(1, blocks + 1))  # in the order in which they are taken
        self._users = [0] * (blocks + 1)
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Blocks that no sequence holds."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Blocks that a sequence holds."""
        return self.blocks - self.free

    def held(self, prefix: Sequence[bytes]) -> list[int]:
        """The blocks that hold the longest beginning of `prefix`, a digest a block."""
        blocks: list[int] = []
        for digest in prefix:
            if digest not in self._block_of:
                break
            blocks.append(self._block_of[digest])
        return blocks

    def unused(self, blocks: Sequence[int]) -> int:
        """How many of these blocks no sequence holds."""
        return sum(block in self._free for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """Adds a user to blocks that hold content."""
        for block in blocks:
            self._free.pop(block, None)
            self._users[block] += 1

    def take(self, count: int) -> list[int]:
        """`count` blocks to write, their old content forgotten."""
        assert count <= self.free
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        block: int = next(iter(self._free))
        del self._free[block]
        digest = self._digest_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]
        self._users[block] = 1
        return block

    def publish(self, block: int, digest: bytes) -> None:
        """Lets later sequences share a block that is filled; the first with its content stays the shared one."""
        if self.reuse and digest not in self._block_of:
            self._block_of[digest], self._digest_of[block] = block, digest

    def release(self, blocks: Sequence[int]) -> None:
        """Takes a user from each block. The tail goes first: a block is worth nothing without those before it."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if not self._users[block]:
                self._free[block] = None
