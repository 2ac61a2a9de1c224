"""Layers that are 2:4 in part in the torch engine's step with few kernels: their numbers, and how many kernels that is.

The operators' CPU forms run, with the kernels that the engine chooses on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from builder.engines.torch_backend import decoder as decoder_module
from builder.engines.torch_backend.attention import Decode, Prefill, Slice
from builder.engines.torch_backend.decoder import Decoder
from builder.engines.torch_backend.kv_cache import KVCache
from plugins.linear.hybrid_linear import HybridLinear
from plugins.linear.hybrid_tensors import split
from plugins.linear.joined import SideBySide, join
from plugins.linear.kernel_linear import DENSE
from plugins.sparsity.segments import Segments
from tests.support.block_models import CONFIG, FAMILIES, Weights
from tests.support.launches import Launches

CPU = torch.device("cpu")
TABLE = torch.tensor([[3], [1], [2]], dtype=torch.int32)  # blocks of three sequences
SEGMENTS = {  # of every block: each layer has a share of its own, of heads in q, k and v
    "q_proj": Segments.split("rows", 64, 32),
    "k_proj": Segments.split("rows", 32, 16),
    "v_proj": Segments.split("rows", 32, 32),  # all of it
    "o_proj": Segments.split("inputs", 64, 32),
    "gate_proj": Segments.split("rows", 96, 32),
    "up_proj": Segments.split("rows", 96, 64),
    "down_proj": Segments.split("inputs", 96, 64),
}


class Hybrid(Weights):
    """Weights of which these segments are 2:4: stored as hybrid layers, or `whole`: dense ones of the same numbers."""

    whole = False
    segments = SEGMENTS

    def of(self, module: str) -> dict[str, torch.Tensor]:
        stored = super().of(module)
        segments = self.segments.get(module.rpartition(".")[2])
        if segments is None:
            return stored
        weight = stored.pop("weight")
        for part in segments.sparse:
            block = weight[part.slice] if segments.axis == "rows" else weight[:, part.slice]
            block.view(torch.uint8 if weight.itemsize == 1 else weight.dtype).unflatten(1, (-1, 4))[..., 1:3] = 0
        if self.whole:
            return {"weight": weight, **stored}
        packed = split(weight, segments)
        if not segments.dense:
            packed = {name: packed[name] for name in ("weight_values", "weight_indices")}
        return packed | stored


class Whole(Hybrid):
    whole = True


class GpuKernels:
    """The engine's choice of kernels on a GPU without tactics, but for cuSPARSELt, which no CPU has."""

    at_once = False  # as where one launch was the fastest
    dense = False  # as where the two products of each layer do not pay

    def __init__(self, tactics: object, dtype: torch.dtype, device: torch.device) -> None:
        self.remarks: list[str] = []
        self._usable = dtype == torch.bfloat16

    def choices(self, name: str, stored: dict[str, torch.Tensor]) -> object:
        if self._usable and "weight_values" in stored:
            return (64, "skinny"), (65, "cublaslt")
        return DENSE if self._usable and "weight_scale" in stored else None

    def one_launch(self, name: str, stored: dict[str, torch.Tensor]) -> tuple[tuple[int, bool], ...]:
        return ((64, True),) if self.at_once else ()

    def runs_dense(self, name: str) -> bool:
        return self.dense


@pytest.fixture(autouse=True)
def _on_our_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(decoder_module, "Kernels", GpuKernels)
    with torch.inference_mode():
        yield


def decoder(weights: Weights, fused: bool, dtype: torch.dtype = torch.bfloat16) -> Decoder:
    return Decoder(weights.config, weights, dtype=dtype, device=CPU, positions=32, fused=fused)


def decode(model: Decoder, requests: int, step: int, cache: KVCache) -> torch.Tensor:
    """Logits of one more token of each request."""
    at = torch.tensor([9, 4, 6][:requests]) + step
    ids = torch.tensor([[5], [11], [17]][:requests]) + step
    batch = Decode(cache, TABLE[:requests], at, 10 + step, ragged=requests > 1)
    return model.logits(model.hidden(ids, at[:, None], batch))


def cache_of(model: Decoder) -> KVCache:
    return KVCache([(1.0, 1.0)] * 3, 3, 2, 16, kind="none", dtype=model.dtype, device=CPU)


def outputs(model: Decoder) -> list[torch.Tensor]:
    """Logits of three prompts prefilled together, and of tokens decoded after them, of one request and of three."""
    cache = cache_of(model)
    lengths, ids = (9, 4, 6), torch.arange(19)[None] * 37 % 128
    positions = torch.tensor([[at for length in lengths for at in range(length)]])
    slices = [Slice((int(row[0]),), 0, length) for row, length in zip(TABLE, lengths, strict=True)]
    results = [model.logits(model.hidden(ids, positions, Prefill(cache, slices)))]
    return [*results, *(decode(model, requests, step, cache) for step in range(2) for requests in (1, 3))]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_computes_as_the_dense_layers_of_the_same_weights(
    family: str, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, where no order of sums shows: rows, heads and inputs all find their place."""
    monkeypatch.setattr(GpuKernels, "dense", dense)
    config = CONFIG | FAMILIES[family]
    fused = decoder(Hybrid(config, "bf16", CPU), True, torch.float64)
    attention, mlp = fused.blocks[0].self_attn, fused.blocks[0].mlp
    assert (attention.qkv_proj.sparse_rows, mlp.gate_up_proj.sparse_rows) == ((32, 16, 32), (32, 64))
    expected = outputs(decoder(Whole(config, "bf16", CPU), False, torch.float64))
    for out, wanted in zip(outputs(fused), expected, strict=True):
        torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("format", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("at_once", [False, True], ids=["", "one launch"])
def test_few_kernels_give_the_numbers_of_layers_by_themselves(
    family: str, format: str, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the order of float32 sums, which the width of a product may change."""
    monkeypatch.setattr(GpuKernels, "at_once", at_once)
    models = [decoder(Hybrid(CONFIG | FAMILIES[family], format, CPU), fused) for fused in (True, False)]
    for out, expected in zip(*map(outputs, models), strict=True):
        assert (out - expected).abs().max() <= 2**-6 * expected.abs().max()


def launches(weights: type[Weights], layers: int, format: str) -> Counter[str]:
    """Of one decoded token of three requests, by operator."""
    model = decoder(weights(CONFIG | {"num_hidden_layers": layers}, format, CPU), True)
    cache = cache_of(model)
    with Launches() as mode:
        decode(model, 3, 0, cache)
    return mode.counts


def of_a_block(weights: type[Weights], format: str) -> Counter[str]:
    return launches(weights, 3, format) - launches(weights, 2, format)


@pytest.mark.parametrize("format", ["bf16", "int8", "fp8"])
def test_a_block_decodes_a_token_with_fourteen_launches(format: str) -> None:
    """The ten of a dense block, and a second product of each of its four layers."""
    counts = of_a_block(Hybrid, format)
    assert counts.total() == 14, counts
    assert sum(counts[name] for name in ("linear_into", "mm", "addmm_")) == 8
    assert of_a_block(Whole, format).total() == 10


@pytest.mark.parametrize("format", ["bf16", "int8", "fp8"])
def test_a_block_whose_parts_run_in_one_launch_has_ten(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GpuKernels, "at_once", True)
    counts = of_a_block(Hybrid, format)
    assert (counts.total(), counts["hybrid_into"]) == (10, 4), counts


def test_a_block_whose_second_products_do_not_pay_has_ten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GpuKernels, "dense", True)
    counts = of_a_block(Hybrid, "fp8")
    assert counts.total() == 10, counts


class Uneven(Hybrid):
    """k scales its input otherwise than q and v."""

    def of(self, module: str) -> dict[str, torch.Tensor]:
        stored = super().of(module)
        return stored | {"input_scale": torch.tensor(0.03)} if module.endswith("k_proj") else stored


class CutHeads(Hybrid):
    """The 2:4 rows of k end within a head; v is as a whole of its kind."""

    segments = SEGMENTS | {"k_proj": Segments.split("rows", 32, 8)}


@pytest.mark.parametrize("weights", [Uneven, CutHeads])
def test_a_group_that_cannot_be_joined_multiplies_layer_by_layer(weights: type[Hybrid]) -> None:
    models = [decoder(weights(CONFIG, "fp8", CPU), fused) for fused in (True, False)]
    group = models[0].blocks[0].self_attn.qkv_proj
    assert isinstance(group, SideBySide)
    assert (group.operand is None) == (weights is Uneven)
    assert isinstance(models[0].blocks[0].mlp.gate_up_proj, HybridLinear)
    for out, expected in zip(*map(outputs, models), strict=True):
        assert (out - expected).abs().max() <= 2**-6 * expected.abs().max()


def test_products_of_each_layer_write_into_one_y() -> None:
    """q and k have two products each, v one: five in place of two, and nothing else."""
    assert of_a_block(CutHeads, "fp8").total() == 14 + 3


def test_parts_of_different_kinds_are_not_joined() -> None:
    hybrid, dense = (weights(CONFIG, "fp8", CPU).of("model.layers.0.mlp.gate_proj") for weights in (Hybrid, Weights))
    other = Hybrid(CONFIG, "int8", CPU).of("model.layers.0.mlp.up_proj")
    inputs = Hybrid(CONFIG, "fp8", CPU).of("model.layers.0.self_attn.o_proj")
    assert join([hybrid, other]) is None
    assert join([hybrid, inputs]) is None
    assert join([hybrid, dense | {"bias": torch.ones(96)}]) is None
    joined = join([hybrid, dense])
    assert joined is not None
    assert joined["weight_joined"].tolist() == [32, 0]
