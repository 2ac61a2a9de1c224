"""The skinny kernel's form of a weight in the pattern 4:8, 5:8 or 6:8, in numpy: what libtwofour packs on a GPU.

`plugins/csrc/src/layout_of8.h` gives each byte's place and why. In short: blocks of 16 rows x 256 inputs, each holding
the kept values in the order in which the 32 lanes of a warp feed them to mma (16-bit elements as two planes of bytes),
then a bit for each input that is dropped. The form is the same on every GPU.

Legend: N out_features, K in_features, n values kept of 8, T = ceil(N / 16) tiles, B = ceil(K / 256) blocks.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from plugins.common.errors import UserError
from plugins.common.patterns import keep_and_group
from plugins.sparsity import pattern as packing
from plugins.sparsity.skinny_layout import (
    CHUNK,
    INPUTS,
    LANES,
    ROWS,
    UNITS,
    Array,
    checked_width,
    require_size,
    width_of,
)

GROUPS = INPUTS // 8  # of a row in a block


def packed_bytes(out_features: int, in_features: int, format: str, pattern: str) -> int:
    """Bytes of the packed weight: n/8 of the dense ones and a bit for each input, sizes rounded up to whole blocks."""
    return -(-out_features // ROWS) * -(-in_features // INPUTS) * _block_bytes(checked_width(format), pattern)


def pack(w_NK: Array, format: str, pattern: str) -> Array:
    """Packs a weight w_NK [N, K]: uint8 [packed_bytes]. Raises UserError naming a group that breaks the pattern."""
    n, k = w_NK.shape
    width, keep = width_of(w_NK, format), keep_and_group(pattern)[0]
    values, masks = packing.pack(w_NK, pattern)
    tiles, blocks = -(-n // ROWS), -(-k // INPUTS)
    value_bytes = np.zeros((tiles * ROWS, blocks * GROUPS, keep, width), np.uint8)
    value_bytes[:n, : k // 8] = values.view(np.uint8).reshape(n, k // 8, keep, width)
    kept = np.full((tiles * ROWS, blocks * GROUPS), (1 << keep) - 1, np.uint8)  # the first inputs, of zeros
    kept[:n, : k // 8] = masks

    places = _places(format, pattern)
    packed = np.zeros((tiles, blocks, _block_bytes(width, pattern)), np.uint8)
    packed[:, :, places.values] = value_bytes.reshape(tiles, ROWS, blocks, GROUPS, keep, width).swapaxes(1, 2)
    by_group = kept.reshape(tiles, ROWS, blocks, GROUPS).swapaxes(1, 2)[:, :, places.rows, places.groups]
    dropped = np.zeros((tiles, blocks, LANES, UNITS), "<u4")
    for j in range(4):
        dropped |= _SPREAD[~by_group[..., j]] << np.uint32(j)
    packed[:, :, places.positions :] = dropped.view(np.uint8).reshape(tiles, blocks, -1)
    return packed.reshape(-1)


def unpack(packed: Array, out_features: int, in_features: int, format: str, pattern: str) -> Array:
    """The dense weight of a packed one: unsigned integers [N, K] of the element's width, the bits of its elements."""
    n, k, width, keep = out_features, in_features, checked_width(format), keep_and_group(pattern)[0]
    require_size(packed, packed_bytes(n, k, format, pattern), f"{pattern} {format} weight [{n}, {k}]")
    tiles, blocks = -(-n // ROWS), -(-k // INPUTS)
    places = _places(format, pattern)
    block_major = packed.reshape(tiles, blocks, -1)
    values = np.ascontiguousarray(block_major[:, :, places.values]).view(f"u{width}")[..., 0]
    dropped = (
        np.ascontiguousarray(block_major[:, :, places.positions :]).view("<u4").reshape(tiles, blocks, LANES, UNITS)
    )
    kept = np.empty((tiles, blocks, ROWS, GROUPS, 8), bool)
    for j in range(4):
        bits = dropped[..., None] >> np.arange(j, 32, 4, dtype=np.uint32) & 1 == 0
        kept[:, :, places.rows[..., j], places.groups[..., j]] = bits
    if (kept.sum(-1) != keep).any():
        raise UserError(f"a group does not keep {keep} of 8: the weight is damaged, build the engine again")
    dense = np.zeros(kept.shape, f"u{width}")
    dense[kept] = values.reshape(-1)
    rows = dense.reshape(tiles, blocks, ROWS, INPUTS).swapaxes(1, 2).reshape(tiles * ROWS, blocks * INPUTS)
    return np.ascontiguousarray(rows[:n, :k])


_SPREAD = np.array([sum((byte >> i & 1) << (4 * i) for i in range(8)) for byte in range(256)], "<u4")


def group_places(format: str) -> tuple[Array, ...]:
    """Lane, unit and number of each of the four groups of each lane and unit, and their rows and groups: [32, 4, 4]."""
    lane, unit, j = np.meshgrid(np.arange(LANES), np.arange(UNITS), np.arange(4), indexing="ij")
    half = 2 * (lane % 4) + j // 2 if format == "int8" else 4 * (j // 2) + lane % 4
    return lane, unit, j, lane // 4 + 8 * (j % 2), 8 * unit + half


class _Places:
    """Byte offsets in a block: `values` [16, 32, n, width] of each row's groups, and where `positions` begin; the row
    and the group of the four groups of each lane and unit, [32, 4, 4]."""

    def __init__(self, format: str, pattern: str) -> None:
        width, keep = checked_width(format), keep_and_group(pattern)[0]
        lane, unit, j, self.rows, self.groups = group_places(format)
        index, plane = np.meshgrid(np.arange(keep), np.arange(width), indexing="ij")
        first = CHUNK * unit[..., None, None] + 4 * j[..., None, None] + index
        rest = 4 * CHUNK + (keep - 4) * (4 * unit + j)[..., None, None] + index - 4
        byte = CHUNK * keep * plane + np.where(index < 4, first, rest)
        offset = byte // CHUNK * LANES * CHUNK + lane[..., None, None] * CHUNK + byte % CHUNK
        self.values = np.empty((ROWS, GROUPS, keep, width), np.int64)
        self.values[self.rows, self.groups] = offset
        self.positions = keep * width * LANES * CHUNK


@cache
def _places(format: str, pattern: str) -> _Places:
    return _Places(format, pattern)


def _block_bytes(width: int, pattern: str) -> int:
    return (keep_and_group(pattern)[0] * width + 1) * LANES * CHUNK
