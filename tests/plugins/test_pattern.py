"""Packing: every weight comes back bit for bit, and what does not hold its pattern is named."""

from __future__ import annotations

import time

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plugins.common.errors import UserError
from plugins.sparsity import pattern, torch_packing
from tests.support.examples import examples

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int8]
EDGES = {  # bit patterns worth meeting often: smallest subnormal, -0.0, smallest normal, largest, int8 -128
    1: [0x01, 0x80, 0x08, 0x7E, 0xFE, 0x81],
    2: [0x0001, 0x8000, 0x0080, 0x0400, 0x7F7F, 0x8001],
    4: [0x00000001, 0x80000000, 0x00800000, 0x7F7FFFFF],
}


@st.composite
def weights(draw: st.DrawFn) -> np.ndarray:
    """A 2:4 weight of random shape and type, from groups that are empty, half filled or full, with edge values."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    rows, groups = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    unsigned = np.dtype(f"u{dtype.itemsize}")
    value = st.one_of(st.sampled_from(EDGES[dtype.itemsize]), st.integers(0, 2 ** (8 * dtype.itemsize) - 1))
    bits = np.zeros((rows, groups, 4), unsigned)
    for row in range(rows):
        for group in range(groups):
            for place in draw(st.lists(st.integers(0, 3), max_size=2, unique=True)):
                bits[row, group, place] = draw(value)
    return bits.reshape(rows, -1).view(dtype)


def bits_of(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.dtype.itemsize}")


def unpack(values: np.ndarray, indices: np.ndarray) -> np.ndarray:
    kept = torch.from_numpy(values.view(f"i{values.dtype.itemsize}"))
    return torch_packing.unpack(kept, torch.from_numpy(indices)).numpy().view(values.dtype)


def without_negative_zero(w: np.ndarray) -> np.ndarray:
    bits = bits_of(w).copy()
    if w.dtype != np.int8:
        bits[bits == 1 << (8 * w.dtype.itemsize - 1)] = 0
    return bits


@given(weights())
@examples(300)
def test_round_trip_is_bit_exact_but_for_negative_zero(w: np.ndarray) -> None:
    values, indices = pattern.pack(w)
    assert values.dtype == w.dtype
    assert values.shape == (w.shape[0], w.shape[1] // 2)
    assert indices.shape == (w.shape[0], -(-w.shape[1] // 8))
    np.testing.assert_array_equal(bits_of(unpack(values, indices)), without_negative_zero(w))
    assert pattern.negative_zero(unpack(values, indices)) is None


@given(weights())
@examples(100)
def test_indices_are_as_documented(w: np.ndarray) -> None:
    """Read back one element at a time, as the docstring describes the format."""
    values, indices = pattern.pack(w)
    expected = without_negative_zero(w)
    for row in range(w.shape[0]):
        for group in range(w.shape[1] // 4):
            nibble = int(indices[row, group // 2]) >> (4 * (group % 2)) & 15
            first, second = nibble & 3, nibble >> 2
            assert first < second
            restored = [0, 0, 0, 0]
            restored[first] = int(bits_of(values)[row, 2 * group])
            restored[second] = int(bits_of(values)[row, 2 * group + 1])
            assert restored == expected[row, 4 * group : 4 * group + 4].tolist()


@given(weights(), st.data())
@examples(100)
def test_a_third_nonzero_is_named_by_row_and_group(w: np.ndarray, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, w.shape[0] - 1))
    group = data.draw(st.integers(0, w.shape[1] // 4 - 1))
    broken = w.copy()
    bits_of(broken)[row, 4 * group : 4 * group + 3] = 1
    assert pattern.first_violation(w) is None
    assert pattern.first_violation(broken) == (row, group)
    with pytest.raises(UserError, match=f"row {row}, group {group} "):
        pattern.pack(broken)


def test_a_group_of_negative_zeros_is_empty() -> None:
    w = np.full((1, 4), -0.0, ml_dtypes.bfloat16)
    assert pattern.first_violation(w) is None
    assert pattern.negative_zero(w) == (0, 0)
    values, _ = pattern.pack(w)
    assert not bits_of(values).any()


def test_int8_minus_128_is_no_negative_zero() -> None:
    w = np.array([[0, -128, 0, -128]], np.int8)
    assert pattern.negative_zero(w) is None
    values, indices = pattern.pack(w)
    assert values.tolist() == [[-128, -128]]
    assert indices.tolist() == [[1 | 3 << 2]]


def test_negative_zero_is_detected_behind_the_first_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pattern, "CHUNK", 16)
    w = np.zeros((50, 8), np.float16)
    w[37, 5] = -0.0
    assert pattern.negative_zero(w) == (37, 5)
    w[41, 4:7] = 1
    assert pattern.first_violation(w) == (41, 1)
    with pytest.raises(UserError, match="row 41, group 1 "):
        pattern.pack(w)


@pytest.mark.parametrize("shape", [(3, 6), (8,), (2, 4, 4)])
def test_a_shape_without_groups_of_4_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="multiple of 4"):
        pattern.first_violation(np.zeros(shape, np.int8))


def test_damaged_indices_are_refused() -> None:
    values, indices = pattern.pack(np.eye(8, dtype=np.float16))
    damaged = indices.copy()
    damaged[3, 0] = 0b0101
    with pytest.raises(UserError, match="row 3, group 0: indices do not ascend"):
        unpack(values, damaged)
    with pytest.raises(UserError, match="do not match"):
        unpack(values[:, :1], indices)
    with pytest.raises(UserError, match="do not match"):
        unpack(values, indices.astype(np.int32))


@pytest.mark.slow
def test_a_large_layer_packs_fast() -> None:
    """An MLP weight of an 8B model, on whatever machine this is: a loop over elements would take minutes."""
    rng = np.random.default_rng(0)
    w = rng.integers(1, 127, (4096, 14336), dtype=np.int8).reshape(-1, 4)
    w[:, rng.permutation(4)[:2]] = 0
    start = time.perf_counter()
    values, indices = pattern.pack(w.reshape(4096, 14336))
    assert time.perf_counter() - start < 5
    assert values.nbytes + indices.nbytes == 4096 * 14336 * 0.625


N_OF_8 = ("4:8", "5:8", "6:8")


@st.composite
def weights_of_8(draw: st.DrawFn) -> tuple[np.ndarray, str]:
    """A weight of random shape and type in an n:8 pattern, from groups that hold 0 to n values, with edge values."""
    name, dtype = draw(st.sampled_from(N_OF_8)), np.dtype(draw(st.sampled_from(DTYPES)))
    rows, groups = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    value = st.one_of(st.sampled_from(EDGES[dtype.itemsize]), st.integers(0, 2 ** (8 * dtype.itemsize) - 1))
    bits = np.zeros((rows, groups, 8), np.dtype(f"u{dtype.itemsize}"))
    for row, group in np.ndindex(rows, groups):
        for place in draw(st.lists(st.integers(0, 7), max_size=int(name[0]), unique=True)):
            bits[row, group, place] = draw(value)
    return bits.reshape(rows, -1).view(dtype), name


def unpack_of_8(values: np.ndarray, mask: np.ndarray, name: str) -> np.ndarray:
    kept = torch.from_numpy(values.view(f"i{values.dtype.itemsize}"))
    return torch_packing.unpack(kept, torch.from_numpy(mask), name).numpy().view(values.dtype)


@given(weights_of_8())
@examples(200)
def test_n_of_8_round_trip_is_bit_exact_and_each_mask_keeps_n(case: tuple[np.ndarray, str]) -> None:
    w, name = case
    keep = int(name[0])
    values, mask = pattern.pack(w, name)
    assert (values.dtype, values.shape) == (w.dtype, (w.shape[0], w.shape[1] * keep // 8))
    assert (mask.dtype, mask.shape) == (np.uint8, (w.shape[0], w.shape[1] // 8))
    assert set(np.unpackbits(mask[..., None], axis=-1).sum(-1).ravel()) == {keep}
    np.testing.assert_array_equal(bits_of(unpack_of_8(values, mask, name)), without_negative_zero(w))


@given(weights_of_8(), st.data())
@examples(100)
def test_one_nonzero_more_than_n_of_8_is_named_by_row_and_group(
    case: tuple[np.ndarray, str], data: st.DataObject
) -> None:
    w, name = case
    row = data.draw(st.integers(0, w.shape[0] - 1))
    group = data.draw(st.integers(0, w.shape[1] // 8 - 1))
    broken = w.copy()
    bits_of(broken)[row, 8 * group : 8 * group + int(name[0]) + 1] = 1
    assert pattern.first_violation(w, name) is None
    assert pattern.first_violation(broken, name) == (row, group)
    with pytest.raises(UserError, match=f"row {row}, group {group} .* more than {name[0]} nonzeros: .* to {name}"):
        pattern.pack(broken, name)


def test_a_group_of_8_with_few_nonzeros_keeps_zeros_at_its_lowest_free_places() -> None:
    w = np.array([[0, 0, 0, 0, 0, 0, 7, 0]], np.int8)
    values, mask = pattern.pack(w, "4:8")
    assert values.tolist() == [[0, 0, 0, 7]]
    assert mask.tolist() == [[0b01000111]]


def test_a_shape_without_groups_of_8_is_refused() -> None:
    with pytest.raises(UserError, match="multiple of 8"):
        pattern.pack(np.zeros((3, 12), np.int8), "6:8")


def test_a_damaged_mask_is_refused() -> None:
    packed = torch_packing.pack(torch.eye(16, dtype=torch.int8), "6:8")
    stored = packed.stored()
    assert set(stored) == {"weight_values", "weight_mask"}
    assert torch_packing.Packed.of(stored) == packed
    damaged = packed.positions.clone()
    damaged[3, 1] = 0xFF
    with pytest.raises(UserError, match="row 3, group 1: the mask keeps 8 of 8, not 6"):
        torch_packing.unpack(packed.values, damaged, "6:8")
    for wrong in (packed.values[:, :11], packed.values[:, :0], packed.values[:8]):
        with pytest.raises(UserError, match="do not match"):
            torch_packing.Packed.of({"weight_values": wrong, "weight_mask": packed.positions})
