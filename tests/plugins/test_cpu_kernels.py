"""libtwofour_cpu against plain torch: every instruction set that this processor has, sizes off every alignment."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import product

import pytest
import torch

from plugins.autotune.timing import random_sparse
from plugins.common import numerics
from plugins.common.errors import UserError
from plugins.common.patterns import bytes_per_weight, cpu_kernel, short_name
from plugins.libtwofour import cpu, cpu_compiler
from plugins.linear.cpu_linear import CpuLinear, PackedEmbedding
from plugins.linear.torch_linear import Int8TokenLinear, Scales
from plugins.sparsity.torch_packing import pack

SHAPES = [(16, 32, 1), (40, 64, 3), (100, 104, 13), (5, 8, 1), (33, 40, 27), (960, 576, 2), (64, 1536, 40), (7, 72, 64)]
HALF_GROUPS = [(100, 100, 13), (5, 4, 1), (33, 36, 27)]  # rows of a multiple of 4, not of 8
PATTERNS = [None, "2:4", "4:8", "5:8", "6:8"]
PROBLEMS = [
    *((*shape, pattern) for shape in SHAPES for pattern in PATTERNS),
    *((*shape, pattern) for shape in HALF_GROUPS for pattern in PATTERNS[:2]),
]


@pytest.fixture(params=cpu.ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    best = cpu.isa()
    if cpu.ISAS.index(request.param) > cpu.ISAS.index(best):
        pytest.skip(f"this processor has no {request.param}")
    cpu.use_isa(request.param)
    yield request.param
    cpu.use_isa(best)


def weight(rows: int, columns: int, dtype: torch.dtype, pattern: str | None) -> torch.Tensor:
    if pattern:
        return random_sparse(rows, columns, dtype, torch.device("cpu"), pattern=pattern)
    if dtype == torch.int8:
        return torch.randint(-128, 128, (rows, columns), dtype=torch.int8)  # -128 too
    return torch.randn(rows, columns).to(dtype)


def linear(
    w_NK: torch.Tensor, pattern: str | None, scales: Scales | None, dtype: torch.dtype, bias: bool = True
) -> CpuLinear:
    kept = pack(w_NK, pattern) if pattern else w_NK
    choices = ((1, cpu_kernel(pattern) if pattern else "cpu-dense"),)
    bias_N = torch.randn(w_NK.shape[0]) if bias else None
    return CpuLinear(kept, scales, bias_N, dtype, choices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns", "tokens", "pattern"), PROBLEMS)
def test_int8_equals_the_reference_bit_for_bit(
    isa: str, rows: int, columns: int, tokens: int, pattern: str | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    w_NK = weight(rows, columns, torch.int8, pattern)
    scales = Scales(torch.rand(rows), torch.tensor([0.02]), torch.rand(columns) + 0.5)
    x = torch.randn(tokens, columns).to(dtype)
    layer = linear(w_NK, pattern, scales, dtype)
    q_MK = numerics.quantize_int8(x.float(), scales.multiplier)
    sums = (q_MK.long() @ w_NK.long().T).float()
    expected = (sums * scales.product + layer._bias).to(dtype)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_int8_with_a_scale_a_token_rounds_each_by_its_own_largest(
    isa: str, pattern: str | None, smoothed: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    w_NK = weight(48, 64, torch.int8, pattern)
    smoothing = torch.rand(64) + 0.5 if smoothed else None
    scales = Scales(torch.tensor([0.01]), None, smoothing)
    x = (torch.randn(5, 64) * torch.tensor([[0.0], [1.0], [1e-3], [1e3], [7.0]])).to(dtype)
    smooth = x.float() * (1 if smoothing is None else smoothing)
    largest = smooth.abs().amax(1, keepdim=True)
    q_MK = numerics.quantize_int8(smooth, torch.where(largest > 0, 127 / largest, 0))
    expected = ((q_MK.float() @ w_NK.float().T) * torch.tensor(0.01) * (largest / 127)).to(dtype)
    assert torch.equal(linear(w_NK, pattern, scales, dtype, bias=False)(x), expected)
    on_torch = Int8TokenLinear(w_NK, scales, None, dtype)
    assert torch.equal(on_torch(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(("rows", "columns", "tokens", "pattern"), PROBLEMS)
def test_16_bit_and_fp8_agree_with_float64(
    isa: str, rows: int, columns: int, tokens: int, pattern: str | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    w_NK = weight(rows, columns, dtype, pattern)
    fp8 = dtype == torch.float8_e4m3fn
    scales = Scales(torch.tensor([0.1]), torch.tensor([0.02])) if fp8 else None
    x = torch.randn(tokens, columns).bfloat16()
    layer = linear(w_NK, pattern, scales, torch.bfloat16)
    inputs = numerics.quantize_fp8(x.float(), 1 / torch.tensor(0.02)).double() * 0.02 * 0.1 if fp8 else x.double()
    expected = inputs @ w_NK.double().T + layer._bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("pattern", ["4:8", "5:8", "6:8"])
def test_groups_with_any_number_of_nonzeros_and_minus_128_are_exact(isa: str, pattern: str) -> None:
    torch.manual_seed(0)
    keep = int(pattern[0])
    w_NK = torch.zeros(48, 20, 8, dtype=torch.int8)
    for row, group in product(range(48), range(20)):
        places = torch.randperm(8)[: torch.randint(0, keep + 1, ())]
        w_NK[row, group, places] = torch.randint(-128, 128, (len(places),), dtype=torch.int8)
    w_NK = w_NK.view(48, 160)
    scales = Scales(torch.ones(1), torch.ones(1))
    q_MK = torch.randint(-128, 128, (3, 160)).float()
    expected = (q_MK.long() @ w_NK.long().T).float()
    assert torch.equal(linear(w_NK, pattern, scales, torch.float32, bias=False)(q_MK), expected)


def test_a_packed_weight_unpacks_to_itself() -> None:
    for (form, dtype), pattern in product((("int8", torch.int8), ("bf16", torch.bfloat16)), PATTERNS):
        w_NK = weight(100, 40, dtype, pattern)
        layer = linear(w_NK, pattern, Scales(torch.ones(1), torch.ones(1)) if form == "int8" else None, dtype)
        out = torch.empty_like(w_NK)
        name = f"{form}-{short_name(pattern)}" if pattern else form
        cpu.unpack(name, (100, 40), layer.problem(1).weight, out.data_ptr())
        assert torch.equal(out, w_NK)


@pytest.mark.parametrize(
    ("pattern", "int8", "bf16"),
    [("2:4", 0.625, 0.5625), ("4:8", 0.625, 0.5625), ("5:8", 0.75, 0.6875), ("6:8", 0.875, 0.8125)],
)
def test_a_sparse_layer_holds_the_bytes_of_its_values_and_a_bit_a_weight(
    pattern: str, int8: float, bf16: float
) -> None:
    offsets = 4 * 4096 + 64  # a row's sum, and whether a weight is -128
    assert (cpu.weight_bytes(f"int8-{short_name(pattern)}", 4096, 4096) - offsets) / 4096**2 == int8
    assert cpu.weight_bytes(f"bf16-{short_name(pattern)}", 4096, 4096) / (2 * 4096**2) == bf16
    assert (bytes_per_weight(pattern, 1), bytes_per_weight(pattern, 2)) == (int8, 2 * bf16)


def test_an_embedding_reads_its_rows_from_the_packed_output_layer() -> None:
    w_NK = torch.randn(100, 36).bfloat16()
    ids = torch.tensor([[0, 99, 17], [31, 32, 5]])
    assert torch.equal(PackedEmbedding(linear(w_NK, None, None, torch.bfloat16))(ids), w_NK[ids])


def test_indices_that_do_not_ascend_are_refused() -> None:
    packed = pack(weight(8, 32, torch.int8, "2:4"))
    packed.positions[3, 1] = 0b00000101
    scales = Scales(torch.ones(1), torch.ones(1))
    with pytest.raises(UserError, match="row 3, group 2: indices do not ascend"):
        CpuLinear(packed, scales, None, torch.float32, ((1, "cpu-2of4"),))


@pytest.mark.parametrize(("pattern", "kept"), [("4:8", 3), ("6:8", 7)])
def test_a_mask_of_another_number_of_elements_is_refused(pattern: str, kept: int) -> None:
    packed = pack(weight(8, 32, torch.int8, pattern), pattern)
    packed.positions[3, 1] = (1 << kept) - 1
    scales = Scales(torch.ones(1), torch.ones(1))
    with pytest.raises(UserError, match=f"row 3, group 1: the mask keeps {kept} of 8, not {pattern[0]}"):
        CpuLinear(packed, scales, None, torch.float32, ((1, cpu_kernel(pattern)),))


def test_threads_are_cut_to_the_processors_and_give_the_same_numbers() -> None:
    layer = linear(weight(4096, 512, torch.int8, "2:4"), "2:4", Scales(torch.rand(4096), torch.ones(1)), torch.float32)
    x = torch.randn(3, 512) * 40
    assert cpu.set_threads(1) == 1
    alone = layer(x)
    threads = cpu.set_threads(1000)
    assert 1 <= threads <= len(__import__("os").sched_getaffinity(0))
    assert all(torch.equal(layer(x), alone) for _ in range(50))
    cpu.set_threads(1)


def test_calls_from_several_threads_at_once_are_right() -> None:
    layer = linear(weight(2048, 256, torch.int8, "2:4"), "2:4", Scales(torch.rand(2048), torch.ones(1)), torch.float32)
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
        stored = pack(torch.zeros(4, 8, dtype=torch.int8)).stored()
        assert kernels.choices("a", stored) is None
        assert kernels.choices("b", stored) is None
        assert len(kernels.remarks) == 1
        assert "sparse layers run dense on torch's products: cannot load" in kernels.remarks[0]
    finally:
        cpu.load.cache_clear()


def test_the_binding_imports_no_torch() -> None:
    script = "import sys, plugins.libtwofour.cpu; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
