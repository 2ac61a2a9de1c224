"""Both parts of a layer that is sparse in part in one launch: the operator, on a CPU and on the stand-in GPU, the layer
that has it, and the choice between one launch, two products and a dense one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import pytest
import torch

from benchmarks.kernels import hybrid_times
from plugins.autotune import choice, timing, tuner
from plugins.common.errors import UserError
from plugins.common.linear_shape import LinearShape
from plugins.common.patterns import HYBRID, Pattern, hybrid_kernel, keep_and_group, skinny_kernel
from plugins.libtwofour import bindings, hybrid_ops, structures, torch_ops
from plugins.linear import one_launch
from plugins.linear.factory import build_linear
from plugins.linear.hybrid_linear import HybridLinear, build_hybrid
from plugins.linear.hybrid_tensors import split
from plugins.linear.kernel_linear import DENSE
from plugins.linear.torch_linear import Linear
from plugins.sparsity.segments import Axis, Segments
from tests.support.launches import Launches
from tests.support.stand_in_gpu import CPU, use_times, use_torch

N = K = 128
CHECKS = ("test_faketensor", "test_aot_dispatch_dynamic", "test_schema")
each_axis = pytest.mark.parametrize("axis", ["rows", "inputs"])
each_dtype = pytest.mark.parametrize("dtype", list(torch_ops.FORMATS))
each_pattern = pytest.mark.parametrize("pattern", HYBRID)


def weight_of(cut: hybrid_ops.Cut, dtype: torch.dtype, n: int = N, k: int = K) -> torch.Tensor:
    """A random weight [n, k] that holds the pattern where `cut` has it."""
    w = timing.random_operand(n, k, dtype, CPU)
    keep, group = keep_and_group(cut.pattern)
    bits = cut.split(w)[0].view(torch.uint8 if dtype.itemsize == 1 else dtype)
    bits.unflatten(1, (-1, group))[..., 1 : 1 + group - keep] = 0
    return w


@each_dtype
@each_axis
@each_pattern
def test_operator_gives_the_dense_layers_numbers(pattern: Pattern, axis: Axis, dtype: torch.dtype) -> None:
    cut = hybrid_ops.Cut(pattern, axis, 32)
    w = weight_of(cut, dtype, 100, 224)
    packed = hybrid_ops.prepare(w, cut)
    assert torch.equal(hybrid_ops.unpack(packed, (100, 224), dtype, cut).view(torch.uint8), w.view(torch.uint8))
    wide_x, y = timing.random_operand(5, 240, dtype, CPU), torch.ones(5, 120).bfloat16()
    scales, bias = torch.rand(100) * 1e-2, torch.randn(100).bfloat16()
    hybrid_ops.hybrid_into(y[:, 8:108], wide_x[:, 16:], packed, *cut, 1.0, scales, bias)
    expected = torch_ops.dense_linear(wide_x[:, 16:], w, 1.0, scales, bias, 100, torch.bfloat16)
    assert torch.equal(y[:, 8:108], expected)
    assert bool((y[:, :8] == 1).all())
    with pytest.raises(UserError, match="65 tokens: the hybrid kernel takes 1 to 64; multiply each part by itself"):
        hybrid_ops.hybrid_into(torch.ones(65, 100).bfloat16(), w.new_zeros(65, 224), packed, *cut, 1.0, None, None)


@each_axis
def test_operator_passes_torchs_own_checks(axis: Axis) -> None:
    cut = hybrid_ops.Cut("2:4", axis, 32)
    packed = hybrid_ops.prepare(weight_of(cut, torch.bfloat16), cut)
    x, y = timing.random_operand(3, K, torch.bfloat16, CPU), torch.zeros(3, N).bfloat16()
    arguments = (y, x, packed, *cut, 1.0, None, torch.randn(N).bfloat16())
    torch.library.opcheck(hybrid_ops.hybrid_into, arguments, test_utils=CHECKS)


@pytest.fixture
def on_stand_in(gpu: bindings.Context, monkeypatch: pytest.MonkeyPatch) -> bindings.Context:
    """torch's CPU tensors as the stand-in's device memory."""
    use_torch(monkeypatch, gpu)
    return gpu


@each_dtype
@each_axis
@each_pattern
def test_operator_hands_over_what_libtwofour_needs(
    on_stand_in: bindings.Context, pattern: Pattern, axis: Axis, dtype: torch.dtype
) -> None:
    cut = hybrid_ops.Cut(pattern, axis, 96)
    w, wide_x = weight_of(cut, dtype), timing.random_operand(13, K + 32, dtype, CPU)
    out = dtype if dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
    scales, bias = torch.rand(N) * 1e-3, torch.randn(N).to(out)
    y = torch.ones(13, N + 32).to(out)
    hybrid_ops.launch(y[:, 16 : N + 16], wide_x[:, 32:], hybrid_ops.prepare(w, cut), *cut, 0.5, scales, bias)
    expected = torch_ops.dense_linear(wide_x[:, 32:], w, 0.5, scales, bias, N, out)
    torch.testing.assert_close(y[:, 16 : N + 16], expected, rtol=2**-7, atol=2e-2)
    assert bool((y[:, :16] == 1).all())
    hybrid_ops.launch(y[:0, :N], wide_x[:0, 32:], hybrid_ops.prepare(w, cut), *cut, 0.5, scales, bias)


def layer_of(
    dtype: torch.dtype, axis: Axis, rows_scaled: bool, at_once: bool, pattern: Pattern = "2:4"
) -> HybridLinear:
    """A layer whose first 96 rows or inputs hold the pattern, on our kernels' CPU forms."""
    segments = Segments.split(axis, N, 96, pattern=pattern)
    stored = split(weight_of(hybrid_ops.Cut(pattern, axis, 96), dtype), segments)
    stored["bias"] = torch.arange(N) / 16
    if dtype.itemsize == 1:
        rows = torch.linspace(0.01, 0.02, N) if rows_scaled else torch.tensor(0.5)
        stored |= {"weight_scale": rows, "input_scale": torch.tensor(0.05)}

    def build(tensors: Mapping[str, torch.Tensor]) -> Linear:
        sparse = "weight_values" in tensors
        choices = ((64, skinny_kernel(pattern)), (65, "cublaslt")) if sparse else DENSE
        return build_linear(tensors, torch.bfloat16, CPU, choices if sparse or dtype.itemsize == 1 else None)

    layer = build_hybrid(stored, build, one_launch=((1, False), (8, True), (64, False)) if at_once else ())
    assert isinstance(layer, HybridLinear)
    return layer


@pytest.mark.parametrize("rows_scaled", [False, True], ids=["", "a scale a row"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
@each_axis
@each_pattern
def test_layer_multiplies_at_once_where_it_was_faster(
    pattern: Pattern, axis: Axis, dtype: torch.dtype, rows_scaled: bool
) -> None:
    """From 2 to 8 tokens here. One launch, and one that rounds the input; the numbers are those of two products."""
    layer, two = (layer_of(dtype, axis, rows_scaled, at_once, pattern) for at_once in (True, False))
    assert layer.kernel.startswith(f"{hybrid_kernel(pattern)} or {skinny_kernel(pattern)} or ")
    assert two.one_launch is None
    for tokens, launches in ((1, 2), (5, 1), (8, 1), (9, 2), (70, 2)):
        x = torch.randn(tokens, K, generator=torch.Generator().manual_seed(1)).bfloat16()
        with Launches() as mode:
            y = layer(x)
        assert mode.counts.total() == launches + (dtype.itemsize == 1), mode.counts
        assert mode.counts["hybrid_into"] == (launches == 1)
        expected = two(x)
        if axis == "rows" or launches == 2:
            assert torch.equal(y, expected)
        torch.testing.assert_close(y, expected, rtol=2**-7, atol=2**-8 * float(expected.abs().max()))


def test_layer_compiles_into_one_graph() -> None:
    layer = layer_of(torch.float8_e4m3fn, "rows", False, True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in (1, 5):
        x = torch.randn(tokens, K).bfloat16()
        assert torch.equal(compiled(x), layer(x))


def test_layer_that_the_kernel_cannot_take_keeps_two_products(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(status: str, *_: object) -> torch.Tensor:
        raise bindings.LibraryError(bindings.STATUSES.index(status), status)

    monkeypatch.setattr(hybrid_ops, "prepare", partial(refuse, "SM unsupported"))
    assert layer_of(torch.bfloat16, "rows", False, True).one_launch is None
    monkeypatch.setattr(hybrid_ops, "prepare", partial(refuse, "CUDA error"))
    with pytest.raises(bindings.LibraryError, match="CUDA error"):
        layer_of(torch.bfloat16, "rows", False, True)


def test_choices_are_those_of_the_buckets() -> None:
    buckets = [{"tokens": n, "kernel": "hybrid" if n > 1 else "skinny"} for n in (1, 8, 64)]
    tactics = {"buckets": [*buckets, {"tokens": 128, "kernel": "cusparselt"}]}
    assert one_launch.choices_of(tactics, "2:4") == [(1, False), (8, True), (64, True)]
    assert one_launch.choices_of(tactics, "4:8") == one_launch.choices_of(None, "2:4") == ()
    assert one_launch.choices_of({"buckets": [{"tokens": 8, "kernel": "skinny"}]}, "2:4") == ()


TIMES = {"skinny": 5.0, "skinny-6of8": 5.0, "cusparselt": 5.0, "cublaslt": 12.0, "torch": 12.0}


@pytest.mark.parametrize(
    ("hybrid_us", "kernel", "us"),
    [(8.0, "hybrid", 8.0), (20.0, "dense-cublaslt", 17.0), (11.9, "dense-cublaslt", 11.9)],
)
def test_tuner_times_one_launch_against_two_products_and_dense(
    on_stand_in: bindings.Context, monkeypatch: pytest.MonkeyPatch, hybrid_us: float, kernel: str, us: float
) -> None:
    """Two products take 5 + 12 us and a dense one 12; one launch has no time above 64 tokens."""
    asked = []

    def time(bench: tuner.Bench, kernel: str, tokens: int) -> float:
        asked.append((kernel, tokens))
        return hybrid_us if kernel == "hybrid" else TIMES[kernel]

    use_times(monkeypatch, time)
    whole = LinearShape(64, 96, "fp8")
    for axis in ("rows", "inputs"):
        entry = tuner.tune({"layer": choice.Hybrid.of(whole, axis, 32)}, buckets=(8, 128))["layers"]["layer"]
        first, second = entry["buckets"]
        assert (first["kernel"], first["sparse_us"], first["dense_us"]) == (kernel, us, 12.0)
        assert second["sparse_us"] == 17.0
        if kernel == "hybrid":
            assert first["notes"] == ["both products take 17.000 us"]
            assert (first["algorithm"][1], first["rest_algorithm"], second["kernel"]) == (1, None, "cusparselt")
            assert entry["reason"].startswith(
                "dense time over that of both products, in one launch at 8, on Stand-in: 1.50x"
            )
        elif hybrid_us > 17:
            assert first["notes"] == ["one launch takes 20.000 us"]
    assert ("hybrid", 8) in asked
    assert ("hybrid", 128) not in asked


def test_a_pattern_or_gpu_without_the_kernel_is_tuned_without_it(
    monkeypatch: pytest.MonkeyPatch, on_stand_in: bindings.Context
) -> None:
    use_times(monkeypatch, lambda bench, kernel, tokens: TIMES[kernel])
    shape = choice.Hybrid.of(LinearShape(64, 96, "bf16", pattern="6:8"), "rows", 32)
    assert tuner.tune({"layer": shape}, buckets=(8,))["layers"]["layer"]["buckets"][0]["sparse_us"] == 17.0
    problem = structures.gemm("hybrid", "bf16", "bf16", 64, 96, sparse=(32, 0))
    monkeypatch.setenv("STAND_IN_SM", "89")
    with pytest.raises(
        bindings.LibraryError, match=r"hybrid needs compute capability 9\.0 or newer, this GPU has 8\.9"
    ):
        bindings.Context(0).weight_bytes(problem)


def test_ways_to_multiply_a_hybrid_layer_are_timed(
    on_stand_in: bindings.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_times(monkeypatch, lambda bench, kernel, tokens: 8.0 if kernel == "hybrid" else TIMES[kernel])
    for name, part in (("gate_up_proj", {"rows": 32}), ("down_proj", {"inputs": 64})):
        layer = LinearShape(64, 128, "fp8", name=name)
        rows = hybrid_times.rows_of(layer, 0.5, (1, 16), lambda: False, tuner.time_kernel, CPU)
        assert [row["tokens"] for row in rows] == [1, 16]
        for row in rows:
            assert {key: row[key] for key in part} == part
            assert hybrid_times.line(row).endswith(
                "us: dense 12.00, one launch 8.00, two products 17.00, sparse in all 5.00"
            )
    assert "dense" not in hybrid_times.rows_of(layer, 0.5, (1,), lambda: True, device=CPU)[0]
