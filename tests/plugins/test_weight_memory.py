"""Memory for packed weights: slices of mapped blocks that do not overlap and go when their last tensor goes."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import torch

from plugins.libtwofour import weight_memory


def test_slices_are_aligned_and_do_not_overlap() -> None:
    sizes = [1, 63, 64, 65, 4096, weight_memory.BLOCK + 1, 100]
    slices = [weight_memory.allocate(size) for size in sizes]
    for number, piece in enumerate(slices):
        piece.fill_(number)
    assert [len(piece) for piece in slices] == sizes
    assert all(piece.data_ptr() % weight_memory.ALIGNMENT == 0 for piece in slices)
    assert all(bool((piece == number).all()) for number, piece in enumerate(slices))


def test_threads_get_slices_of_their_own() -> None:
    with ThreadPoolExecutor(8) as pool:
        slices = list(pool.map(lambda number: weight_memory.allocate(1000).fill_(number), range(200)))
    assert all(bool((piece == number).all()) for number, piece in enumerate(slices))


def test_a_block_that_is_mapped_in_inference_mode_can_be_written_outside_it() -> None:
    with torch.inference_mode():
        inside = weight_memory.allocate(weight_memory.BLOCK - 64).fill_(1)
    outside = weight_memory.allocate(64).fill_(2)  # from the same block
    inside.fill_(3)
    assert (int(inside[-1]), int(outside[0])) == (3, 2)


def test_a_clone_has_memory_of_its_own() -> None:
    first = torch.arange(200, dtype=torch.uint8)
    copy = weight_memory.clone(first)
    first.zero_()
    assert copy.tolist() == list(range(200))


def test_a_block_is_unmapped_with_its_last_tensor() -> None:
    piece = weight_memory.allocate(4 * weight_memory.BLOCK)
    weight_memory.allocate(weight_memory.BLOCK)  # from another block
    gc.collect()
    during = mapped()
    del piece
    gc.collect()
    assert during - mapped() >= 4 * weight_memory.BLOCK


def mapped() -> int:
    """Bytes of this process's address space."""
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[0]) * 4096
