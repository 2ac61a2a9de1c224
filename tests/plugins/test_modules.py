"""The linear layers against their definition in float64: stored dense or packed, on torch or on our kernels."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plugins.common import numerics
from plugins.common.errors import UserError
from plugins.common.patterns import OF_EIGHT, Pattern, cpu_kernel, skinny_kernel
from plugins.linear.factory import build_linear, remarks, share_input
from plugins.linear.kernel_linear import KernelLinear, choices_of
from plugins.linear.torch_linear import InputQuantizer
from plugins.sparsity.torch_packing import from_numpy, pack, to_numpy, unpack
from tests.support.examples import examples

CPU = torch.device("cpu")
N, K = 48, 64
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
CHOICES = ((8, "skinny"), (64, "cublaslt"))  # cuSPARSELt has no CPU form


def stored(kind: str, *, sparse: bool = False, bias: bool = True, smooth: bool = True) -> dict[str, torch.Tensor]:
    """The tensors of a layer as a checkpoint holds them, dense; 2:4 where `sparse`."""
    generator = torch.Generator().manual_seed(7)
    w = torch.randn(N, K, generator=generator)
    if sparse:
        w = w.view(N, K // 4, 4).scatter(-1, w.view(N, K // 4, 4).abs().topk(2, largest=False).indices, 0).view(N, K)
    tensors = {"bias": torch.randn(N, generator=generator).bfloat16()} if bias else {}
    if kind == "bf16":
        return tensors | {"weight": w.bfloat16()}
    tensors["input_scale"] = torch.tensor(0.021)
    if kind == "fp8":
        scale = w.abs().max() / 448
        return tensors | {"weight": (w / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
    scale = w.abs().amax(1) / 127
    if smooth:
        tensors["pre_quant_scale"] = (torch.rand(K, generator=generator) + 0.5).bfloat16()
    return tensors | {"weight": (w / scale[:, None]).round().to(torch.int8), "weight_scale": scale}


def packed(tensors: dict[str, torch.Tensor], pattern: Pattern = "2:4") -> dict[str, torch.Tensor]:
    rest = {name: tensor for name, tensor in tensors.items() if name != "weight"}
    return rest | pack(tensors["weight"], pattern).stored()


def expected(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """y in float64, from the definition; only the rounding of the input is taken from torch's own conversions."""
    x64, w64 = x.double(), tensors["weight"].to(torch.float64)
    if "input_scale" in tensors:
        multiplier = tensors.get("pre_quant_scale", torch.ones(1)).float() / tensors["input_scale"]
        scaled = x.float() * multiplier
        if tensors["weight"].dtype == torch.int8:
            q = scaled.round().clamp(-128, 127)
        else:
            q = scaled.clamp(-448, 448).to(torch.float8_e4m3fn)
        x64, w64 = q.double(), w64 * tensors["weight_scale"].double().reshape(-1, 1) * tensors["input_scale"].double()
    return x64 @ w64.T + tensors.get("bias", torch.zeros(N)).double()


@pytest.fixture(autouse=True)
def _same_inputs() -> None:
    """An input on the boundary between two 8-bit numbers may round either way in the two precisions."""
    torch.manual_seed(0)


@pytest.mark.parametrize("tokens", [1, 5, 33])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("kind", ["bf16", "int8", "fp8"])
def test_layer_computes_its_definition(kind: str, sparse: bool, bias: bool, tokens: int) -> None:
    tensors = stored(kind, sparse=sparse, bias=bias)
    layer = build_linear(packed(tensors) if sparse else tensors, torch.float32, CPU)
    x = torch.randn(2, tokens, K)
    y = layer(x)
    assert y.shape == (2, tokens, N)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected(tensors, x), rtol=1e-5, atol=1e-5)
    assert (layer.format, layer.sparse, layer.out_features, layer.in_features) == (kind, sparse, N, K)


@pytest.mark.parametrize("kind", ["bf16", "int8", "fp8"])
def test_packed_and_dense_storage_give_the_same_bits(kind: str) -> None:
    tensors = stored(kind, sparse=True)
    x = torch.randn(9, K)
    dense, sparse = (build_linear(t, torch.float32, CPU)(x) for t in (tensors, packed(tensors)))
    assert torch.equal(dense, sparse)


def test_int8_sums_are_exact() -> None:
    """Every product at its largest: float32 could not hold the sum, int32 does."""
    wide = 4096
    tensors = {
        "weight": torch.full((16, wide), -128, dtype=torch.int8),
        "weight_scale": torch.ones(16),
        "input_scale": torch.tensor(1.0),
    }
    x = torch.full((1, wide), -128.0)
    x[0, 0] = 1
    y = build_linear(tensors, torch.float64, CPU)(x.double())
    assert y[0, 0].item() == 128 * 128 * (wide - 1) - 128


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_inputs_beyond_the_calibrated_range_saturate(kind: str) -> None:
    tensors = stored(kind, smooth=False, bias=False)
    layer = build_linear(tensors, torch.float32, CPU)
    largest = tensors["input_scale"] * (127 if kind == "int8" else 448)
    torch.testing.assert_close(layer(torch.full((1, K), 1e6)), layer(largest.expand(1, K)))
    assert layer(torch.full((1, K), -1e6)).isfinite().all()


@given(st.lists(st.floats(-600, 600, width=32), min_size=1, max_size=50), st.sampled_from([1.0, 0.3, 7.0, 2.0**-9]))
@examples(200)
def test_rounding_to_fp8_is_torchs(values: list[float], multiplier: float) -> None:
    x, factor = torch.tensor(values), torch.tensor([multiplier])
    assert torch.equal(numerics.round_to_fp8(x, factor), numerics.quantize_fp8(x, factor).float())


def test_rounding_to_fp8_at_every_tie_and_neighbour() -> None:
    numbers = E4M3.float()[~E4M3.float().isnan()].sort().values.unique()
    ties = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, ties, torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1)])
    assert torch.equal(numerics.round_to_fp8(x, torch.ones(1)), x.to(torch.float8_e4m3fn).float())


def test_fp8_values_are_torchs() -> None:
    known = ~E4M3.float().isnan()
    assert torch.equal(numerics.fp8_values(E4M3)[known], E4M3.float()[known])


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_layers_of_one_input_round_it_once(kind: str) -> None:
    calls = []

    def counted(x: torch.Tensor, multiplier: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return numerics.quantize_int8(x, multiplier) if kind == "int8" else numerics.round_to_fp8(x, multiplier)

    layers = [build_linear(stored(kind), torch.float32, CPU) for _ in range(3)]
    for layer in layers:
        layer.quantizer = InputQuantizer(layer.quantizer.multiplier, counted, layer.quantizer.scale)
    share_input(layers)
    for x in (torch.randn(4, K), torch.randn(4, K)):
        alone = build_linear(stored(kind), torch.float32, CPU)(x)
        assert all(torch.equal(layer(x), alone) for layer in layers)
    assert len(calls) == 2
    assert layers[0].quantizer._output is None, "a kept activation would stay in memory"


def test_layers_that_scale_differently_do_not_share() -> None:
    first, second = stored("int8"), stored("int8")
    second["input_scale"] = first["input_scale"] * 2
    layers = [build_linear(tensors, torch.float32, CPU) for tensors in (first, second)]
    share_input(layers)
    x = torch.randn(3, K)
    layers[0](x)
    torch.testing.assert_close(layers[1](x).double(), expected(second, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 8, 9, 200])
@pytest.mark.parametrize("kind", ["bf16", "int8", "fp8"])
def test_kernels_compute_the_definition(kind: str, tokens: int) -> None:
    tensors = stored(kind, sparse=True)
    layer = build_linear(packed(tensors), torch.bfloat16, CPU, CHOICES)
    assert isinstance(layer, KernelLinear)
    x = torch.randn(tokens, K).bfloat16()
    torch.testing.assert_close(layer(x).double(), expected(tensors, x), rtol=1e-2, atol=2e-2)
    assert layer.kernel_for(tokens) == ("skinny" if tokens <= 8 else "cublaslt")


def test_weights_of_every_kernel_count_as_the_models_bytes() -> None:
    layer = build_linear(packed(stored("fp8", sparse=True, bias=False)), torch.bfloat16, CPU, CHOICES)
    assert sum(buffer.nbytes for buffer in layer.buffers()) == sum(weight.nbytes for weight in layer.weights.values())
    assert layer.weights["cublaslt"].nbytes == N * K
    assert layer.state_dict() == {}, "they are made from the stored weight"


def test_choices_follow_the_tactics() -> None:
    tactics = {"buckets": [{"tokens": 512, "kernel": "dense-cublaslt"}, {"tokens": 8, "kernel": "skinny"}]}
    assert choices_of(tactics, "2:4") == [(8, "skinny"), (512, "cublaslt")]
    assert choices_of(tactics, None) == ((1, "cublaslt"),)
    for unknown in (None, {"buckets": [{"tokens": 8, "kernel": "reference"}]}):
        kernels = [kernel for _, kernel in choices_of(unknown, "2:4")]
        assert kernels == ["skinny", "cusparselt"]
    assert all(a[0] < b[0] for a, b in pairwise(choices_of(None, "2:4")))


@pytest.mark.parametrize("pattern", OF_EIGHT)
def test_n_of_8_runs_packed_up_to_64_tokens_and_dense_above(pattern: Pattern) -> None:
    kernel = skinny_kernel(pattern)
    timed_on_a_cpu = {"buckets": [{"tokens": 1, "kernel": cpu_kernel(pattern)}]}
    for tactics in (None, timed_on_a_cpu):
        assert choices_of(tactics, pattern) == ((64, kernel), (65, "cublaslt"))
    long = {"buckets": [{"tokens": 8, "kernel": kernel}, {"tokens": 512, "kernel": kernel}]}
    layer = build_linear(packed(stored("int8", sparse=True), pattern), torch.bfloat16, CPU, choices_of(long, pattern))
    assert isinstance(layer, KernelLinear)
    assert [layer.kernel_for(tokens) for tokens in (1, 8, 9, 512, 513)] == [kernel, kernel, *["cublaslt"] * 3]
    dense = build_linear(packed(stored("int8", sparse=True), pattern), torch.bfloat16, CPU, ((1, "cublaslt"),))
    for tokens in (1, 8, 100):
        x = torch.randn(tokens, K).bfloat16()
        assert torch.equal(layer(x), dense(x))


def test_a_missing_scale_is_named() -> None:
    for name in ("weight_scale", "input_scale"):
        tensors = stored("fp8")
        del tensors[name]
        with pytest.raises(UserError, match=name):
            build_linear(tensors, torch.float32, CPU)


def test_an_unknown_weight_dtype_is_refused() -> None:
    with pytest.raises(UserError, match=r"torch\.float8_e5m2"):
        build_linear({"weight": torch.zeros(4, 4).to(torch.float8_e5m2)}, torch.float32, CPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("groups", [1, 2, 15])
def test_packing_keeps_dtype_and_bits(dtype: torch.dtype, groups: int) -> None:
    w = stored("bf16", sparse=True)["weight"][:, : 4 * groups].float().to(dtype)
    values, indices, _ = pack(w)
    assert torch.equal(unpack(values, indices), w)
    assert values.dtype == dtype
    assert indices.dtype == torch.uint8
    assert torch.equal(unpack(values, indices).float(), w.float())
    with pytest.raises(UserError, match="do not ascend"):
        unpack(values, torch.zeros_like(indices))
    with pytest.raises(UserError, match="do not match"):
        unpack(values[:, :1], indices)
    assert torch.equal(from_numpy(to_numpy(w), dtype).float(), w.float())


def test_remarks_state_what_a_cpu_does_not_gain() -> None:
    layers = [build_linear(packed(stored("fp8", sparse=True)), torch.float32, CPU)]
    assert any("2:4 weights are unpacked when they are loaded" in fragment for fragment in remarks(layers))
    assert remarks([build_linear(stored("int8"), torch.float32, CPU)]) == []


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("kind", ["bf16", "int8", "fp8"])
def test_layer_on_cuda_computes_its_definition(kind: str, tokens: int) -> None:
    tensors = stored(kind)
    layer = build_linear(tensors, torch.bfloat16, torch.device("cuda"))
    x = torch.randn(tokens, K).bfloat16()
    torch.testing.assert_close(layer(x.cuda()).double().cpu(), expected(tensors, x), rtol=1e-2, atol=2e-2)
