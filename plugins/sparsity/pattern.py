"""The 2:4 pattern: check it, pack it, unpack it. numpy alone, any element type, on bit patterns.

In each row of a weight w_NK [out_features N, in_features K] each aligned group of 4 holds at most 2 nonzeros. Packed:

    values   [N, K/2], the weight's dtype: the group's two kept elements, in ascending order of their index
    indices  uint8 [N, ceil(K/8)]: a nibble a group, first index in its bits 0-1, second in bits 2-3; group g of a row
             is in byte g//2, the low nibble for even g

A group with fewer than 2 nonzeros keeps +0 at its lowest free index, so that indices always ascend; -0.0 becomes +0.
bfloat16 and float8 arrays carry the dtypes of `ml_dtypes`, or void types of their width: only that is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from plugins.common.errors import UserError

Array = np.ndarray[Any, Any]

CHUNK = 1 << 22  # elements handled at once: bounds the temporaries, and keeps them in cache
VIOLATION = 255


def first_violation(w_NK: Array) -> tuple[int, int] | None:
    """The first (row, group of 4) of w_NK [N, K] with more than 2 nonzeros, or None. Raises UserError where K % 4."""
    for start, bits in _row_chunks(w_NK):
        bad = _NIBBLE[_codes(bits, w_NK.dtype)] == VIOLATION
        if bad.any():
            row, group = np.argwhere(bad)[0]
            return start + int(row), int(group)
    return None


def negative_zero(w_NK: Array) -> tuple[int, int] | None:
    """The first (row, column) of w_NK [N, K] that holds -0.0, or None. Integers hold none."""
    if not _is_float(w_NK.dtype):
        return None
    sign = _sign_bit(w_NK.dtype)
    bits = _bits(w_NK)
    rows = max(1, CHUNK // max(1, bits.shape[1]))
    for start in range(0, bits.shape[0], rows):
        matches = bits[start : start + rows] == sign
        if matches.any():
            row, column = np.argwhere(matches)[0]
            return start + int(row), int(column)
    return None


def pack(w_NK: Array) -> tuple[Array, Array]:
    """Packs a 2:4 weight w_NK [N, K] into (values [N, K/2], indices uint8 [N, ceil(K/8)]).

    Raises UserError where K is not a multiple of 4, or naming the first row and group with more than 2 nonzeros.
    """
    rows, columns = w_NK.shape
    groups = columns // 4
    unsigned = _unsigned(w_NK.dtype)
    values = np.zeros((rows, groups, 2), unsigned)
    nibbles = np.zeros((rows, groups + groups % 2), np.uint8)
    sign = _sign_bit(w_NK.dtype)
    for start, bits in _row_chunks(w_NK):
        end = start + bits.shape[0]
        code = _codes(bits, w_NK.dtype)
        nibble = _NIBBLE[code]
        if (nibble == VIOLATION).any():
            row, group = np.argwhere(nibble == VIOLATION)[0]
            raise UserError(
                f"row {start + int(row)}, group {group} (columns {4 * group} to {4 * group + 3}) holds more than "
                "2 nonzeros: sparsify the weight to 2:4 first"
            )
        nibbles[start:end, :groups] = nibble
        flat = bits.reshape(-1)
        base = np.arange(0, flat.size, 4, dtype=np.int64).reshape(nibble.shape)
        values[start:end, :, 0] = flat[base + (nibble & 3)]
        values[start:end, :, 1] = flat[base + (nibble >> 2)]
        if _is_float(w_NK.dtype):
            kept = values[start:end]
            kept[kept == sign] = 0
    indices = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
    return values.reshape(rows, columns // 2).view(w_NK.dtype), indices


def _nibble_table() -> Array:
    """For each of the 16 sets of nonzeros in a group (bit i: element i): first | second << 2, or VIOLATION."""
    table = np.full(16, VIOLATION, np.uint8)
    for code in range(16):
        kept = [i for i in range(4) if code >> i & 1]
        free = [i for i in range(4) if not code >> i & 1]
        if len(kept) <= 2:
            first, second = sorted(kept + free[: 2 - len(kept)])
            table[code] = first | second << 2
    return table


_NIBBLE = _nibble_table()


def _row_chunks(w_NK: Array) -> Iterator[tuple[int, Array]]:
    """(first row, bit patterns) of consecutive rows, about CHUNK elements at a time."""
    if w_NK.ndim != 2 or w_NK.shape[1] % 4:
        raise UserError(f"a weight of shape {w_NK.shape} has no groups of 4: in_features must be a multiple of 4")
    bits = _bits(w_NK)
    rows = max(1, CHUNK // max(1, bits.shape[1]))
    for start in range(0, bits.shape[0], rows):
        yield start, bits[start : start + rows]


def _codes(bits: Array, dtype: np.dtype[Any]) -> Array:
    """Which elements of each group are nonzero: uint8 [rows, K/4], bit i for element i."""
    nonzero = (bits & (_sign_bit(dtype) - 1) if _is_float(dtype) else bits) != 0
    fours = nonzero.view(np.uint32)  # four bytes of 0 or 1; the multiplication gathers them in the top byte
    codes: Array = ((fours * np.uint32(0x01020408)) >> np.uint32(24)).astype(np.uint8)
    return codes


def _bits(array: Array) -> Array:
    return np.ascontiguousarray(array).view(_unsigned(array.dtype))


def _unsigned(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(f"u{dtype.itemsize}")


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in ("f", "V")  # V: the types of ml_dtypes


def _sign_bit(dtype: np.dtype[Any]) -> Any:
    return _unsigned(dtype).type(1 << (8 * dtype.itemsize - 1))
