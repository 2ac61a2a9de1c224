"""The torch operators on a CPU: torch's own checks of an operator, exact integers, and the errors a caller can make."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from plugins.autotune import timing
from plugins.common import numerics
from plugins.common.errors import UserError
from plugins.common.patterns import OF_EIGHT, skinny_kernel
from plugins.libtwofour import bindings, structures, torch_ops
from plugins.sparsity import skinny_layout
from plugins.sparsity.torch_packing import to_numpy
from tests.support import native
from tests.support.examples import examples

DTYPES = list(torch_ops.FORMATS)
CHECKS = ("test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration", "test_schema")


def operands(dtype: torch.dtype, n: int = 48, k: int = 96, tokens: int = 5, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """A 2:4 weight [n, k] without -0.0, and x [tokens, k]."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(n, k // 4, 4, generator=generator).argsort(-1) < 2
    scale = 40 if dtype == torch.int8 else 1
    w = (torch.randn(n, k, generator=generator) * scale).where(keep.view(n, k), 0)
    x = torch.randn(tokens, k, generator=generator) * scale
    if dtype == torch.int8:
        w, x = w.round().clamp(-128, 127), x.round().clamp(-128, 127)
    w = w.to(dtype).float()
    return w.where(w != 0, 0).to(dtype), x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_pass_torchs_own_checks(dtype: torch.dtype) -> None:
    w, x = operands(dtype)
    bias, scales = torch.randn(48).half(), torch.rand(48)
    # torch's schema check multiplies the operands, for which float8 has no kernel.
    checks = CHECKS[:3] if dtype == torch.float8_e4m3fn else CHECKS
    for op, weight in ((torch_ops.skinny_linear, torch_ops.prepare(w, "skinny")), (torch_ops.dense_linear, w)):
        arguments = (x, weight, 0.5, scales, bias, 48, torch.float16)
        torch.library.opcheck(op, arguments, test_utils=checks)
    if dtype in (torch.int8, torch.float8_e4m3fn):
        quantize = (torch.randn(3, 16).bfloat16(), torch.rand(16), dtype)
        torch.library.opcheck(torch_ops.quantize, quantize, test_utils=checks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", OF_EIGHT)
def test_operators_of_n_of_8_are_the_dense_product(pattern: str, dtype: torch.dtype) -> None:
    kernel, k = skinny_kernel(pattern), 256
    w, cpu = timing.random_sparse(48, k, dtype, torch.device("cpu"), pattern=pattern), torch.device("cpu")
    x, packed = timing.random_operand(5, k, dtype, cpu), torch_ops.prepare(w, kernel)
    arguments = (0.5, torch.rand(48), torch.randn(48).half(), 48, torch.float16)
    operator = torch_ops.OPERATORS[kernel]
    assert torch.equal(operator(x, packed, *arguments), torch_ops.dense_linear(x, w, *arguments))
    torch.library.opcheck(operator, (x, packed, *arguments), test_utils=CHECKS[:3])
    with pytest.raises(UserError, match="65 tokens: the skinny kernel takes 1 to 64; use dense_linear"):
        operator(x.expand(13, 5, k).reshape(65, k), packed, *arguments)
    w[3, 8:16] = 1
    with pytest.raises(UserError, match=rf"row 3, group 1 .* holds more than {pattern[0]} nonzeros"):
        torch_ops.prepare(w, kernel)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_write_into_slices_and_add_to_them(dtype: torch.dtype) -> None:
    w, x = operands(dtype)
    bias, scales, wide_x = torch.randn(48).half(), torch.rand(48), torch.cat([x, x], 1)
    expected = torch_ops.dense_linear(x, w, 0.5, scales, bias, 48, torch.float16)
    for kernel in ("skinny", "cublaslt"):
        y = torch.full((5, 80), 2.0, dtype=torch.float16)
        operand = torch_ops.prepare(w, kernel)
        torch_ops.linear_into(y[:, 16:64], wide_x[:, 96:], operand, kernel, 0.5, scales, bias, False)
        assert torch.equal(y[:, 16:64], expected)
        assert torch.equal(y[:, :16], y[:, 64:]), "beside the slice"
    torch_ops.linear_into(y[:, 16:64], x, w, "cublaslt", 0.5, scales, bias, True)
    torch.testing.assert_close(y[:, 16:64], 2 * expected, rtol=2**-10, atol=0.06)
    checks = CHECKS[:3] if dtype == torch.float8_e4m3fn else CHECKS
    torch.library.opcheck(
        torch_ops.linear_into, (y, x, torch.cat([w, w])[:80], "cublaslt", 0.5, None, None, True), test_utils=checks
    )
    for kernel, fragment in (
        ("skinny", "skinny cannot add to the values in y"),
        ("cusparselt", "readable on its GPU only"),
    ):
        with pytest.raises(UserError, match=fragment):
            torch_ops.linear_into(y, x, w, kernel, 0.5, None, None, kernel == "skinny")


def test_shapes_are_known_without_running() -> None:
    """What tracing needs of every operator on CUDA, cuSPARSELt's included, which no CPU can run."""
    with FakeTensorMode():
        x, weight = (torch.empty(*shape, dtype=torch.int8, device="cuda") for shape in ((70, 96), (48, 96)))
        for operator in (torch_ops.cusparselt_linear, torch_ops.skinny_linear, torch_ops.dense_linear):
            y = operator(x, weight, 1.0, None, None, 48, torch.bfloat16)
            assert (y.shape, y.dtype, y.device.type) == ((70, 48), torch.bfloat16, "cuda")
        q = torch_ops.quantize(torch.empty(3, 16, dtype=torch.bfloat16, device="cuda"), x, torch.float8_e4m3fn)
        assert (q.shape, q.dtype) == ((3, 16), torch.float8_e4m3fn)


def test_operators_compile_into_one_graph() -> None:
    w, x = operands(torch.int8)
    packed = torch_ops.prepare(w, "skinny")

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def layer(x: torch.Tensor) -> torch.Tensor:
        q = torch_ops.quantize(x, torch.ones(1), torch.int8)
        return torch_ops.skinny_linear(q, packed, 0.01, None, None, 48, torch.bfloat16) * 2

    for tokens in (5, 3):
        expected = torch_ops.skinny_linear(x[:tokens], packed, 0.01, None, None, 48, torch.bfloat16) * 2
        torch.testing.assert_close(layer(x[:tokens].bfloat16()), expected, rtol=0, atol=0)


@examples(40)
@given(
    dtype=st.sampled_from(DTYPES),
    n=st.integers(1, 70),
    quads=st.integers(1, 80),
    tokens=st.integers(0, 9),
    seed=st.integers(0, 1000),
)
def test_packed_and_dense_weights_give_the_same_bits(
    dtype: torch.dtype, n: int, quads: int, tokens: int, seed: int
) -> None:
    w, x = operands(dtype, n, 4 * quads, tokens, seed)
    rest = (0.125, None, torch.randn(n).bfloat16(), n, torch.bfloat16)
    y = torch_ops.skinny_linear(x, torch_ops.prepare(w, "skinny"), *rest)
    assert y.shape == (tokens, n)
    assert torch.equal(y, torch_ops.dense_linear(x, w, *rest))


def test_int8_is_exact() -> None:
    w, x = operands(torch.int8, 64, 256, 7)
    scales = torch.rand(64)
    y = torch_ops.skinny_linear(x, torch_ops.prepare(w, "skinny"), 1.0, scales, None, 64, torch.float16)
    sums = to_numpy(x).astype(np.int64) @ to_numpy(w).astype(np.int64).T
    expected = (sums.astype(np.float32) * scales.numpy()).astype(np.float16)
    np.testing.assert_array_equal(y.numpy(), expected)
    assert torch.equal(numerics.int8_linear(x, w, scales).half(), y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_libtwofours_simulated_kernel_agrees(dtype: torch.dtype) -> None:
    """The reference operator and the kernel's own source, run on the CPU, for the same packed bytes."""
    native.use_library()
    w, x = operands(dtype, 70, 272, 6)
    packed = torch_ops.prepare(w, "skinny")
    expected = torch_ops.skinny_linear(x, packed, 0.25, None, None, 70, torch.bfloat16)
    host = bindings.context(bindings.HOST)
    x_host, packed_host = native.aligned(to_numpy(x)), native.aligned(packed.numpy())
    y = native.aligned(np.zeros((6, 70), np.uint16))
    problem = structures.gemm("skinny", torch_ops.FORMATS[dtype], "bf16", 70, 272, 6, 0.25)
    workspace = native.aligned(np.zeros(host.workspace_bytes(problem) + 16, np.uint8))
    host.matmul(
        problem,
        x_host.ctypes.data,
        packed_host.ctypes.data,
        y.ctypes.data,
        (workspace.ctypes.data, workspace.nbytes),
    )
    got = torch.from_numpy(y.astype(np.int32)).to(torch.int16).view(torch.bfloat16)
    tolerance = {"rtol": 0, "atol": 0} if dtype == torch.int8 else {"rtol": 2**-7, "atol": 1e-4}
    torch.testing.assert_close(got, expected, **tolerance)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantize_is_the_reference(dtype: torch.dtype) -> None:
    x, multiplier = torch.randn(4, 32) * 300, torch.rand(32) + 0.5
    rounded = numerics.quantize_int8 if dtype == torch.int8 else numerics.quantize_fp8
    assert torch.equal(torch_ops.quantize(x, multiplier, dtype).float(), rounded(x, multiplier).float())


def test_weight_that_is_not_2to4_is_refused() -> None:
    w, _ = operands(torch.float16)
    w[3, 8:11] = 1
    with pytest.raises(UserError, match=r"row 3, group 2 .* holds more than 2 nonzeros"):
        torch_ops.prepare(w, "skinny")


def test_calls_that_cannot_run_name_what_can() -> None:
    w, x = operands(torch.float16, tokens=65)
    packed = torch_ops.prepare(w, "skinny")
    rest = (1.0, None, None, 48, torch.float16)
    with pytest.raises(UserError, match="65 tokens: the skinny kernel takes 1 to 64; use cusparselt_linear"):
        torch_ops.skinny_linear(x, packed, *rest)
    with pytest.raises(UserError, match="compressed by cuSPARSELt is readable on its GPU only"):
        torch_ops.cusparselt_linear(x, packed, *rest)
    with pytest.raises(UserError, match="cuSPARSELt compresses for the GPU it runs on"):
        torch_ops.prepare(w, "cusparselt")
    with pytest.raises(UserError, match=r"are not a packed fp16 weight \[48, 512\]: it has"):
        torch_ops.skinny_linear(torch.zeros(1, 512).half(), packed, *rest)
    with pytest.raises(UserError, match="no packed form for 'fp32'"):
        skinny_layout.pack(np.zeros((4, 4), np.float32), "fp32")
    with pytest.raises(UserError, match=r"no kernel takes torch.float32 to torch.float16"):
        torch_ops.describe("skinny", x.float(), 48, torch.float16)
    with pytest.raises(UserError, match=r"bias is torch.float16 \[3\]: it must be torch.bfloat16 \[48\]"):
        torch_ops.describe("skinny", x, 48, torch.bfloat16, bias=torch.zeros(3).half())
