"""The layer that is 2:4 in part: its stored form, and its numbers against the dense layer of the same weight."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import pytest
import torch

from plugins.common.errors import UserError
from plugins.common.patterns import Pattern, bytes_per_weight, cpu_kernel, keep_and_group
from plugins.libtwofour import cpu
from plugins.linear import cpu_linear
from plugins.linear.cpu_linear import CpuLinear
from plugins.linear.factory import build_linear
from plugins.linear.hybrid_linear import HybridLinear, build_hybrid
from plugins.linear.hybrid_tensors import decode, encode, join, split
from plugins.linear.kernel_linear import DENSE
from plugins.linear.torch_linear import Linear
from plugins.sparsity.segments import Axis, Segments
from tests.support.launches import Launches

CPU = torch.device("cpu")
N = K = 128
SPLITS = {
    "rows": Segments.split("rows", N, 32),
    "inputs": Segments.split("inputs", K, 96),
    "rows on 2 ranks": Segments.split("rows", N, 64, ranks=2),
    "inputs on 2 ranks": Segments.split("inputs", K, 64, ranks=2),
    "dense first": Segments.of("inputs", [("dense", 32), ("2:4", 96)]),
    "rows of 6:8": Segments.split("rows", N, 96, pattern="6:8"),
    "inputs of 5:8": Segments.split("inputs", K, 64, pattern="5:8"),
}
SKINNY = ((64, "skinny"), (65, "cublaslt"))
FORMATS = (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn)


def weight_of(segments: Segments, dtype: torch.dtype) -> torch.Tensor:
    """A weight [N, K] with the pattern's zeros where the segments have them."""
    values = torch.randint(1, 100, (N, K), generator=torch.Generator().manual_seed(0)).float() - 50.5
    weight = values.round().to(torch.int8) if dtype == torch.int8 else (values / 50).to(dtype)
    for part in segments.sparse:
        block = weight[part.slice] if segments.axis == "rows" else weight[:, part.slice]
        keep, group = keep_and_group(segments.pattern)
        bits = block.view(torch.uint8 if dtype.itemsize == 1 else dtype)
        bits.unflatten(1, (-1, group))[..., 1 : 1 + group - keep] = 0
    return weight


def layer_tensors(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    tensors = {"bias": torch.arange(N) / 16}
    if weight.element_size() == 1:
        rows = torch.linspace(0.01, 0.02, N) if weight.dtype == torch.int8 else torch.tensor(0.5)
        tensors |= {"weight_scale": rows, "input_scale": torch.tensor(0.05)}
    if weight.dtype == torch.int8:
        tensors["pre_quant_scale"] = torch.linspace(0.5, 2, K)
    return tensors


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", SPLITS)
def test_what_is_split_joins_to_the_same_weight(name: str, dtype: torch.dtype) -> None:
    weight = weight_of(SPLITS[name], dtype)
    stored = split(weight, SPLITS[name])
    assert decode(stored["weight_segments"]) == SPLITS[name]
    assert torch.equal(join(stored).view(torch.uint8), weight.view(torch.uint8))
    packed = sum(tensor.nbytes for key, tensor in stored.items() if key != "weight_segments")
    share = bytes_per_weight(SPLITS[name].pattern, dtype.itemsize) / dtype.itemsize
    assert packed == round(weight.nbytes * (1 - SPLITS[name].fraction * (1 - share)))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", SPLITS)
def test_the_hybrid_layer_computes_what_the_dense_one_does(name: str, dtype: torch.dtype) -> None:
    weight = weight_of(SPLITS[name], dtype)
    build = partial(build_linear, dtype=torch.float32, device=CPU)
    common = layer_tensors(weight)
    layer = build_hybrid(split(weight, SPLITS[name]) | common, build)
    dense = build({"weight": weight, **common})
    x = torch.randn(3, 5, K, generator=torch.Generator().manual_seed(1))
    assert (layer.out_features, layer.in_features, layer.format) == (N, K, dense.format)
    assert layer.pattern == SPLITS[name].pattern
    assert isinstance(layer, HybridLinear) == SPLITS[name].in_two
    torch.testing.assert_close(layer(x), dense(x), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("isa", cpu.ISAS)
@pytest.mark.parametrize("scales", ["static", "each token"])
@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize(("axis", "sparse"), [("rows", 32), ("rows", 96), ("inputs", 64), ("inputs", 96)])
@pytest.mark.parametrize("pattern", ["2:4", "5:8"])
@pytest.mark.parametrize(
    ("weights", "dtype"), [("int8", torch.float32), ("int8", torch.bfloat16), ("bf16", torch.bfloat16)]
)
def test_one_call_computes_both_parts_number_for_number(
    weights: str, dtype: torch.dtype, pattern: Pattern, axis: Axis, sparse: int, tokens: int, scales: str, isa: str
) -> None:
    best = cpu.isa()
    if cpu.ISAS.index(isa) > cpu.ISAS.index(best):
        pytest.skip(f"this processor has no {isa}")
    cpu.use_isa(isa)
    segments = Segments.split(axis, N, sparse, pattern=pattern)
    weight = weight_of(segments, torch.int8 if weights == "int8" else torch.bfloat16)
    common = layer_tensors(weight)
    if scales == "each token":
        common.pop("input_scale", None)

    def build(tensors: Mapping[str, torch.Tensor]) -> Linear:
        kernel = cpu_kernel(pattern) if "weight_values" in tensors else "cpu-dense"
        return build_linear(tensors, dtype, CPU, ((1, kernel),))

    try:
        layer = build_hybrid(split(weight, segments) | common, build)
        assert isinstance(layer, HybridLinear)
        x = torch.randn(tokens, K, generator=torch.Generator().manual_seed(1)).to(dtype)
        if axis == "rows":
            expected = torch.cat([layer.sparse_part(x), layer.dense_part(x)], -1)
        else:
            first, rest = (x[:, part.slice].contiguous() for part in segments.parts)
            expected = layer.sparse_part(first) + layer.dense_part(rest)
        assert torch.equal(layer(x), expected)
    finally:
        cpu.use_isa(best)


def on_our_kernels(weight: torch.Tensor, segments: Segments, common: Mapping[str, torch.Tensor]) -> HybridLinear:
    """The layer as the torch engine has it on a GPU, by the operators' CPU forms."""

    def build(tensors: Mapping[str, torch.Tensor]) -> Linear:
        choices = SKINNY if "weight_values" in tensors else DENSE
        return build_linear(tensors, torch.bfloat16, CPU, choices if weight.element_size() == 1 else None)

    layer = build_hybrid(split(weight, segments) | common, build)
    assert isinstance(layer, HybridLinear)
    return layer


def by_parts(layer: HybridLinear, x: torch.Tensor) -> torch.Tensor:
    """y of both parts called by themselves."""
    if layer.segments.axis == "rows":
        return torch.cat([layer.sparse_part(x), layer.dense_part(x)], -1)
    first, rest = (x[..., part.slice].contiguous() for part in layer.segments.parts)
    return layer.sparse_part(first) + layer.dense_part(rest)


def assert_same(y: torch.Tensor, expected: torch.Tensor, axis: Axis) -> None:
    """Number for number; of inputs, but for the first product's rounding and the sum's, which are one now."""
    if axis == "rows":
        assert torch.equal(y, expected)
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=2**-8 * float(expected.abs().max()))


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("dtype", FORMATS[2:])
@pytest.mark.parametrize("axis", ["rows", "inputs"])
def test_parts_of_8_bit_round_their_input_once(axis: Axis, dtype: torch.dtype, smoothed: bool) -> None:
    segments = Segments.split(axis, N, 96)
    weight = weight_of(segments, dtype)
    common = layer_tensors(weight)
    if smoothed:
        common["pre_quant_scale"] = torch.linspace(0.5, 2, K)
    else:
        common.pop("pre_quant_scale", None)
    layer = on_our_kernels(weight, segments, common)
    assert layer.operand == dtype
    assert layer.quantizer is not None
    assert layer.quantizer.multiplier.numel() == (K if smoothed else 1)
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert_same(layer(x), by_parts(layer, x), axis)
    assert torch.equal(layer.multiply(layer.quantizer(x)), layer(x))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", FORMATS[1:])
@pytest.mark.parametrize("axis", ["rows", "inputs"])
def test_products_write_into_one_y(axis: Axis, dtype: torch.dtype, tokens: int) -> None:
    """No cat, no copy and no sum of its own: two launches, and one that rounds the input."""
    weight = weight_of(Segments.split(axis, N, 96), dtype)
    layer = on_our_kernels(weight, Segments.split(axis, N, 96), layer_tensors(weight))
    x = torch.randn(tokens, K, generator=torch.Generator().manual_seed(1)).bfloat16()
    with Launches() as mode:
        y = layer(x)
    assert mode.counts.total() == 2 + (dtype.itemsize == 1), mode.counts
    assert_same(y, by_parts(layer, x), axis)


def test_parts_that_round_by_themselves_go_on_doing_so() -> None:
    weight = weight_of(SPLITS["rows"], torch.int8)
    common = layer_tensors(weight)
    common.pop("input_scale")  # each token has its own
    layer = on_our_kernels(weight, SPLITS["rows"], common)
    assert (layer.operand, layer.quantizer) == (None, None)
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(layer(x), by_parts(layer, x))


def test_parts_that_do_not_fit_are_refused_by_the_library() -> None:
    parts = [CpuLinear(torch.ones(32, k).bfloat16(), None, None, torch.bfloat16, ((1, "cpu-dense"),)) for k in (64, 32)]
    joined = cpu_linear.join_parts(parts[0].problem(1), parts[1].problem(1), "rows")
    with pytest.raises(UserError, match="do not fit along axis 0"):
        cpu_linear.apply(joined, torch.ones(1, 64).bfloat16(), 64)


def test_a_segment_that_is_not_2of4_is_refused() -> None:
    weight = torch.ones(N, K)
    with pytest.raises(UserError, match="row 0, group 0"):
        split(weight, SPLITS["rows"])


@pytest.mark.parametrize("damage", [[2, 1, 32], [0, 5, 32], [0, 1]])
def test_damaged_segments_are_refused(damage: list[int]) -> None:
    with pytest.raises(UserError, match="damaged: build the engine again"):
        decode(torch.tensor(damage, dtype=torch.int32))
    assert decode(encode(SPLITS["rows"])) == SPLITS["rows"]
