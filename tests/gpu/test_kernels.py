"""libtwofour on a GPU: every kernel, format and epilogue against float64, graphs, packing, and what must be refused.

Each pair of kernel and format has an outcome of its own; fp8 comes first.
"""

from __future__ import annotations

import os

import pytest
import torch

from plugins.autotune import reuse, timing, tuner
from plugins.common import numerics
from plugins.common.linear_shape import LinearShape
from plugins.libtwofour import bindings, structures, torch_ops
from plugins.sparsity import skinny_layout
from plugins.sparsity.torch_packing import to_numpy
from tests.support import c_api
from tests.support.gpu_products import DEVICE, DTYPES, OPERATORS, check, out_of, refused

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=torch_ops.FORMATS.get)
each_kernel = pytest.mark.parametrize("kernel", ["skinny", "cusparselt", "cublaslt"])
each_sparse_kernel = pytest.mark.parametrize("kernel", ["skinny", "cusparselt"])


@each_dtype
@each_kernel
def test_slices_of_wider_matrices(kernel: str, dtype: torch.dtype) -> None:
    """Beside others in x and y, and added to what y holds, as the parts of a hybrid layer are."""
    out = out_of(dtype)
    w = timing.random_sparse(512, 1024, dtype, DEVICE)
    for tokens in (1, 3, 16, 64):
        wide_x, y = timing.random_operand(tokens, 1536, dtype, DEVICE), torch.ones(tokens, 768, device=DEVICE).to(out)
        weight, scale = torch_ops.prepare(w, kernel), 2.0**-9 if dtype.itemsize == 1 else 1.0
        expected = OPERATORS[kernel](wide_x[:, 512:].contiguous(), weight, scale, None, None, 512, out).float()
        torch_ops.linear_into(y[:, 256:], wide_x[:, 512:], weight, kernel, scale, None, None, False)
        torch.testing.assert_close(y[:, 256:].float(), expected, rtol=2**-6, atol=2**-6 * float(expected.abs().max()))
        if kernel == "cublaslt":
            torch_ops.linear_into(y[:, 256:], wide_x[:, 512:], weight, kernel, scale, None, None, True)
            atol = 2**-5 * float(expected.abs().max())
            torch.testing.assert_close(y[:, 256:].float(), 2 * expected, rtol=2**-6, atol=atol)
        assert bool((y[:, :256] == 1).all()), (kernel, dtype, tokens)


@each_dtype
@each_kernel
def test_product_with_every_epilogue(kernel: str, dtype: torch.dtype) -> None:
    for scaled in (False, True):
        for biased in (False, True):
            check(kernel, dtype, 512, 1024, 16, scaled, biased)


@each_dtype
@each_kernel
def test_token_counts_on_and_off_alignment(kernel: str, dtype: torch.dtype) -> None:
    for tokens in (1, 2, 7, 8, 9, 16, 17, 31, 33, 64) if kernel == "skinny" else (1, 7, 16, 33, 100, 257):
        check(kernel, dtype, 256, 512, tokens, False, kernel != "skinny")


@each_dtype
def test_shapes_off_the_skinny_kernels_blocks(dtype: torch.dtype) -> None:
    for n, k in ((16, 16), (17, 272), (100, 528), (1000, 2000), (130, 4112)):
        check("skinny", dtype, n, k, 5, True, True)


@each_dtype
@pytest.mark.parametrize(
    ("kernel", "n", "k", "tokens"),
    [("skinny", 14336, 4096, 8), ("skinny", 4096, 14336, 33), ("cusparselt", 4096, 14336, 512)],
)
def test_shapes_of_real_models(kernel: str, n: int, k: int, tokens: int, dtype: torch.dtype) -> None:
    check(kernel, dtype, n, k, tokens, False, False)


def test_every_split_gives_the_same_integers() -> None:
    context, w = bindings.context(0), timing.random_sparse(200, 4096, torch.int8, DEVICE)
    x, packed = timing.random_operand(12, 4096, torch.int8, DEVICE), torch_ops.prepare(w, "skinny")
    problem = torch_ops.describe("skinny", x, 200, torch.bfloat16, 1e-3)
    results = []
    for splits in (1, 2, 3, 5, 8, 16):
        context.set_algorithm(problem, (splits,) + (0,) * 7)
        results.append(torch_ops.skinny_linear(x, packed, 1e-3, None, None, 200, torch.bfloat16))
    assert all(torch.equal(result, results[0]) for result in results)


@each_dtype
def test_packing_on_the_device_is_numpys(dtype: torch.dtype) -> None:
    w = timing.random_sparse(70, 528, dtype, DEVICE)
    packed = torch_ops.prepare(w, "skinny")
    expected = skinny_layout.pack(to_numpy(w), torch_ops.FORMATS[dtype])
    assert torch.equal(packed.cpu(), torch.from_numpy(expected))
    unpacked = torch.empty_like(w)
    problem = structures.gemm("skinny", torch_ops.FORMATS[dtype], "bf16", 70, 528)
    c_api.unpack_weight(bindings.context(0), problem, packed.data_ptr(), unpacked.data_ptr())
    torch.cuda.synchronize()
    assert torch.equal(unpacked.view(torch.uint8), w.view(torch.uint8))


@each_sparse_kernel
def test_negative_zeros_change_nothing(kernel: str) -> None:
    w = timing.random_sparse(256, 512, torch.float16, DEVICE)
    negative = torch.where(w == 0, -torch.zeros_like(w), w)
    x = timing.random_operand(48, 512, torch.float16, DEVICE)
    y = [OPERATORS[kernel](x, torch_ops.prepare(v, kernel), 1.0, None, None, 256, torch.float16) for v in (w, negative)]
    assert torch.equal(*y)


@each_sparse_kernel
def test_weight_that_is_not_2to4_is_named(kernel: str) -> None:
    w = timing.random_sparse(64, 128, torch.bfloat16, DEVICE)
    w[9, 20:24] = 1
    assert "row 9, group 5 (inputs 20 to 23) has more than 2 nonzeros" in refused(lambda: torch_ops.prepare(w, kernel))


def test_shapes_that_cusparselt_cannot_take_say_what_works() -> None:
    w = timing.random_sparse(100, 200, torch.bfloat16, DEVICE)
    assert "[100, 200] would fit as [112, 208]" in refused(lambda: torch_ops.prepare(w, "cusparselt"))


def test_stamp_of_another_gpu_is_refused() -> None:
    context, problem = bindings.context(0), structures.gemm("cusparselt", "bf16", "bf16", 128, 128)
    stamp = c_api.get_stamp(context, problem)
    c_api.check_stamp(context, problem, stamp)
    assert stamp.version >= int(os.environ.get("TWOFOUR_CUSPARSELT_OLDEST", "801"))
    stamp.sm = 75
    assert "prepared for SM 75" in refused(lambda: c_api.check_stamp(context, problem, stamp))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=torch_ops.FORMATS.get)
@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_quantize_is_the_reference(x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    x = (torch.randn(37, 128, device=DEVICE) * 200).to(x_dtype)
    for multiplier in (torch.full((1,), 0.7, device=DEVICE), torch.rand(128, device=DEVICE) + 0.5):
        rounded = numerics.quantize_int8 if dtype == torch.int8 else numerics.quantize_fp8
        expected = rounded(x.float(), multiplier)
        assert torch.equal(torch_ops.quantize(x, multiplier, dtype).float(), expected.float())


@each_dtype
@each_kernel
def test_captured_products_replay_bit_for_bit(kernel: str, dtype: torch.dtype) -> None:
    w = timing.random_sparse(512, 2048, dtype, DEVICE)
    prepared, x = torch_ops.prepare(w, kernel), timing.random_operand(12, 2048, dtype, DEVICE)
    arguments = (prepared, 1.0, None, None, 512, out_of(dtype))
    eager = OPERATORS[kernel](x, *arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = OPERATORS[kernel](x, *arguments)
    for _ in range(20):
        y.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, eager)


def test_capturing_without_a_plan_is_refused_with_words() -> None:
    context = bindings.Context(0)  # a fresh one: no plans
    w, x = (timing.random_sparse(256, 256, torch.bfloat16, DEVICE) for _ in range(2))
    compressed, y = torch_ops.prepare(w, "cusparselt"), torch.empty(256, 256, dtype=torch.bfloat16, device=DEVICE)
    problem = torch_ops.describe("cusparselt", x, 256, torch.bfloat16)
    context.weight_bytes(problem)  # opens cuSPARSELt, which no capture survives
    workspace = torch.empty(64 << 20, dtype=torch.uint8, device=DEVICE)
    where = (workspace.data_ptr(), workspace.nbytes)
    message = ""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stream = torch.cuda.current_stream().cuda_stream
        y.zero_()
        message = refused(
            lambda: context.matmul(problem, x.data_ptr(), compressed.data_ptr(), y.data_ptr(), where, stream)
        )
    assert "the stream is capturing; call twofour_plan first" in message
    context.close()


def test_search_keeps_an_algorithm_and_counts_what_memory_left_out() -> None:
    context, w = bindings.context(0), timing.random_sparse(1024, 1024, torch.bfloat16, DEVICE)
    x, compressed = timing.random_operand(128, 1024, torch.bfloat16, DEVICE), torch_ops.prepare(w, "cusparselt")
    y = torch.empty(128, 1024, dtype=torch.bfloat16, device=DEVICE)
    problem = torch_ops.describe("cusparselt", x, 1024, torch.bfloat16)
    workspace = torch.empty(64 << 20, dtype=torch.uint8, device=DEVICE)
    place = (workspace.data_ptr(), workspace.nbytes)
    result = context.search(problem, x.data_ptr(), compressed.data_ptr(), y.data_ptr(), place)
    assert result.tried > 0
    assert result.best_us > 0
    assert context.algorithm(problem) in context.algorithms(problem)
    torch.testing.assert_close(y, (x.float() @ w.float().T).bfloat16(), rtol=2e-2, atol=0.5)


def test_tuner_measures_and_its_tactics_are_taken_back() -> None:
    actual = tuner.tune({"layer": LinearShape(512, 1024, "bf16")}, buckets=(1, 64))
    for bucket in actual["layers"]["layer"]["buckets"]:
        assert bucket["measured"]
        assert bucket["dense_us"] > 0
        assert bucket["sparse_us"] > 0
    assert reuse.apply(actual, "bf16") is None
    assert "build the engine again" in str(reuse.apply({**actual, "source": "predicted"}, "bf16"))


def test_layer_compiles_into_one_graph() -> None:
    from plugins.linear.kernel_linear import SKINNY_THEN_CUSPARSELT, KernelLinear

    w = timing.random_sparse(512, 512, torch.bfloat16, DEVICE)
    layer = KernelLinear(w, None, None, torch.bfloat16, SKINNY_THEN_CUSPARSELT)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in (4, 128):
        x = timing.random_operand(tokens, 512, torch.bfloat16, DEVICE)
        assert torch.equal(compiled(x), layer(x))


@each_kernel
def test_operators_pass_torchs_own_checks(kernel: str) -> None:
    checks = ("test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")
    w, x = (timing.random_sparse(64, 64, torch.bfloat16, DEVICE) for _ in range(2))
    arguments = (x, torch_ops.prepare(w, kernel), 1.0, None, None, 64, torch.bfloat16)
    torch.library.opcheck(OPERATORS[kernel], arguments, test_utils=checks)


@each_dtype
@each_sparse_kernel
def test_error_is_no_larger_than_the_dense_kernels(kernel: str, dtype: torch.dtype) -> None:
    w, x = timing.random_sparse(2048, 4096, dtype, DEVICE), timing.random_operand(64, 4096, dtype, DEVICE)
    scale = 1e-3 if dtype in (torch.int8, torch.float8_e4m3fn) else 1.0
    exact = x.double() @ w.double().T * scale
    error = {}
    for name in (kernel, "cublaslt"):
        y = OPERATORS[name](x, torch_ops.prepare(w, name), scale, None, None, 2048, out_of(dtype))
        error[name] = float((y.double() - exact).norm() / exact.norm())
    assert error[kernel] <= 1.05 * error["cublaslt"], error


@each_dtype
@each_kernel
@pytest.mark.parametrize("tokens", [1, 16])
def test_a_search_writes_nothing_but_y_and_its_workspace(kernel: str, dtype: torch.dtype, tokens: int) -> None:
    """Every algorithm of a real layer's product, between guards; the weights stay as they are."""
    n, k, guard = 8192, 8192, 1 << 16
    w, x = timing.random_sparse(n, k, dtype, DEVICE), timing.random_operand(tokens, k, dtype, DEVICE)
    prepared, out = torch_ops.prepare(w, kernel), out_of(dtype)
    before = [t.view(torch.uint8).clone() for t in (w, x, prepared)]
    size = (64 << 20) + 4 * tokens * n
    place, y = (
        torch.full((bytes_ + 2 * guard,), 0xA5, dtype=torch.uint8, device=DEVICE) for bytes_ in (size, 2 * tokens * n)
    )
    scale = 2.0**-9 if dtype in DTYPES[:2] else 1.0
    problem = torch_ops.describe(kernel, x, n, out, scale)
    stream = torch.cuda.current_stream().cuda_stream
    workspace = (place.data_ptr() + guard, size)
    bindings.context(0).search(
        problem, x.data_ptr(), prepared.data_ptr(), y.data_ptr() + guard, workspace, stream=stream
    )
    torch.cuda.synchronize()
    for tensor, kept in zip((w, x, prepared), before, strict=True):
        assert torch.equal(tensor.view(torch.uint8), kept)
    for guarded in (place, y):
        assert bool((guarded[:guard] == 0xA5).all())
        assert bool((guarded[-guard:] == 0xA5).all())
