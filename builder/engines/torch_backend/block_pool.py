"""Which blocks of the KV cache are free, which are shared, and what full ones hold.

A full block is known by the digest of all tokens up to its end. A released one keeps its content until its memory is
needed, the least recently used first, so that a later prompt with the same beginning reads it (automatic prefix
caching, as in vLLM).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from builder.engines.torch_backend.kv_cache import BLOCK


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
    def used(self) -> int:
        """Blocks that a sequence holds."""
        return self.blocks - len(self._free)

    def held(self, prefix: Sequence[bytes]) -> list[int]:
        """The blocks that hold the longest beginning of `prefix`, a digest a block."""
        blocks: list[int] = []
        for digest in prefix:
            if digest not in self._block_of:
                break
            blocks.append(self._block_of[digest])
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """Adds a user to blocks that hold content."""
        for block in blocks:
            self._free.pop(block, None)
            self._users[block] += 1

    def take(self, count: int) -> list[int]:
        """`count` blocks to write, their old content forgotten."""
        assert count <= len(self._free), "the pool has blocks for every sequence at its full length"
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
