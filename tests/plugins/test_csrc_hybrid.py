"""libtwofour's hybrid kernels, one launch for both parts of a weight: packing against numpy, simulated products."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugins.common.errors import UserError
from plugins.common.patterns import HYBRID, TENSOR_CORE, hybrid_kernel, keep_and_group
from plugins.libtwofour import bindings, structures
from plugins.sparsity import skinny_layout, skinny_layout_dense, skinny_layout_of8
from tests.support import c_api, native
from tests.support.examples import examples
from tests.support.skinny import DTYPES, OUT, SCALE, check_product, poison, random_values

each_format = pytest.mark.parametrize("format", sorted(DTYPES))
each_pattern = pytest.mark.parametrize("pattern", HYBRID)
each_axis = pytest.mark.parametrize("axis", [0, 1], ids=["rows", "inputs"])
algorithms = st.tuples(st.integers(1, 6), st.just(1), st.integers(1, 2), st.integers(1, 5), st.integers(0, 5))


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    native.use_library()


@pytest.fixture(scope="module")
def host() -> bindings.Context:
    return bindings.Context(bindings.HOST)


class Case:
    """A weight [n, k] whose first `sparse` rows (axis 0) or inputs (axis 1) hold the pattern."""

    def __init__(
        self, pattern: str, format: str, shape: tuple[int, int], axis: int, sparse: int, rng: np.random.Generator
    ) -> None:
        self.pattern, self.format, self.axis, self.rng = pattern, format, axis, rng
        self.shape, self.sizes = shape, (sparse, 0) if axis == 0 else (0, sparse)
        self.w_NK = random_values(shape, format, rng)
        part = self.w_NK[:sparse] if axis == 0 else self.w_NK[:, :sparse]
        keep, group = keep_and_group(pattern)
        places = rng.random((*part.shape[:1], part.shape[1] // group, group)).argsort(-1)
        kept = places < rng.integers(0, keep + 1, (*places.shape[:2], 1))
        part[~kept.reshape(part.shape)] = 0
        self.sparse, self.dense = np.split(self.w_NK, [sparse], axis)

    def problem(self, tokens: int = 1, out: str = "fp16", **more: object) -> structures.Gemm:
        kernel = hybrid_kernel(self.pattern)
        return structures.gemm(kernel, self.format, out, *self.shape, tokens, sparse=self.sizes, **more)  # type: ignore[arg-type]

    def pack(self, host: bindings.Context) -> np.ndarray:
        packed = native.aligned(np.full(host.weight_bytes(self.problem()), 0xCD, np.uint8))
        weight = native.aligned(self.w_NK)
        host.prepare_weight(self.problem(), weight.ctypes.data, packed.ctypes.data)
        return packed

    def check(
        self,
        host: bindings.Context,
        tokens: int,
        algorithm: tuple[int, ...] | None,
        out: str = "bf16",
        scaled: bool = True,
        biased: bool = True,
    ) -> None:
        """The product against float64, of slices of wider x and y, twice: counters and other columns stay."""
        (n, k), wide = self.shape, 32
        x, y = native.aligned(random_values((tokens, k + wide), self.format, self.rng)), None
        scales = self.rng.uniform(1e-3, 2e-3, n).astype(np.float32) if scaled else None
        bias = native.aligned(self.rng.standard_normal(n).astype(OUT[out])) if biased else None
        y_pitch = -(-n // 8) * 8 + wide
        addresses = {"channel_scales": scales, "bias": bias}
        problem = self.problem(
            tokens,
            out,
            scale=SCALE,
            pitches=(k + wide, y_pitch),
            **{name: 0 if array is None else array.ctypes.data for name, array in addresses.items()},
        )
        if algorithm is not None:
            host.set_algorithm(problem, algorithm + (0,) * (8 - len(algorithm)))
        packed = self.pack(host)
        for _ in range(2):
            y = native.aligned(np.full((tokens, y_pitch), 99, OUT[out]))
            workspace = native.aligned(np.full(host.workspace_bytes(problem), 0xCD, np.uint8))
            place = (workspace.ctypes.data, workspace.nbytes)
            host.matmul(problem, x[:, wide:].ctypes.data, packed.ctypes.data, y[:, 16:].ctypes.data, place)
            assert (y[:, :16] == 99).all()
            assert (y[:, n + 16 :] == 99).all()
            check_product(y[:, 16 : n + 16], x[:, wide:], self.w_NK, (self.format, out), scales, bias)


@examples(40)
@given(
    pattern=st.sampled_from(HYBRID),
    format=st.sampled_from(sorted(DTYPES)),
    n=st.integers(2, 150),
    chunks=st.integers(2, 40),
    axis=st.integers(0, 1),
    part=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_packing_is_that_of_both_parts_by_numpy_and_inverts(
    pattern: str, format: str, n: int, chunks: int, axis: int, part: float, seed: int
) -> None:
    host, rng, each = (
        bindings.context(bindings.HOST),
        np.random.default_rng(seed),
        16 // np.dtype(DTYPES[format]).itemsize,
    )
    sparse = 1 + int(part * (n - 2)) if axis == 0 else each * (1 + int(part * (chunks - 2)))
    case = Case(pattern, format, (n, chunks * each), axis, sparse, rng)
    case.w_NK[...] = poison(case.w_NK, format, rng)
    packed = case.pack(host)
    if pattern == TENSOR_CORE:
        first = skinny_layout.pack(np.ascontiguousarray(case.sparse), format)
    else:
        first = skinny_layout_of8.pack(np.ascontiguousarray(case.sparse), format, pattern)
    np.testing.assert_array_equal(packed, np.concatenate([first, skinny_layout_dense.pack(case.dense, format)]))

    bits = case.w_NK.view(f"u{case.w_NK.itemsize}")
    sign = 0 if format == "int8" else 1 << (8 * case.w_NK.itemsize - 1)
    canonical = np.where(bits == sign, 0, bits)  # -0.0 comes back as 0
    unpacked = native.aligned(np.full_like(case.w_NK, 1))
    c_api.unpack_weight(host, case.problem(), packed.ctypes.data, unpacked.ctypes.data)
    np.testing.assert_array_equal(unpacked.view(bits.dtype), canonical)
    dense = skinny_layout_dense.unpack(packed[first.size :], *case.dense.shape, format)
    np.testing.assert_array_equal(dense, np.split(canonical, [sparse], axis)[1])


@examples(80)
@given(
    pattern=st.sampled_from(HYBRID),
    format=st.sampled_from(sorted(DTYPES)),
    n=st.integers(2, 150),
    chunks=st.integers(2, 60),
    axis=st.integers(0, 1),
    part=st.floats(0, 1),
    tokens=st.integers(1, 64),
    algorithm=algorithms,
    out=st.sampled_from(sorted(OUT)),
    seed=st.integers(0, 2**32 - 1),
)
def test_simulated_kernel_against_float64(
    pattern: str,
    format: str,
    n: int,
    chunks: int,
    axis: int,
    part: float,
    tokens: int,
    algorithm: tuple[int, ...],
    out: str,
    seed: int,
) -> None:
    """Any boundary, from one row or 16 bytes of inputs on either side."""
    host, rng, each = (
        bindings.context(bindings.HOST),
        np.random.default_rng(seed),
        16 // np.dtype(DTYPES[format]).itemsize,
    )
    sparse = 1 + int(part * (n - 2)) if axis == 0 else each * (1 + int(part * (chunks - 2)))
    case = Case(pattern, format, (n, chunks * each), axis, sparse, rng)
    case.check(host, tokens, algorithm, out, bool(seed % 2), bool(seed % 3))


@each_axis
@each_format
@each_pattern
@pytest.mark.parametrize("tokens", [1, 8, 17, 64])
def test_boundaries_at_the_least_multiple_on_either_side(
    host: bindings.Context, pattern: str, format: str, axis: int, tokens: int
) -> None:
    """Segments are multiples of 32: all but 32 rows or inputs dense, and all but 32 sparse; and by default."""
    shape = (96, 512) if axis == 0 else (48, 800)
    for sparse in (32, shape[axis] - 32):
        case = Case(pattern, format, shape, axis, sparse, np.random.default_rng(sparse))
        for algorithm in (None, (1, 1, 1, 1), (3, 1, 1, 2)):
            case.check(host, tokens, algorithm)


@each_axis
@pytest.mark.parametrize(
    ("format", "tokens", "splits", "share", "blocks"),
    [("fp8", 1, 1, 1, 1), ("fp8", 8, 3, 1, 2), ("int8", 13, 1, 1, 2), ("int8", 40, 4, 1, 1), ("bf16", 7, 2, 2, 1)],
)
def test_rings_turn_many_times(
    host: bindings.Context, axis: int, format: str, tokens: int, splits: int, share: int, blocks: int
) -> None:
    """More blocks than slots, ranges of rows and inputs that do not divide."""
    case = Case("2:4", format, (232, 7424), axis, (104, 3488)[axis], np.random.default_rng(7))
    case.check(host, tokens, (splits, 1, share, blocks, 3))
    ran = host.algorithm(case.problem(tokens, "bf16"))
    assert ran[1] == 1
    assert ran[0] >= splits


@each_axis
@each_format
@each_pattern
def test_each_input_meets_its_own_weight(host: bindings.Context, pattern: str, format: str, axis: int) -> None:
    """Rows of x are unit vectors: y is the weight itself, column by column."""
    rng, n, k = np.random.default_rng(11), 40, 320
    case = Case(pattern, format, (n, k), axis, (24, 192)[axis], rng)
    case.w_NK[...] = np.where(case.w_NK.astype(float) == 0, 0, rng.integers(1, 9, (n, k))).astype(DTYPES[format])
    packed = case.pack(host)
    for first in range(0, k, 64):
        x = native.aligned(np.eye(k)[first : first + 64].astype(DTYPES[format]))
        y = native.aligned(np.full((64, n), np.nan, np.float16))
        problem = case.problem(64)
        workspace = native.aligned(np.zeros(host.workspace_bytes(problem), np.uint8))
        place = (workspace.ctypes.data, workspace.nbytes)
        host.matmul(problem, x.ctypes.data, packed.ctypes.data, y.ctypes.data, place)
        np.testing.assert_array_equal(y.astype(float), case.w_NK.astype(float)[:, first : first + 64].T)


@each_axis
def test_algorithms_divide_the_work_in_several_ways(host: bindings.Context, axis: int) -> None:
    case = Case("2:4", "int8", (96, 1024), axis, 32, np.random.default_rng(0))
    algorithms = host.algorithms(case.problem(8))
    assert {words[0] for words in algorithms} == {1, 2, 3, 4}
    assert {words[1] for words in algorithms} == {1}
    for algorithm in algorithms:
        case.check(host, 8, algorithm)


@each_pattern
def test_one_nonzero_too_many_is_named_in_the_sparse_part_alone(host: bindings.Context, pattern: str) -> None:
    keep, group = keep_and_group(pattern)
    for axis, (row, first) in ((0, (7, 48)), (1, (40, 24))):
        case = Case(pattern, "int8", (48, 64), axis, 32, np.random.default_rng(0))
        case.pack(host)
        case.w_NK[row, first : first + keep + 1] = 1
        message = rf"not {pattern}: row {row}, group {first // group} .* has more than {keep} nonzeros"
        with pytest.raises(UserError, match=message):
            case.pack(host)


@pytest.mark.parametrize(
    ("sizes", "tokens", "status", "message"),
    [
        ((0, 0), 1, "invalid argument", r"sparse_rows=0 and sparse_inputs=0 of \[64, 256\]: one must be 0"),
        ((32, 32), 1, "invalid argument", "sparse_rows=32 and sparse_inputs=32"),
        ((64, 0), 1, "invalid argument", "the other a part of its side"),
        ((0, 256), 1, "invalid argument", "the other a part of its side"),
        ((-1, 0), 1, "invalid argument", "sparse_rows=-1"),
        ((0, 24), 1, "misaligned", r"sparse_inputs=24 is not a multiple of 16 \(16 bytes of int8\)"),
        ((32, 0), 65, "unsupported", "tokens=65: the hybrid kernel takes 1 to 64; use cublaslt"),
    ],
)
def test_problem_that_cannot_run(
    host: bindings.Context, sizes: tuple[int, int], tokens: int, status: str, message: str
) -> None:
    problem = structures.gemm("hybrid", "int8", "fp16", 64, 256, tokens, sparse=sizes)
    with pytest.raises(bindings.LibraryError, match=message) as caught:
        host.workspace_bytes(problem)
    assert caught.value.status == status


def test_what_the_hybrid_kernel_lacks_is_refused(host: bindings.Context) -> None:
    """A staged variant, a stamp, and shared memory for more inputs than fit in 32 splits."""
    problem = structures.gemm("hybrid", "int8", "fp16", 64, 256, sparse=(32, 0))
    with pytest.raises(bindings.LibraryError, match=r"variant 0 of the hybrid kernel: it is streamed \(1\)"):
        host.set_algorithm(problem, (1,) + (0,) * 7)
    with pytest.raises(bindings.LibraryError, match="a weight of hybrid has no stamp: prepare it where it runs"):
        c_api.get_stamp(host, problem)
    wide = structures.gemm("hybrid", "bf16", "bf16", 32, 1 << 20, 64, sparse=(16, 0))
    with pytest.raises(bindings.LibraryError, match="hybrid: x of 1048576 inputs does not fit the shared memory"):
        host.workspace_bytes(wide)
