"""The patterns n:m of a weight: check them, pack them. numpy alone, any element type, on bit patterns.

In each row of a weight w_NK [out_features N, in_features K] each aligned group of m holds at most n nonzeros. Packed:

    values     [N, K n/m], the weight's dtype: the n kept elements of each group, in ascending order of their index
    positions  uint8 [N, ceil(K/8)]
               2:4, the indices: a nibble a group, first index in its bits 0-1, second in bits 2-3; group g of a row
               is in byte g//2, the low nibble for even g
               n:8, the mask: a byte a group, of which exactly n bits are set: bit i where element i is kept

A group with fewer than n nonzeros keeps +0 at its lowest free indices; -0.0 becomes +0. bfloat16 and float8 arrays
carry the dtypes of `ml_dtypes`, or void types of their width: only that is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np

from plugins.common.errors import UserError
from plugins.common.patterns import TENSOR_CORE, keep_and_group

Array = np.ndarray[Any, Any]

CHUNK = 1 << 22  # elements handled at once: bounds the temporaries, and keeps them in cache
VIOLATION = 255  # no mask of n of 8 has all bits set


def first_violation(w_NK: Array, pattern: str = TENSOR_CORE) -> tuple[int, int] | None:
    """The first (row, group) of w_NK [N, K] with more nonzeros than the pattern allows, or None.

    Raises UserError where K does not divide into groups.
    """
    _, group = keep_and_group(pattern)
    for start, bits in _row_chunks(w_NK, group):
        bad = _tables(pattern)[0][_codes(bits, w_NK.dtype, group)] == VIOLATION
        if bad.any():
            row, at = np.argwhere(bad)[0]
            return start + int(row), int(at)
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


def pack(w_NK: Array, pattern: str = TENSOR_CORE) -> tuple[Array, Array]:
    """Packs a weight w_NK [N, K] in the pattern n:m into (values [N, K n/m], positions uint8 [N, ceil(K/8)]).

    Raises UserError where K does not divide into groups, or naming the first row and group with more than n nonzeros.
    """
    keep, group = keep_and_group(pattern)
    rows, columns = w_NK.shape
    groups = columns // group
    values = np.zeros((rows, groups, keep), _unsigned(w_NK.dtype))
    codes = np.zeros((rows, groups + (groups % 2 if group == 4 else 0)), np.uint8)
    sign = _sign_bit(w_NK.dtype)
    positions, places = _tables(pattern)
    for start, bits in _row_chunks(w_NK, group):
        end = start + bits.shape[0]
        nonzero = _codes(bits, w_NK.dtype, group)
        code = positions[nonzero]
        if (code == VIOLATION).any():
            row, at = np.argwhere(code == VIOLATION)[0]
            raise UserError(
                f"row {start + int(row)}, group {at} (columns {group * at} to {group * at + group - 1}) holds more "
                f"than {keep} nonzeros: sparsify the weight to {pattern} first"
            )
        codes[start:end, :groups] = code
        flat = bits.reshape(-1)
        base = np.arange(0, flat.size, group, dtype=np.int64).reshape(code.shape)
        for number in range(keep):
            values[start:end, :, number] = flat[base + places[number][nonzero]]
        if _is_float(w_NK.dtype):
            kept = values[start:end]
            kept[kept == sign] = 0
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4) if group == 4 else codes
    return values.reshape(rows, groups * keep).view(w_NK.dtype), packed


@cache
def _tables(pattern: str) -> tuple[Array, Array]:
    """By the set of nonzeros in a group (bit i: element i): its code in `positions`, or VIOLATION, and kept indices.

    uint8 [2^m] and [n, 2^m].
    """
    keep, group = keep_and_group(pattern)
    positions = np.full(1 << group, VIOLATION, np.uint8)
    places = np.zeros((keep, 1 << group), np.uint8)
    for nonzero in range(1 << group):
        taken = [i for i in range(group) if nonzero >> i & 1]
        free = [i for i in range(group) if not nonzero >> i & 1]
        if len(taken) <= keep:
            kept = sorted(taken + free[: keep - len(taken)])
            places[:, nonzero] = kept
            positions[nonzero] = kept[0] | kept[1] << 2 if group == 4 else sum(1 << i for i in kept)
    return positions, places


def _row_chunks(w_NK: Array, group: int) -> Iterator[tuple[int, Array]]:
    """(first row, bit patterns) of consecutive rows, about CHUNK elements at a time."""
    if w_NK.ndim != 2 or w_NK.shape[1] % group:
        raise UserError(
            f"a weight of shape {w_NK.shape} has no groups of {group}: in_features must be a multiple of {group}"
        )
    bits = _bits(w_NK)
    rows = max(1, CHUNK // max(1, bits.shape[1]))
    for start in range(0, bits.shape[0], rows):
        yield start, bits[start : start + rows]


def _codes(bits: Array, dtype: np.dtype[Any], group: int) -> Array:
    """Which elements of each group of 4 or 8 are nonzero: uint8 [rows, K/group], bit i for element i."""
    nonzero = (bits & (_sign_bit(dtype) - 1) if _is_float(dtype) else bits) != 0
    fours = nonzero.view(np.uint32)  # four bytes of 0 or 1; the multiplication gathers them in the top byte
    codes: Array = ((fours * np.uint32(0x01020408)) >> np.uint32(24)).astype(np.uint8)
    return codes if group == 4 else codes[:, 0::2] | (codes[:, 1::2] << 4)


def _bits(array: Array) -> Array:
    return np.ascontiguousarray(array).view(_unsigned(array.dtype))


def _unsigned(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(f"u{dtype.itemsize}")


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in ("f", "V")  # V: the types of ml_dtypes


def _sign_bit(dtype: np.dtype[Any]) -> Any:
    return _unsigned(dtype).type(1 << (8 * dtype.itemsize - 1))
