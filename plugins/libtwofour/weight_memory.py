"""Memory for weights that a CPU reads once per token: side by side, on huge pages.

Weights of some hundred KB that malloc scatters over pages of 4 KiB cost a decoder a page walk every 64 cache lines.
Measured on SmolLM2-135M's INT8 layers, one token, one thread of an AMD EPYC: 11.3 ms from malloc, 9.8 ms side by side,
9.2 ms on huge pages as well. Where the kernel has no transparent huge pages, the request for them changes nothing.
"""

from __future__ import annotations

import mmap
import threading
from contextlib import suppress

import torch

BLOCK = 64 << 20  # bytes that are mapped at once
HUGE_PAGE = 2 << 20
ALIGNMENT = 64

_lock = threading.Lock()
_free = torch.empty(0, dtype=torch.uint8)  # what is left of the block in use


def allocate(count: int) -> torch.Tensor:
    """uint8 [count], aligned to 64 bytes, uninitialised. A block is unmapped when no tensor of it is left."""
    global _free
    size = -(-count // ALIGNMENT) * ALIGNMENT
    with _lock, torch.inference_mode(False):  # a block that is mapped in inference mode could not be written outside it
        if size > len(_free):
            _free = _map(max(size, BLOCK))
        taken, _free = _free[:count], _free[size:]
    return taken


def clone(weight: torch.Tensor) -> torch.Tensor:
    """A copy of a uint8 tensor in such memory."""
    return allocate(weight.numel()).copy_(weight)


def _map(size: int) -> torch.Tensor:
    """At least `size` zero bytes from the start of a huge page."""
    pages = -(-size // HUGE_PAGE) * HUGE_PAGE
    block = mmap.mmap(-1, pages + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        block.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(block, dtype=torch.uint8)
    start = -memory.data_ptr() % HUGE_PAGE
    return memory[start : start + pages]
