"""libtwofour_cpu against plain torch: every instruction set that this processor has, sizes off every alignment."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from plugins.autotune.timing import random_2to4
from plugins.common import numerics
from plugins.common.errors import UserError
from plugins.libtwofour import cpu, cpu_compiler
from plugins.linear.cpu_linear import CpuLinear, PackedEmbedding
from plugins.linear.torch_linear import Int8TokenLinear, Scales
from plugins.sparsity.torch_packing import pack

SHAPES = [(16, 32, 1), (40, 64, 3), (100, 100, 13), (5, 4, 1), (33, 36, 27), (960, 576, 2), (64, 1536, 40)]


@pytest.fixture(params=cpu.ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    best = cpu.isa()
    if cpu.ISAS.index(request.param) > cpu.ISAS.index(best):
        pytest.skip(f"this processor has no {request.param}")
    cpu.use_isa(request.param)
    yield request.param
    cpu.use_isa(best)


def weight(rows: int, columns: int, dtype: torch.dtype, sparse: bool) -> torch.Tensor:
    if sparse:
        return random_2to4(rows, columns, dtype, torch.device("cpu"))
    if dtype == torch.int8:
        return torch.randint(-128, 128, (rows, columns), dtype=torch.int8)  # -128 too
    return torch.randn(rows, columns).to(dtype)


def linear(w_NK: torch.Tensor, sparse: bool, scales: Scales | None, dtype: torch.dtype, bias: bool = True) -> CpuLinear:
    kept = pack(w_NK) if sparse else w_NK
    choices = ((1, "cpu-2of4" if sparse else "cpu-dense"),)
    bias_N = torch.randn(w_NK.shape[0]) if bias else None
    return CpuLinear(kept, (w_NK.shape[0], w_NK.shape[1]), scales, bias_N, dtype, choices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("rows", "columns", "tokens"), SHAPES)
def test_int8_equals_the_reference_bit_for_bit(
    isa: str, rows: int, columns: int, tokens: int, sparse: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    w_NK = weight(rows, columns, torch.int8, sparse)
    scales = Scales(torch.rand(rows), torch.tensor([0.02]), torch.rand(columns) + 0.5)
    x = torch.randn(tokens, columns).to(dtype)
    layer = linear(w_NK, sparse, scales, dtype)
    q_MK = numerics.quantize_int8(x.float(), scales.multiplier)
    sums = (q_MK.long() @ w_NK.long().T).float()
    expected = (sums * scales.product + layer._bias).to(dtype)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_int8_with_a_scale_a_token_rounds_each_by_its_own_largest(
    isa: str, sparse: bool, smoothed: bool, dtype: torch.dtype
) -> None:
    w_NK = weight(48, 64, torch.int8, sparse)
    smoothing = torch.rand(64) + 0.5 if smoothed else None
    scales = Scales(torch.tensor([0.01]), None, smoothing)
    x = (torch.randn(5, 64) * torch.tensor([[0.0], [1.0], [1e-3], [1e3], [7.0]])).to(dtype)
    smooth = x.float() * (1 if smoothing is None else smoothing)
    largest = smooth.abs().amax(1, keepdim=True)
    q_MK = numerics.quantize_int8(smooth, torch.where(largest > 0, 127 / largest, 0))
    expected = ((q_MK.float() @ w_NK.float().T) * torch.tensor(0.01) * (largest / 127)).to(dtype)
    assert torch.equal(linear(w_NK, sparse, scales, dtype, bias=False)(x), expected)
    on_torch = Int8TokenLinear(w_NK, scales, None, dtype)
    assert torch.equal(on_torch(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("rows", "columns", "tokens"), SHAPES)
def test_16_bit_and_fp8_agree_with_float64(
    isa: str, rows: int, columns: int, tokens: int, sparse: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    w_NK = weight(rows, columns, dtype, sparse)
    fp8 = dtype == torch.float8_e4m3fn
    scales = Scales(torch.tensor([0.1]), torch.tensor([0.02])) if fp8 else None
    x = torch.randn(tokens, columns).bfloat16()
    layer = linear(w_NK, sparse, scales, torch.bfloat16)
    inputs = numerics.quantize_fp8(x.float(), 1 / torch.tensor(0.02)).double() * 0.02 * 0.1 if fp8 else x.double()
    expected = inputs @ w_NK.double().T + layer._bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=2**-7, atol=1e-2)


def test_a_packed_weight_unpacks_to_itself() -> None:
    for form, dtype in (("int8", torch.int8), ("bf16", torch.bfloat16)):
        for sparse in (False, True):
            w_NK = weight(100, 36, dtype, sparse)
            layer = linear(w_NK, sparse, Scales(torch.ones(1), torch.ones(1)) if form == "int8" else None, dtype)
            out = torch.empty_like(w_NK)
            name = f"{form}-2of4" if sparse else form
            cpu.unpack(name, (100, 36), layer.problem(1).weight, out.data_ptr())
            assert torch.equal(out, w_NK)


def test_a_2of4_layer_holds_0625_of_its_int8_bytes_and_05625_of_its_bf16_ones() -> None:
    dense, sparse = cpu.weight_bytes("bf16", 4096, 4096), cpu.weight_bytes("bf16-2of4", 4096, 4096)
    assert sparse / dense == 0.5625
    offsets = 4 * 4096 + 64  # a row's sum, and whether a weight is -128
    assert (cpu.weight_bytes("int8-2of4", 4096, 4096) - offsets) / 4096**2 == 0.625


def test_an_embedding_reads_its_rows_from_the_packed_output_layer() -> None:
    w_NK = torch.randn(100, 36).bfloat16()
    ids = torch.tensor([[0, 99, 17], [31, 32, 5]])
    assert torch.equal(PackedEmbedding(linear(w_NK, False, None, torch.bfloat16))(ids), w_NK[ids])


def test_indices_that_do_not_ascend_are_refused() -> None:
    values, indices = pack(weight(8, 32, torch.int8, True))
    indices[3, 1] = 0b00000101
    scales = Scales(torch.ones(1), torch.ones(1))
    with pytest.raises(UserError, match="row 3, group 2: indices do not ascend"):
        CpuLinear((values, indices), (8, 32), scales, None, torch.float32, ((1, "cpu-2of4"),))


def test_threads_are_cut_to_the_processors_and_give_the_same_numbers() -> None:
    layer = linear(weight(4096, 512, torch.int8, True), True, Scales(torch.rand(4096), torch.ones(1)), torch.float32)
    x = torch.randn(3, 512) * 40
    assert cpu.set_threads(1) == 1
    alone = layer(x)
    threads = cpu.set_threads(1000)
    assert 1 <= threads <= len(__import__("os").sched_getaffinity(0))
    assert all(torch.equal(layer(x), alone) for _ in range(50))
    cpu.set_threads(1)


def test_calls_from_several_threads_at_once_are_right() -> None:
    layer = linear(weight(2048, 256, torch.int8, True), True, Scales(torch.rand(2048), torch.ones(1)), torch.float32)
    inputs = [torch.randn(2, 256) * 40 for _ in range(4)]
    expected = [layer(x) for x in inputs]
    wrong: list[int] = []

    def call(i: int) -> None:
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            if not torch.equal(layer(inputs[i]), expected[i]):
                wrong.append(i)

    cpu.set_threads(2)
    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    cpu.set_threads(1)
    assert not wrong


def test_a_missing_compiler_and_one_that_fails_are_reported(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"no C\+\+ compiler 'no-such-compiler': install g\+\+"):
        cpu_compiler.build(tmp_path)
    broken = tmp_path / "cxx"
    broken.write_text("#!/bin/sh\necho 'fatal error: it broke'; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(UserError, match="compiling libtwofour_cpu failed: fatal error: it broke"):
        cpu_compiler.build(tmp_path)


def test_without_a_library_layers_run_on_torch_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    from builder.engines.torch_backend.linears import Kernels

    monkeypatch.setenv("TWOFOUR_CPU_LIBRARY", "/nowhere/libtwofour_cpu.so")
    cpu.load.cache_clear()
    try:
        kernels = Kernels(None, torch.bfloat16, torch.device("cpu"))
        stored = {"weight_values": torch.zeros(4, 4, dtype=torch.int8)}
        assert kernels.choices("a", stored) is None
        assert kernels.choices("b", stored) is None
        assert len(kernels.remarks) == 1
        assert "2:4 layers run dense on torch's products: cannot load" in kernels.remarks[0]
    finally:
        cpu.load.cache_clear()


def test_the_binding_imports_no_torch() -> None:
    script = "import sys, plugins.libtwofour.cpu; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
