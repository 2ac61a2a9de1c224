"""libtwofour: it compiles without a warning, packs as the PTX ISA specifies, and its skinny kernel, whose source runs
thread by thread on the CPU, multiplies correctly. Nothing here needs a GPU."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugins.common.errors import UserError
from plugins.libtwofour import bindings, structures
from plugins.sparsity import skinny_layout
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


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    native.use_library()


@pytest.fixture(scope="module")
def host() -> bindings.Context:
    return bindings.Context(bindings.HOST)


@examples(60)
@given(**shapes)
def test_packing_agrees_with_numpy_and_inverts(format: str, n: int, chunks: int, seed: int) -> None:
    host, rng = bindings.context(bindings.HOST), np.random.default_rng(seed)
    clean = native.prune(random_values((n, in_features(format, chunks)), format, rng), rng)
    w_NK = poison(clean, format, rng)
    packed = pack(host, w_NK, format)
    np.testing.assert_array_equal(packed, skinny_layout.pack(w_NK, format))
    assert packed.size == skinny_layout.packed_bytes(*w_NK.shape, format)

    bits = w_NK.view(f"u{w_NK.itemsize}")
    sign = 0 if format == "int8" else 1 << (8 * w_NK.itemsize - 1)
    canonical = np.where(bits == sign, 0, bits)  # -0.0 comes back as 0
    problem = structures.gemm("skinny", format, "fp16", *w_NK.shape)
    unpacked = native.aligned(np.full_like(w_NK, 1))
    c_api.unpack_weight(host, problem, packed.ctypes.data, unpacked.ctypes.data)
    np.testing.assert_array_equal(unpacked.view(bits.dtype), canonical)
    np.testing.assert_array_equal(skinny_layout.unpack(packed, *w_NK.shape, format), canonical)


@pytest.mark.parametrize("format", ["fp16", "int8"])
def test_packed_block_is_the_fragments_of_the_ptx_isa(host: bindings.Context, format: str) -> None:
    """Lane by lane, by the formulas of "Matrix fragments for sparse mma.m16n8k32" (fp16) and "... m16n8k64" (int8)."""
    rng = np.random.default_rng(5)
    w = native.prune(random_values((16, 256), format, rng), rng, nonzeros=(2,))
    block = pack(host, w, format)
    chunks = block.reshape(-1, 32, 16)  # [chunk, lane, byte]
    metadata = chunks[-1].view("<u4")  # [lane, unit]
    per_register, depth = (2, 32) if format == "fp16" else (4, 64)
    for step in range(256 // depth):
        seen = np.zeros((16, depth), w.dtype)
        for lane in range(32):
            group_id, in_group = divmod(lane, 4)
            values = chunks[step, lane].view(w.dtype)  # a0, a1, ...
            for i, value in enumerate(values):
                register = i // per_register
                row = group_id + (8 if register % 2 else 0)
                first = in_group * 2 * per_register + (depth // 2 if register >= 2 else 0)
                chunk = (first + i % per_register // 2 * 4) // 4  # of the row, 4 columns each
                if format == "fp16":  # selector step % 2: threads T0, T1 or T2, T3; both rows in one register
                    word = metadata[4 * group_id + 2 * (step % 2) + chunk // 4, step // 2]
                    code = word >> (16 * (row // 8) + 4 * (chunk % 4))
                else:  # T0: row g, columns 0-31; T1: row g + 8; T2, T3: columns 32-63
                    word = metadata[4 * group_id + row // 8 + 2 * (chunk // 8), step]
                    code = word >> (4 * (chunk % 8))
                assert (int(code) & 15) in (0x4, 0x8, 0x9, 0xC, 0xD, 0xE)
                seen[row, 4 * chunk + (int(code) >> (2 * (i % 2)) & 3)] = value
        np.testing.assert_array_equal(seen, w[:, step * depth : (step + 1) * depth])


algorithms = st.one_of(
    st.tuples(st.integers(1, 5)),  # staged: splits of the inputs
    st.tuples(st.integers(1, 5), st.just(1), st.integers(1, 2), st.integers(1, 4), st.integers(0, 5)),  # streamed
)


@examples(60)
@given(tokens=st.integers(1, 64), algorithm=algorithms, out=st.sampled_from(sorted(OUT)), **shapes)
def test_simulated_kernel_against_float64(
    format: str, n: int, chunks: int, seed: int, tokens: int, algorithm: tuple[int, ...], out: str
) -> None:
    host, rng, k = bindings.context(bindings.HOST), np.random.default_rng(seed), in_features(format, chunks)
    w_NK = poison(native.prune(random_values((n, k), format, rng), rng), format, rng)
    x_MK = random_values((tokens, k), format, rng)
    scales = rng.uniform(1e-3, 2e-3, n).astype(np.float32) if seed % 2 else None
    bias = native.aligned(rng.standard_normal(n).astype(OUT[out])) if seed % 3 else None
    packed = native.aligned(skinny_layout.pack(w_NK, format))
    y_MN = matmul(host, x_MK, packed, format, out, n, SCALE, scales, bias, algorithm)
    check_product(y_MN, x_MK, w_NK, (format, out), scales, bias)


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("format", sorted(DTYPES))
@pytest.mark.parametrize("algorithm", [(2,), (1, 1), (3, 1, 2)], ids=["staged", "streamed", "streamed splits"])
def test_slices_of_wider_matrices(host: bindings.Context, format: str, algorithm: tuple[int, ...], tokens: int) -> None:
    """The simulation reports a read of x outside of its own columns, but for rows in between; y's others must stay."""
    rng, n, k = np.random.default_rng(3), 40, 544
    w_NK = native.prune(random_values((n, k), format, rng), rng)
    wide_x, wide_y = random_values((tokens, k + 32), format, rng), np.full((tokens, n + 24), 99, OUT["bf16"])
    packed, x, y = native.aligned(skinny_layout.pack(w_NK, format)), native.aligned(wide_x), native.aligned(wide_y)
    problem = structures.gemm("skinny", format, "bf16", n, k, tokens, 0.01, pitches=(k + 32, n + 24))
    host.set_algorithm(problem, algorithm + (0,) * (8 - len(algorithm)))
    workspace = native.aligned(np.zeros(host.workspace_bytes(problem), np.uint8))
    first_x, first_y = x[:, 32:].ctypes.data, y[:, 8:].ctypes.data
    host.matmul(problem, first_x, packed.ctypes.data, first_y, (workspace.ctypes.data, workspace.nbytes))
    expected = matmul(host, wide_x[:, 32:], packed, format, "bf16", n, 0.01, algorithm=algorithm)
    np.testing.assert_array_equal(y[:, 8 : n + 8].view(np.uint16), expected.view(np.uint16))
    assert (y[:, :8] == 99).all()
    assert (y[:, n + 8 :] == 99).all()


@pytest.mark.parametrize("format", sorted(DTYPES))
@pytest.mark.parametrize("algorithm", [(4,), (4, 1, 1, 3)], ids=["staged", "streamed"])
def test_same_bits_for_every_replay_of_a_split(host: bindings.Context, format: str, algorithm: tuple[int, ...]) -> None:
    """The counters return to zero, and sums are added in order: launching again gives the same bits."""
    rng = np.random.default_rng(1)
    w_NK = native.prune(random_values((80, 1024), format, rng), rng)
    x_MK, packed = random_values((9, 1024), format, rng), native.aligned(skinny_layout.pack(w_NK, format))
    first, second = (matmul(host, x_MK, packed, format, "bf16", 80, 0.01, algorithm=algorithm) for _ in range(2))
    np.testing.assert_array_equal(first.view(np.uint16), second.view(np.uint16))


@pytest.mark.parametrize(
    ("format", "tokens", "splits", "share", "blocks"),
    [
        ("fp8", 1, 1, 1, 1),
        ("fp8", 8, 3, 1, 2),
        ("int8", 13, 1, 1, 2),
        ("int8", 40, 4, 1, 1),
        ("bf16", 7, 1, 2, 1),
        ("fp16", 20, 3, 1, 1),
    ],
)
def test_rings_of_the_streamed_kernel_turn_many_times(
    host: bindings.Context, format: str, tokens: int, splits: int, share: int, blocks: int
) -> None:
    """More blocks than slots, ranges of rows and inputs that do not divide; exact integers in every type."""
    rng, n, k = np.random.default_rng(7), 232, 7424
    w_NK = native.prune(rng.integers(-3, 4, (n, k)).astype(DTYPES[format]), rng)
    x_MK = rng.integers(-2, 3, (tokens, k)).astype(DTYPES[format])
    algorithm = (splits, 1, share, blocks, 3, 0, 0, 0)
    problem = structures.gemm("skinny", format, "fp16", n, k, tokens)
    y_MN = matmul(
        host, x_MK, native.aligned(skinny_layout.pack(w_NK, format)), format, "fp16", n, 0.25, algorithm=algorithm
    )
    ran = host.algorithm(problem)
    assert ran[1] == 1
    assert ran[0] >= splits
    np.testing.assert_array_equal(y_MN, (x_MK.astype(float) @ w_NK.astype(float).T * 0.25).astype(np.float16))


def violation(host: bindings.Context, w_NK: np.ndarray, format: str) -> tuple[int, int] | None:
    weight = native.aligned(w_NK)
    return c_api.first_violation(host, format, *w_NK.shape, weight.ctypes.data)


@pytest.mark.parametrize("format", sorted(DTYPES))
def test_third_nonzero_of_a_group_is_named(host: bindings.Context, format: str) -> None:
    w = np.zeros((20, 64), DTYPES[format])
    w[:, 1::2] = 1  # every group full
    assert violation(host, w, format) is None
    w[7, 40] = 1
    assert violation(host, w, format) == (7, 10)
    with pytest.raises(UserError, match=r"row 7, group 10 \(inputs 40 to 43\) has more than 2 nonzeros"):
        pack(host, w, format)


def test_negative_zero_is_a_zero_but_int8_minus_128_is_not(host: bindings.Context) -> None:
    w = np.full((1, 16), -0.0, np.float16)
    w[0, :2] = 1
    assert violation(host, w, "fp16") is None
    assert violation(host, np.full((1, 16), -128, np.int8), "int8") == (0, 0)


def gemm(**changes: object) -> structures.Gemm:
    values: dict[str, object] = {"kernel": "skinny", "format": "int8", "out": "fp16", "out_features": 16}
    return structures.gemm(**{**values, "in_features": 256, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("problem", "status", "algorithm"),
    [
        (gemm(in_features=250), "misaligned", "in_features=250 is not a multiple of 16 .* pad x and the weight to 256"),
        (gemm(tokens=65), "unsupported", "tokens=65: the skinny kernel takes 1 to 64; use cusparselt or cublaslt"),
        (gemm(tokens=0), "invalid argument", "tokens=0: at least 1"),
        (
            gemm(pitches=(255, 0)),
            "misaligned",
            "x_pitch=255 must be 256 or more, and a multiple of 16 .16 bytes.; copy",
        ),
        (gemm(pitches=(0, 20)), "misaligned", "y_pitch=20 must be 16 or more, and a multiple of 8"),
        (gemm(accumulate=True), "unsupported", "accumulate=1 of skinny: cublaslt alone adds to what y holds"),
        (gemm(out_features=0), "invalid argument", r"a weight cannot be \[0, 256\]"),
        (gemm(kernel="cusparselt"), "no GPU", "cusparselt runs on a GPU only"),
        (gemm(kernel="cublaslt"), "no GPU", "cublaslt runs on a GPU only"),
    ],
)
def test_problem_that_cannot_run(host: bindings.Context, problem: structures.Gemm, status: str, algorithm: str) -> None:
    with pytest.raises(bindings.LibraryError, match=algorithm) as caught:
        host.workspace_bytes(problem)
    assert caught.value.status == status
    assert "\n" not in str(caught.value)


def test_unknown_numbers_are_refused(host: bindings.Context) -> None:
    for field, value in (("kernel", 8), ("type", 4), ("out_type", 2)):
        problem = gemm()
        setattr(problem, field, value)
        with pytest.raises(bindings.LibraryError, match=f"{value} is not"):
            host.workspace_bytes(problem)


def test_workspace_that_is_too_small_and_pointer_off_alignment(host: bindings.Context) -> None:
    problem = gemm(in_features=1024, tokens=4)
    host.set_algorithm(problem, (4,) + (0,) * 7)
    needed = host.workspace_bytes(problem)
    assert needed > 0
    memory = native.aligned(np.zeros(max(needed, 16 * 1024) + 16, np.uint8))
    start = memory.ctypes.data
    with pytest.raises(
        bindings.LibraryError, match=f"needs {needed} bytes of workspace for 4 tokens, got {needed - 1}"
    ):
        host.matmul(problem, start, start, start, (start, needed - 1))
    with pytest.raises(bindings.LibraryError, match="not at a multiple of 16 bytes; copy it"):
        host.matmul(problem, start + 2, start, start, (start, needed))


def test_stamp_of_another_shape_gpu_or_version_is_refused(host: bindings.Context) -> None:
    problem = gemm()
    stamp = c_api.get_stamp(host, problem)
    c_api.check_stamp(host, problem, stamp)
    for field, value, algorithm in (
        ("out_features", 32, r"prepared for skinny, int8, \[32, 256\]; the call needs skinny, int8, \[16, 256\]"),
        ("sm", 89, "prepared for SM 89 and version 1, here are SM 0 and version 1; prepare it again"),
        ("version", 7, "version 7"),
    ):
        wrong = c_api.Stamp.from_buffer_copy(stamp)
        setattr(wrong, field, value)
        with pytest.raises(bindings.LibraryError, match=algorithm) as caught:
            c_api.check_stamp(host, problem, wrong)
        assert caught.value.status == "wrong build"
