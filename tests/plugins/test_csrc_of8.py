"""libtwofour's kernels of 4:8, 5:8 and 6:8 weights: packing against numpy, and the simulated kernels' products."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugins.common.errors import UserError
from plugins.common.patterns import OF_EIGHT, keep_and_group, skinny_kernel
from plugins.libtwofour import bindings, structures
from plugins.sparsity import skinny_layout_of8 as layout
from tests.support import c_api, native
from tests.support.examples import examples
from tests.support.skinny import (
    DTYPES,
    OUT,
    SCALE,
    check_product,
    in_features,
    matmul,
    pack,
    poison,
    random_values,
    shapes,
)

PATTERNS = st.sampled_from(OF_EIGHT)


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    native.use_library()


@pytest.fixture(scope="module")
def host() -> bindings.Context:
    return bindings.Context(bindings.HOST)


def prune(w_NK: np.ndarray, pattern: str, rng: np.random.Generator, full: bool = False) -> np.ndarray:
    """w_NK with at most n of each 8 kept: some groups empty; with `full` exactly n."""
    n, k = w_NK.shape
    keep = keep_and_group(pattern)[0]
    counts = np.full((n, k // 8, 1), keep) if full else rng.integers(0, keep + 1, (n, k // 8, 1))
    kept = rng.random((n, k // 8, 8)).argsort(-1) < counts
    return np.where(kept.reshape(n, k), w_NK, np.zeros_like(w_NK))


@examples(60)
@given(pattern=PATTERNS, **shapes)
def test_packing_agrees_with_numpy_and_inverts(pattern: str, format: str, n: int, chunks: int, seed: int) -> None:
    host, rng = bindings.context(bindings.HOST), np.random.default_rng(seed)
    w_NK = poison(prune(random_values((n, in_features(format, chunks)), format, rng), pattern, rng), format, rng)
    packed = pack(host, w_NK, format, skinny_kernel(pattern))
    np.testing.assert_array_equal(packed, layout.pack(w_NK, format, pattern))
    assert packed.size == layout.packed_bytes(*w_NK.shape, format, pattern)

    bits = w_NK.view(f"u{w_NK.itemsize}")
    sign = 0 if format == "int8" else 1 << (8 * w_NK.itemsize - 1)
    canonical = np.where(bits == sign, 0, bits)  # -0.0 comes back as 0
    problem = structures.gemm(skinny_kernel(pattern), format, "fp16", *w_NK.shape)
    unpacked = native.aligned(np.full_like(w_NK, 1))
    c_api.unpack_weight(host, problem, packed.ctypes.data, unpacked.ctypes.data)
    np.testing.assert_array_equal(unpacked.view(bits.dtype), canonical)
    np.testing.assert_array_equal(layout.unpack(packed, *w_NK.shape, format, pattern), canonical)


@pytest.mark.parametrize("format", sorted(DTYPES))
@pytest.mark.parametrize("pattern", OF_EIGHT)
def test_packed_weight_takes_n_eighths_and_a_bit_for_each_input(pattern: str, format: str) -> None:
    width, keep = np.dtype(DTYPES[format]).itemsize, keep_and_group(pattern)[0]
    assert layout.packed_bytes(64, 1024, format, pattern) == 64 * 1024 * (width * keep + 1) // 8


@pytest.mark.parametrize("pattern", OF_EIGHT)
def test_damaged_weight_and_one_of_another_size_are_refused(pattern: str) -> None:
    rng = np.random.default_rng(0)
    packed = layout.pack(prune(random_values((16, 256), "int8", rng), pattern, rng), "int8", pattern)
    with pytest.raises(UserError, match=rf"are not a packed {pattern} int8 weight \[16, 512\]"):
        layout.unpack(packed, 16, 512, "int8", pattern)
    packed[-1] ^= 1
    with pytest.raises(UserError, match=f"a group does not keep {pattern[0]} of 8"):
        layout.unpack(packed, 16, 256, "int8", pattern)


algorithms = st.one_of(
    st.tuples(st.integers(1, 5)),  # staged: splits of the inputs
    st.tuples(st.integers(1, 5), st.just(1), st.integers(1, 2), st.integers(1, 4), st.integers(0, 5)),  # streamed
)


@examples(60)
@given(pattern=PATTERNS, tokens=st.integers(1, 64), algorithm=algorithms, out=st.sampled_from(sorted(OUT)), **shapes)
def test_simulated_kernel_against_float64(
    pattern: str,
    format: str,
    n: int,
    chunks: int,
    seed: int,
    tokens: int,
    algorithm: tuple[int, ...],
    out: str,
) -> None:
    rng, k = np.random.default_rng(seed), in_features(format, chunks)
    host = bindings.context(bindings.HOST)
    w_NK = poison(prune(random_values((n, k), format, rng), pattern, rng, full=seed % 5 == 0), format, rng)
    x_MK = random_values((tokens, k), format, rng)
    scales = rng.uniform(1e-3, 2e-3, n).astype(np.float32) if seed % 2 else None
    bias = native.aligned(rng.standard_normal(n).astype(OUT[out])) if seed % 3 else None
    packed = native.aligned(layout.pack(w_NK, format, pattern))
    y_MN = matmul(host, x_MK, packed, format, out, n, SCALE, scales, bias, algorithm, skinny_kernel(pattern))
    check_product(y_MN, x_MK, w_NK, (format, out), scales, bias)


@pytest.mark.parametrize("algorithm", [(1,), (3,), (1, 1), (3, 1, 2)], ids=str)
@pytest.mark.parametrize("format", sorted(DTYPES))
@pytest.mark.parametrize("pattern", OF_EIGHT)
def test_each_input_meets_its_own_weight(pattern: str, format: str, algorithm: tuple[int, ...]) -> None:
    """Rows of x are unit vectors: y is the weight itself, column by column."""
    host, rng, n, k = bindings.context(bindings.HOST), np.random.default_rng(11), 24, 320
    w_NK = prune(rng.integers(1, 9, (n, k)).astype(DTYPES[format]), pattern, rng, full=True)
    packed = native.aligned(layout.pack(w_NK, format, pattern))
    for first in range(0, k, 64):
        x_MK = np.eye(k)[first : first + 64].astype(DTYPES[format])
        y_MN = matmul(host, x_MK, packed, format, "fp16", n, 1.0, algorithm=algorithm, kernel=skinny_kernel(pattern))
        np.testing.assert_array_equal(y_MN.astype(float), w_NK.astype(float)[:, first : first + 64].T)


@pytest.mark.parametrize("format", sorted(DTYPES))
@pytest.mark.parametrize("pattern", OF_EIGHT)
def test_one_nonzero_too_many_is_named(host: bindings.Context, pattern: str, format: str) -> None:
    keep = keep_and_group(pattern)[0]
    w_NK = np.zeros((20, 64), DTYPES[format])
    w_NK[7, 40 : 41 + keep] = 1
    message = rf"not {pattern}: row 7, group 5 \(inputs 40 to 47\) has more than {keep} nonzeros"
    with pytest.raises(UserError, match=message):
        pack(host, w_NK, format, skinny_kernel(pattern))


@pytest.mark.parametrize("pattern", OF_EIGHT)
def test_problem_that_cannot_run(host: bindings.Context, pattern: str) -> None:
    kernel = skinny_kernel(pattern)
    for problem, message in (
        (structures.gemm(kernel, "int8", "fp16", 16, 250), "in_features=250 is not a multiple of 16"),
        (
            structures.gemm(kernel, "int8", "fp16", 16, 256, 65),
            "tokens=65: the skinny kernel takes 1 to 64; use cublaslt",
        ),
    ):
        with pytest.raises(bindings.LibraryError, match=message):
            host.workspace_bytes(problem)


@pytest.mark.parametrize("format", sorted(DTYPES))
@pytest.mark.parametrize("algorithm", [(2,), (3, 1, 2)], ids=["staged", "streamed splits"])
def test_slices_of_wider_matrices_and_replays(host: bindings.Context, format: str, algorithm: tuple[int, ...]) -> None:
    """y's other columns stay, and a second launch gives the same bits: the counters have returned to zero."""
    rng, n, k, tokens, pattern = np.random.default_rng(3), 40, 544, 11, "6:8"
    w_NK = prune(random_values((n, k), format, rng), pattern, rng)
    wide_x, wide_y = random_values((tokens, k + 32), format, rng), np.full((tokens, n + 24), 99, ml_dtypes.bfloat16)
    packed, x, y = native.aligned(layout.pack(w_NK, format, pattern)), native.aligned(wide_x), native.aligned(wide_y)
    problem = structures.gemm("skinny-6of8", format, "bf16", n, k, tokens, 0.01, pitches=(k + 32, n + 24))
    host.set_algorithm(problem, algorithm + (0,) * (8 - len(algorithm)))
    workspace = native.aligned(np.zeros(host.workspace_bytes(problem), np.uint8))
    expected = matmul(host, wide_x[:, 32:], packed, format, "bf16", n, 0.01, algorithm=algorithm, kernel="skinny-6of8")
    for _ in range(2):
        first_x, first_y = x[:, 32:].ctypes.data, y[:, 8:].ctypes.data
        host.matmul(problem, first_x, packed.ctypes.data, first_y, (workspace.ctypes.data, workspace.nbytes))
        np.testing.assert_array_equal(y[:, 8 : n + 8].view(np.uint16), expected.view(np.uint16))
        assert (y[:, :8] == 99).all()
        assert (y[:, n + 8 :] == 99).all()


@pytest.mark.parametrize(
    ("pattern", "format", "tokens", "splits", "share", "blocks"),
    [
        ("4:8", "fp8", 1, 1, 1, 1),
        ("5:8", "fp8", 8, 3, 1, 2),
        ("6:8", "int8", 13, 1, 1, 2),
        ("6:8", "bf16", 20, 3, 1, 1),
    ],
)
def test_rings_of_the_streamed_kernel_turn_many_times(
    host: bindings.Context, pattern: str, format: str, tokens: int, splits: int, share: int, blocks: int
) -> None:
    """More blocks than slots, ranges of rows and inputs that do not divide; exact integers in every type."""
    rng, n, k, kernel = np.random.default_rng(7), 232, 7424, skinny_kernel(pattern)
    w_NK = prune(rng.integers(-3, 4, (n, k)).astype(DTYPES[format]), pattern, rng)
    x_MK = rng.integers(-2, 3, (tokens, k)).astype(DTYPES[format])
    algorithm = (splits, 1, share, blocks, 3, 0, 0, 0)
    packed = native.aligned(layout.pack(w_NK, format, pattern))
    y_MN = matmul(host, x_MK, packed, format, "fp16", n, 0.25, algorithm=algorithm, kernel=kernel)
    ran = host.algorithm(structures.gemm(kernel, format, "fp16", n, k, tokens))
    assert ran[1] == 1
    assert ran[0] >= splits
    np.testing.assert_array_equal(y_MN, (x_MK.astype(float) @ w_NK.astype(float).T * 0.25).astype(np.float16))
