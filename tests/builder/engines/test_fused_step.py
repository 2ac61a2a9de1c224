"""The torch engine's step with few kernels: the numbers of transformers' layers, and how many kernels that takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from builder.engines.torch_backend import decoder as decoder_module
from builder.engines.torch_backend import linears
from builder.engines.torch_backend.attention import Decode, Prefill, Slice, Whole
from builder.engines.torch_backend.decoder import Decoder
from builder.engines.torch_backend.kv_cache import KVCache
from plugins.common.errors import UserError
from plugins.linear.joined import SideBySide
from plugins.linear.kernel_linear import DENSE, KernelLinear
from plugins.triton_kernels import ops, overlap
from plugins.triton_kernels.guarded import BlockOps
from tests.support.block_models import CONFIG, FAMILIES, Weights
from tests.support.launches import Launches

CPU = torch.device("cpu")
TABLE = torch.tensor([[3], [1]], dtype=torch.int32)  # blocks of two sequences


class OurKernels:
    """The engine's choice of kernels on a GPU without tactics: ours, dense, for every quantized layer."""

    def __init__(self, *_: object) -> None:
        self.remarks: list[str] = []

    def choices(self, name: str, stored: dict[str, torch.Tensor]) -> object:
        return DENSE if "weight_scale" in stored else None


@pytest.fixture(autouse=True)
def _on_our_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(decoder_module, "Kernels", OurKernels)
    with torch.inference_mode():
        yield


def decoder(family: str, format: str, fused: bool, dtype: torch.dtype = torch.bfloat16) -> Decoder:
    weights = Weights(CONFIG | FAMILIES[family], format, CPU)
    return Decoder(weights.config, weights, dtype=dtype, device=CPU, positions=32, fused=fused)


def cache_of(model: Decoder, kind: str = "none") -> KVCache:
    scales = [(1.0, 1.0) if kind == "none" else (0.03, 0.02)] * 3
    return KVCache(scales, 3, 2, 16, kind=kind, dtype=model.dtype, device=CPU)


def outputs(model: Decoder, kind: str = "none") -> list[torch.Tensor]:
    """Logits of two whole sequences, of two prompts prefilled together, and of four tokens decoded after them."""
    cache = cache_of(model, kind)
    ids = torch.arange(40).view(2, 20) * 37 % 128
    whole = model.logits(model.hidden(ids, torch.arange(20)[None], Whole(cache)))
    positions = torch.tensor([[*range(9), *range(4)]])
    prompts = Prefill(cache, [Slice((3,), 0, 9), Slice((1,), 0, 4)])
    results = [whole, model.logits(model.hidden(ids.view(1, -1)[:, :13], positions, prompts))]
    for step in range(4):
        at = torch.tensor([9 + step, 4 + step])
        batch = Decode(cache, TABLE, at, 10 + step, ragged=True)
        results.append(model.logits(model.hidden(torch.tensor([[5], [11 + step]]), at[:, None], batch)))
    return results


@pytest.mark.parametrize("family", FAMILIES)
def test_family_computes_as_with_transformers_layers(family: str) -> None:
    models = (decoder(family, "bf16", fused, torch.float64) for fused in (True, False))
    for out, expected in zip(*map(outputs, models), strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["none", "int8", "fp8"])
@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_8_bit_layers_and_caches_compute_as_with_transformers_layers(format: str, kind: str) -> None:
    """Up to the order of float32 sums, which the width of a product may change."""
    for out, expected in zip(*(outputs(decoder("qwen3", format, fused), kind) for fused in (True, False)), strict=True):
        assert (out - expected).abs().max() <= 2**-6 * expected.abs().max()
        assert (out.argmax(-1) == expected.argmax(-1)).float().mean() > 0.95


def launches(layers: int, family: str, format: str, fused: bool, kind: str) -> Counter[str]:
    """Of one decoded token of two requests, by operator."""
    weights = Weights(CONFIG | FAMILIES[family] | {"num_hidden_layers": layers}, format, CPU)
    model = Decoder(weights.config, weights, dtype=torch.bfloat16, device=CPU, positions=32, fused=fused)
    positions = torch.tensor([9, 4])
    batch = Decode(cache_of(model, kind), TABLE, positions, 10, ragged=True)
    with Launches() as mode:
        model.logits(model.hidden(torch.tensor([[5], [11]]), positions[:, None], batch))
    return mode.counts


@pytest.mark.parametrize("kind", ["none", "fp8"])
@pytest.mark.parametrize("format", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_decodes_a_token_with_ten_launches(family: str, format: str, kind: str) -> None:
    def of_a_block(fused: bool) -> Counter[str]:
        return launches(3, family, format, fused, kind) - launches(2, family, format, fused, kind)

    counts = of_a_block(fused=True)
    assert counts.total() == 10, counts
    products = sum(counts[name] for name in ("linear", "mm", "addmm", "dense_linear"))
    assert products == 4
    assert of_a_block(fused=False).total() > 30


def test_parts_that_no_single_product_replaces_stay_apart() -> None:
    """k scales its input otherwise than q and v: the numbers are those of transformers' layers all the same."""

    class Uneven(Weights):
        def of(self, module: str) -> dict[str, torch.Tensor]:
            stored = super().of(module)
            return stored | {"input_scale": torch.tensor(0.03)} if module.endswith("k_proj") else stored

    weights = Uneven(CONFIG, "fp8", CPU)
    models = [Decoder(CONFIG, weights, dtype=torch.bfloat16, device=CPU, positions=32, fused=f) for f in (True, False)]
    for out, expected in zip(*map(outputs, models), strict=True):
        assert (out - expected).abs().max() <= 2**-6 * expected.abs().max()
    attention = models[0].blocks[0].self_attn
    assert isinstance(attention.qkv_proj, SideBySide)
    assert attention.qkv_proj.kernel == "cublaslt"
    assert "model.layers.0.self_attn.k_proj" in models[0].linears
    assert "model.layers.0.mlp.gate_up_proj" in models[0].linears


def test_joined_scales_become_one_a_row() -> None:
    layer = decoder("llama", "fp8", fused=True).blocks[0].self_attn.qkv_proj
    assert isinstance(layer, KernelLinear)
    assert layer.channel_scales is not None
    assert layer.channel_scales.unique().numel() == 3
    assert layer.channel_scales.shape == (64 + 2 * 32,)


def test_tactics_of_joined_layers_have_their_rows() -> None:
    """Algorithms of q, k and v's one product must not be taken for those of another layer of q's own shape."""
    rows = {"self_attn.q_proj": 64, "self_attn.k_proj": 32, "self_attn.v_proj": 32, "self_attn.o_proj": 64}
    rows |= {"mlp.gate_proj": 96, "mlp.up_proj": 96}
    layers = {
        f"model.layers.0.{name}": {"out_features": count, "sparse": name != "mlp.up_proj", "buckets": [name]}
        for name, count in rows.items()
    }
    joined = linears._join_tactics(layers)
    assert {name.removeprefix("model.layers.0."): entry["out_features"] for name, entry in joined.items()} == {
        "self_attn.qkv_proj": 128,
        "self_attn.o_proj": 64,
        "mlp.gate_proj": 96,
        "mlp.up_proj": 96,
    }
    assert joined["model.layers.0.self_attn.qkv_proj"]["buckets"] == ["self_attn.q_proj"]


def test_a_joined_layer_that_does_not_fit_config_json_is_named() -> None:
    with pytest.raises(UserError, match=r"'model.layers.0.self_attn.qkv_proj' has shape \[128, 64\].*\[192, 64\]"):
        Decoder(
            CONFIG | {"num_key_value_heads": 4}, Weights(CONFIG, "bf16", CPU), dtype=torch.bfloat16, device=CPU,
            positions=32, fused=True,
        )  # fmt: skip


@pytest.mark.parametrize("fault", ["raises", "wrong", "nan"])
def test_an_operator_that_fails_gives_way_to_its_reference(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(gate_up: torch.Tensor, *_: object) -> torch.Tensor:
        if fault == "raises":
            raise RuntimeError("\nFailed to find C compiler.\nPlease specify")
        return torch.full_like(gate_up[:, :8], torch.nan if fault == "nan" else 3.0)

    monkeypatch.setattr(ops, "silu_mul", broken)
    monkeypatch.setattr(overlap, "enabled", True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    remarks: list[str] = []
    block_ops = BlockOps(remarks)
    gate_up = torch.randn(3, 16, dtype=torch.bfloat16)
    arguments = (gate_up, None, torch.bfloat16)
    expected = torch.nn.functional.silu(gate_up[:, :8]) * gate_up[:, 8:]
    assert torch.equal(block_ops.silu_mul._check((), arguments), expected)
    assert torch.equal(block_ops.silu_mul(*arguments), expected)
    without_overlap, remark = remarks
    assert without_overlap.startswith("kernels wait for one another's end: with overlap, silu_mul fails (")
    assert not overlap.enabled
    assert remark.startswith("silu_mul runs in plain torch, not as one kernel: ")
    reason = "RuntimeError: Failed to find C compiler." if fault == "raises" else "its numbers are off by up to"
    assert reason in remark


def test_an_operator_that_agrees_stays_and_writes_once() -> None:
    remarks: list[str] = []
    block_ops = BlockOps(remarks)
    residual, x = torch.ones(2, 8), torch.ones(2, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", lambda device: None)
        block_ops.rms_norm._check((), (residual, x, torch.ones(8), 1e-5, None, torch.float32))
    assert residual.tolist() == [[2.0] * 8] * 2
    assert remarks == []
