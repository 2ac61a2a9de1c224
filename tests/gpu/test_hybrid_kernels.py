"""The hybrid kernels on a GPU: both parts of a weight in one launch, against float64 (int8 exactly), graphs and tuner.

fp8 comes first, as in test_kernels.py.
"""

from __future__ import annotations

import pytest
import torch

from plugins.autotune import choice, reuse, timing, tuner
from plugins.common.linear_shape import LinearShape
from plugins.common.patterns import HYBRID, Pattern
from plugins.libtwofour import bindings, hybrid_ops, torch_ops
from plugins.sparsity.segments import Axis
from tests.support.gpu_products import DEVICE, DTYPES, out_of

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=torch_ops.FORMATS.get)
each_pattern = pytest.mark.parametrize("pattern", HYBRID)
each_axis = pytest.mark.parametrize("axis", ["rows", "inputs"])


@pytest.fixture(autouse=True)
def _streams() -> None:
    if bindings.context(0).info().sm < 90:
        pytest.skip("the hybrid kernels need SM 90")


class Product:
    """A random weight [n, k] whose first `size` rows or inputs hold the pattern, and what multiplies by it."""

    def __init__(self, cut: hybrid_ops.Cut, dtype: torch.dtype, n: int, k: int) -> None:
        self.cut, self.dtype, self.n, self.k, self.out = cut, dtype, n, k, out_of(dtype)
        self.w = timing.random_operand(n, k, dtype, DEVICE)
        sparse = cut.split(self.w)[0]
        rows, columns = sparse.shape
        sparse.copy_(timing.random_sparse(rows, columns, dtype, DEVICE, pattern=cut.pattern))
        self.packed = hybrid_ops.prepare(self.w, cut)
        self.scale = 2.0**-9 if dtype.itemsize == 1 else 1.0

    def __call__(
        self, x: torch.Tensor, scales: torch.Tensor | None = None, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        y = torch.full((x.shape[0], self.n), torch.nan, device=DEVICE).to(self.out)
        hybrid_ops.hybrid_into(y, x, self.packed, *self.cut, self.scale, scales, bias)
        return y

    def check(self, tokens: int, scaled: bool = False, biased: bool = False) -> None:
        """Against float64, as tests/support/gpu_products.py checks the other kernels; int8 bit for bit."""
        x = timing.random_operand(tokens, self.k, self.dtype, DEVICE)
        scales = torch.rand(self.n, device=DEVICE) * self.scale if scaled else None
        bias = torch.randn(self.n, device=DEVICE).to(self.out) if biased else None
        y = self(x, scales, bias)
        factor = torch.tensor(self.scale, device=DEVICE) if scales is None else scales
        sums = x.double() @ self.w.double().T
        what = (self.cut, self.dtype, self.n, self.k, tokens, scaled, biased)
        if self.dtype == torch.int8:
            expected = sums.float() * factor
            expected = expected if bias is None else expected + bias.float()
            assert torch.equal(y, expected.to(self.out)), what
            return
        exact = sums * factor.double()
        exact = exact if bias is None else exact + bias.double()
        size = x.double().abs() @ self.w.double().abs().T * factor.double()
        epsilon = 2.0 ** (-10 if self.out == torch.float16 else -7)
        assert bool(((y.double() - exact).abs() <= epsilon * exact.abs() + 2.0**-17 * size + 1e-4).all()), what


@each_dtype
@each_axis
@each_pattern
def test_product_at_every_boundary(pattern: Pattern, axis: Axis, dtype: torch.dtype) -> None:
    for n, k in ((96, 512), (256, 800)):
        for size in (32, ((n if axis == "rows" else k) // 2) // 32 * 32, (n if axis == "rows" else k) - 32):
            product = Product(hybrid_ops.Cut(pattern, axis, size), dtype, n, k)
            for tokens in (1, 8, 9, 16, 17, 32, 64):
                product.check(tokens, scaled=tokens % 2 == 0, biased=tokens > 8)


@each_dtype
@each_axis
@each_pattern
def test_shapes_of_real_models(pattern: Pattern, axis: Axis, dtype: torch.dtype) -> None:
    """An eighth, a half and seven eighths of gate and up, or of down."""
    n, k = (28672, 4096) if axis == "rows" else (4096, 14336)
    side = n if axis == "rows" else k
    for eighths, tokens in ((1, 1), (4, 8), (7, 33)):
        Product(hybrid_ops.Cut(pattern, axis, side * eighths // 8), dtype, n, k).check(tokens)


@each_dtype
@each_axis
@each_pattern
def test_every_algorithm_gives_the_same_product(pattern: Pattern, axis: Axis, dtype: torch.dtype) -> None:
    context, product = bindings.context(0), Product(hybrid_ops.Cut(pattern, axis, 480), dtype, 992, 4096)
    for tokens in (1, 12, 40):
        x = timing.random_operand(tokens, 4096, dtype, DEVICE)
        problem = hybrid_ops.describe(product.cut, x, product.n, product.out, product.scale)
        algorithms = context.algorithms(problem)
        assert len(algorithms) > 1
        results = []
        for algorithm in algorithms:
            context.set_algorithm(problem, algorithm)
            product.check(tokens)
            results.append(product(x))
        if dtype == torch.int8:
            assert all(torch.equal(result, results[0]) for result in results)


@each_dtype
@each_axis
@each_pattern
def test_captured_products_replay_bit_for_bit(pattern: Pattern, axis: Axis, dtype: torch.dtype) -> None:
    """Beside others in x and y, which stay."""
    product = Product(hybrid_ops.Cut(pattern, axis, 256), dtype, 512, 2048)
    x, y = timing.random_operand(12, 2560, dtype, DEVICE), torch.ones(12, 768, device=DEVICE).to(product.out)
    arguments = (y[:, 256:], x[:, 512:], product.packed, *product.cut, product.scale, None, None)
    hybrid_ops.hybrid_into(*arguments)
    eager = y.clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hybrid_ops.hybrid_into(*arguments)
    for _ in range(20):
        y[:, 256:].zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, eager)
    assert torch.equal(y[:, 256:], product(x[:, 512:].contiguous()))
    assert bool((y[:, :256] == 1).all())


@each_dtype
@each_axis
def test_error_is_no_larger_than_the_dense_kernels(axis: Axis, dtype: torch.dtype) -> None:
    product = Product(hybrid_ops.Cut("2:4", axis, 1024), dtype, 2048, 4096)
    x = timing.random_operand(64, 4096, dtype, DEVICE)
    exact = x.double() @ product.w.double().T * product.scale
    dense = torch_ops.dense_linear(x, product.w, product.scale, None, None, 2048, product.out)
    errors = [float((y.double() - exact).norm() / exact.norm()) for y in (product(x), dense)]
    assert errors[0] <= 1.05 * errors[1], errors


@each_dtype
@each_axis
@each_pattern
def test_a_search_writes_nothing_but_y_and_its_workspace(pattern: Pattern, axis: Axis, dtype: torch.dtype) -> None:
    """Every algorithm of a real layer's product, between guards; the weights stay as they are."""
    n, k, guard = 4096, 8192, 1 << 16
    product = Product(hybrid_ops.Cut(pattern, axis, 2048), dtype, n, k)
    for tokens in (1, 40):
        x = timing.random_operand(tokens, k, dtype, DEVICE)
        before = [tensor.view(torch.uint8).clone() for tensor in (x, product.packed)]
        size = (64 << 20) + 4 * tokens * n
        place, y = (
            torch.full((bytes_ + 2 * guard,), 0xA5, dtype=torch.uint8, device=DEVICE)
            for bytes_ in (size, 2 * tokens * n)
        )
        problem = hybrid_ops.describe(product.cut, x, n, product.out, product.scale)
        stream, where = torch.cuda.current_stream().cuda_stream, (place.data_ptr() + guard, size)
        result = bindings.context(0).search(
            problem, x.data_ptr(), product.packed.data_ptr(), y.data_ptr() + guard, where, stream=stream
        )
        torch.cuda.synchronize()
        assert result.tried > 1
        for tensor, kept in zip((x, product.packed), before, strict=True):
            assert torch.equal(tensor.view(torch.uint8), kept)
        for guarded in (place, y):
            assert bool((guarded[:guard] == 0xA5).all())
            assert bool((guarded[-guard:] == 0xA5).all())


@each_axis
@each_pattern
def test_tuner_times_one_launch_and_its_tactics_are_taken_back(pattern: Pattern, axis: Axis) -> None:
    shape = choice.Hybrid.of(LinearShape(1024, 2048, "fp8", pattern=pattern), axis, 512)
    actual = tuner.tune({"layer": shape}, buckets=(1, 64, 128))
    buckets = actual["layers"]["layer"]["buckets"]
    assert all(bucket["measured"] and bucket["dense_us"] > 0 and bucket["sparse_us"] > 0 for bucket in buckets)
    assert reuse.apply(actual, "bf16") is None
