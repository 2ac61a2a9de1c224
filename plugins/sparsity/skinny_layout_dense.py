"""The hybrid kernel's form of a dense weight, in numpy: what libtwofour packs on a GPU.

`plugins/csrc/src/layout_of8.h` gives each byte's place and why. In short: blocks of 16 rows x 256 inputs, with the
values in the order in which the 32 lanes of a warp feed them to mma. The form is the same on every GPU.

Legend: N out_features, K in_features.
"""

from __future__ import annotations

from functools import cache

import numpy as np

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
from plugins.sparsity.skinny_layout_of8 import group_places


def packed_bytes(out_features: int, in_features: int, format: str) -> int:
    """Bytes of the packed weight: the dense ones, sizes rounded up to whole blocks."""
    return -(-out_features // ROWS) * -(-in_features // INPUTS) * ROWS * INPUTS * checked_width(format)


def pack(w_NK: Array, format: str) -> Array:
    """Packs a weight w_NK [N, K]: uint8 [packed_bytes]. -0.0 becomes 0."""
    n, k = w_NK.shape
    width = width_of(w_NK, format)
    bits = np.ascontiguousarray(w_NK).view(f"u{width}")
    sign = 1 << (8 * width - 1)
    tiles, blocks = -(-n // ROWS), -(-k // INPUTS)
    whole = np.zeros((tiles * ROWS, blocks * INPUTS), bits.dtype)
    whole[:n, :k] = bits if format == "int8" else np.where(bits == sign, 0, bits)
    by_block = whole.reshape(tiles, ROWS, blocks, INPUTS).swapaxes(1, 2).reshape(tiles, blocks, -1)
    packed = np.zeros((tiles, blocks, ROWS * INPUTS * width), np.uint8)
    packed[:, :, _places(format)] = np.ascontiguousarray(by_block)[..., None].view(np.uint8)
    return packed.reshape(-1)


def unpack(packed: Array, out_features: int, in_features: int, format: str) -> Array:
    """The weight of a packed one: unsigned integers [N, K] of the element's width, the bits of its elements."""
    n, k, width = out_features, in_features, checked_width(format)
    require_size(packed, packed_bytes(n, k, format), f"dense {format} weight [{n}, {k}]")
    tiles, blocks = -(-n // ROWS), -(-k // INPUTS)
    values = np.ascontiguousarray(packed.reshape(tiles, blocks, -1)[:, :, _places(format)]).view(f"u{width}")
    rows = values.reshape(tiles, blocks, ROWS, INPUTS).swapaxes(1, 2).reshape(tiles * ROWS, blocks * INPUTS)
    return np.ascontiguousarray(rows[:n, :k])


@cache
def _places(format: str) -> Array:
    """Byte offsets in a block of the elements of its 16 rows, one row after the other: [16 * 256, width]."""
    width = checked_width(format)
    lane, unit, j, rows, groups = group_places(format)
    high, step = (j % 2)[..., None, None], (2 * unit + j // 2)[..., None, None]
    index, plane = np.meshgrid(np.arange(8), np.arange(width), indexing="ij")
    if format == "int8":
        byte = CHUNK * step + 4 * (high + 2 * (index // 4)) + index % 4
    elif format == "fp8":
        byte = CHUNK * step + 4 * (2 * high + index // 4) + index % 4
    else:
        byte = CHUNK * (2 * step + index // 4) + 4 * (high + 2 * (index // 2 % 2)) + 2 * (index % 2) + plane
    offset = byte // CHUNK * LANES * CHUNK + lane[..., None, None] * CHUNK + byte % CHUNK
    places = np.empty((ROWS, UNITS * 8, 8, width), np.int64)
    places[rows, groups] = offset
    return places.reshape(ROWS * INPUTS, width)
