"""The skinny kernel's form of a 2:4 weight, in numpy: what libtwofour packs on a GPU, made and read without one.

`plugins/csrc/src/layout.h` gives each byte's place and why. In short: blocks of 16 rows x 256 inputs, each holding
the kept values in the order in which the 32 lanes of a warp feed them to mma.sp, then 4-bit codes of their positions.
The form is the same on every GPU. Element types: 16-bit ("fp16", "bf16" share one layout), "fp8" and "int8".

Legend: N out_features, K in_features, T = ceil(N / 16) tiles, B = ceil(K / 256) blocks.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from plugins.common.errors import UserError
from plugins.sparsity import pattern

Array = np.ndarray[Any, Any]

ROWS, INPUTS, UNITS, LANES, CHUNK = 16, 256, 4, 32, 16


def width_of(w_NK: Array, format: str) -> int:
    """Bytes of an element. Raises UserError for a weight whose elements have another size."""
    width = checked_width(format)
    if w_NK.dtype.itemsize != width:
        raise UserError(f"a weight of {w_NK.dtype} is no {format} weight: its elements have {width} bytes")
    return width


def require_size(packed: Array, size: int, form: str) -> None:
    """Raises UserError for a packed weight of another size; `form` names what it should be."""
    if packed.dtype != np.uint8 or packed.size != size:
        raise UserError(
            f"{packed.size} bytes of {packed.dtype} are not a packed {form}: it has {size}; build the engine again"
        )


def packed_bytes(out_features: int, in_features: int, format: str) -> int:
    """Bytes of the packed weight: 0.5625 of the dense ones at 16 bits, 0.625 at 8, sizes rounded up to whole blocks."""
    return -(-out_features // ROWS) * -(-in_features // INPUTS) * _block_bytes(checked_width(format))


def pack(w_NK: Array, format: str) -> Array:
    """Packs a 2:4 weight w_NK [N, K]: uint8 [packed_bytes]. Raises UserError naming a group that is not."""
    n, k = w_NK.shape
    width = width_of(w_NK, format)
    values, indices = pattern.pack(w_NK)
    tiles, blocks = -(-n // ROWS), -(-k // INPUTS)
    value_bytes = np.zeros((tiles * ROWS, blocks * INPUTS // 4, 2 * width), np.uint8)
    value_bytes[:n, : k // 4] = values.view(np.uint8).reshape(n, k // 4, 2 * width)
    codes = np.full((tiles * ROWS, blocks * INPUTS // 4), 0b0100, np.uint8)  # positions 0 and 1, of zeros
    nibbles = np.stack([indices & 15, indices >> 4], -1).reshape(n, -1)
    codes[:n, : k // 4] = nibbles[:, : k // 4]

    places = _places(format)
    packed = np.zeros((tiles, blocks, _block_bytes(width)), np.uint8)
    by_block = value_bytes.reshape(tiles, ROWS, blocks, INPUTS // 4, 2 * width).transpose(0, 2, 1, 3, 4)
    packed[:, :, places.values] = by_block
    by_block = codes.reshape(tiles, ROWS, blocks, INPUTS // 4).transpose(0, 2, 1, 3).reshape(tiles, blocks, -1)
    packed[:, :, places.codes] = by_block[:, :, places.low] | by_block[:, :, places.high] << 4
    return packed.reshape(-1)


def unpack(packed: Array, out_features: int, in_features: int, format: str) -> Array:
    """The dense weight of a packed one: unsigned integers [N, K] of the element's width, the bits of its elements."""
    n, k, width = out_features, in_features, checked_width(format)
    require_size(packed, packed_bytes(n, k, format), f"{format} weight [{n}, {k}]")
    tiles, blocks = -(-n // ROWS), -(-k // INPUTS)
    places = _places(format)
    block_major = packed.reshape(tiles, blocks, -1)
    value_bytes = block_major[:, :, places.values]
    pairs = block_major[:, :, places.codes]
    codes = np.empty((tiles, blocks, ROWS * INPUTS // 4), np.uint8)
    codes[:, :, places.low], codes[:, :, places.high] = pairs & 15, pairs >> 4

    values = np.ascontiguousarray(value_bytes).view(f"u{width}")
    dense = np.zeros((*codes.shape, 4), f"u{width}")
    flat = values.reshape(*codes.shape, 2)
    np.put_along_axis(dense, (codes >> 2)[..., None].astype(np.int64), flat[..., 1:], -1)
    np.put_along_axis(dense, (codes & 3)[..., None].astype(np.int64), flat[..., :1], -1)
    rows = dense.reshape(tiles, blocks, ROWS, INPUTS).transpose(0, 2, 1, 3).reshape(tiles * ROWS, blocks * INPUTS)
    return np.ascontiguousarray(rows[:n, :k])


class _Places:
    """Byte offsets in a block: values [16, 64, 2 * width] of each row's groups; and the code bytes with the two groups,
    counted row * 64 + group, that share each."""

    def __init__(self, format: str) -> None:
        width = checked_width(format)
        bytes_of_group = 2 * width
        row, group = np.meshgrid(np.arange(ROWS), np.arange(INPUTS // 4), indexing="ij")
        unit, within = group // 16, group % 16
        g, high = row % 8, row // 8
        if format == "int8":
            lane = 4 * g + within % 8 // 2
            byte = CHUNK * unit + 4 * (high + 2 * (within // 8)) + 2 * (within % 2)
            meta_lane, shift = 4 * g + high + 2 * (within // 8), 4 * (within % 8)
        else:
            fp8 = format == "fp8"
            step = within // 4 % 2 if fp8 else within // 8
            h = 2 * (within % 4) + within // 8 if fp8 else within % 8  # the hardware's group in the step
            lane = 4 * g + h % 4
            byte = (2 * unit + step) * 4 * bytes_of_group + bytes_of_group * (high + 2 * (h // 4))
            meta_lane, shift = 4 * g + 2 * step + h // 4, 16 * high + 4 * (h % 4)
        offset = byte // CHUNK * LANES * CHUNK + lane * CHUNK + byte % CHUNK
        self.values = offset[:, :, None] + np.arange(bytes_of_group)
        code_offset = UNITS * width * LANES * CHUNK + meta_lane * CHUNK + 4 * unit + shift // 8
        order = np.argsort(code_offset.ravel() * 2 + (shift % 8 // 4).ravel())
        self.low, self.high = order[0::2], order[1::2]
        self.codes = code_offset.ravel()[self.low]


@cache
def _places(format: str) -> _Places:
    return _Places(format)


def checked_width(format: str) -> int:
    """Bytes of an element. Raises UserError for a format that has no packed form."""
    if format not in ("fp16", "bf16", "int8", "fp8"):
        raise UserError(f"no packed form for '{format}': fp16, bf16, int8 or fp8")
    return 2 if format in ("fp16", "bf16") else 1


def _block_bytes(width: int) -> int:
    return (UNITS * width + 1) * LANES * CHUNK
