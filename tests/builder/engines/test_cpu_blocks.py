"""The decoder's blocks in libtwofour_cpu against transformers' layers: every family, windows, norms, biases, caches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from builder.engines.torch_backend import artifact
from builder.engines.torch_backend.engine import TorchEngine
from plugins.common.patterns import Pattern, keep_and_group
from plugins.common.request import Request
from plugins.libtwofour import cpu
from plugins.linear.hybrid_tensors import split
from plugins.sparsity.segments import Segments
from plugins.sparsity.torch_packing import pack

SIZES = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256, "initializer_range": 0.15,
}  # fmt: skip
FAMILIES = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
}
LIMITS = {
    "max_batch_size": 8,
    "max_seq_len": 128,
    "max_num_tokens": 256,
    "chunked_prefill": False,
    "cuda_graphs": False,
    "kv_cache_block_reuse": True,
    "kv_cache_memory": None,
    "kv_cache_budget": None,
}

pytestmark = pytest.mark.skipif(not cpu.has_bf16(), reason="this processor has no AVX512-BF16")


def make_engine(family: str, format: str, kv_cache: str, directory: Path) -> Path:
    """A random model of the family as an engine directory, its blocks' weights in `format`."""
    name, extra = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | extra)
    model = getattr(transformers, f"{name}ForCausalLM")(config).bfloat16()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 0.0 if parameter.abs().max() == 0 else 1.0, 0.1)
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight") and format != "bf16"]:
        layer, weight = name.removesuffix(".weight"), tensors.pop(name).float()
        pattern: Pattern = "6:8" if "6of8" in format else "2:4"
        if "of" in format:
            groups = weight.view(-1, keep_and_group(pattern)[1])
            groups.scatter_(-1, groups.abs().topk(2, largest=False).indices, 0)
        scale = weight.abs().amax(1) / 127
        quantized = (weight / scale[:, None]).round().to(torch.int8)
        if format.endswith("hybrid"):
            by_input = layer.endswith(("o_proj", "down_proj"))
            axis, size = ("inputs", weight.shape[1]) if by_input else ("rows", weight.shape[0])
            segments = Segments.split(axis, size, 32, pattern=pattern)
            cut = quantized[:, :32] if by_input else quantized[:32]
            if "of" not in format:
                cut.unflatten(1, (-1, 4))[..., 1:3] = 0
            tensors |= {f"{layer}.{key}": value for key, value in split(quantized, segments).items()}
        elif "of" in format:
            tensors |= {f"{layer}.{key}": value for key, value in pack(quantized, pattern).stored().items()}
        else:
            tensors[name] = quantized
        tensors[f"{layer}.weight_scale"] = scale
        if not format.endswith("token"):
            tensors[f"{layer}.input_scale"] = torch.tensor(0.03)
        tensors[f"{layer}.pre_quant_scale"] = torch.rand(weight.shape[1]) + 0.5
    if kv_cache != "none":
        for block in range(SIZES["num_hidden_layers"]):
            for side in "kv":
                tensors[f"model.layers.{block}.self_attn.{side}_proj.{side}_scale"] = torch.tensor(0.02)
    save_file(tensors, directory / "model.safetensors")
    facts = {"backend": "torch", "layout": artifact.LAYOUT, "format": format, "kv_cache": kv_cache, **LIMITS}
    (directory / "engine.json").write_text(json.dumps(facts))
    return directory


def prompts() -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randint(2, 256, (length,), generator=generator).tolist()) for length in (1, 9, 30, 4)]


def tokens_of(engine: TorchEngine) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for token in engine.generate([Request(str(i), p, 8 + 5 * i, ignore_eos=True) for i, p in enumerate(prompts())]):
        tokens.setdefault(token.request_id, []).append(token.token)
    return tokens


@pytest.mark.parametrize("kv_cache", [pytest.param("none", marks=pytest.mark.slow), "int8"])
@pytest.mark.parametrize(
    "format",
    [
        "int8-hybrid",
        "int8-2of4-token",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("bf16", "int8-2of4", "int8-6of8", "int8-6of8-hybrid")),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_compute_what_the_layers_compute(family: str, format: str, kv_cache: str, tmp_path: Path) -> None:
    directory = make_engine(family, format, kv_cache, tmp_path)
    engine, layers = artifact.load(directory), artifact.load(directory)
    assert engine.model._cpu_blocks is not None
    layers.model._cpu_blocks = None
    ids = torch.randint(2, 256, (3, 24), generator=torch.Generator().manual_seed(0))
    expected = layers.logits(ids)
    error = (engine.logits(ids) - expected).norm() / expected.norm()
    assert error < 0.02, "more than what bfloat16's rounding in another order makes"
    for prompt, tokens in zip(prompts(), tokens_of(engine).values(), strict=True):
        logits = layers.logits(torch.tensor([[*prompt, *tokens]]))[0, len(prompt) - 1 : -1]
        behind = logits.amax(-1) - logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        assert behind.max() < 0.2 * logits.std(), "each token wins in the layers too, after the same tokens, or nearly"


@pytest.mark.parametrize("family", FAMILIES)
def test_decoded_tokens_do_not_depend_on_the_batch(family: str, tmp_path: Path) -> None:
    engine = artifact.load(make_engine(family, "int8-2of4", "none", tmp_path))
    together = tokens_of(engine)
    for name, tokens in together.items():
        alone = [t.token for t in engine.generate([Request("x", prompts()[int(name)], len(tokens), ignore_eos=True)])]
        assert alone == tokens


@pytest.mark.parametrize(("isa", "fragment"), [("portable", "lacks AVX2"), ("avx2", "lacks AVX-512"), ("avx512", "")])
def test_a_processor_without_the_best_instructions_is_noted(isa: str, fragment: str, tmp_path: Path) -> None:
    best = cpu.isa()
    try:
        cpu.use_isa(isa)
        remarks = artifact.load(make_engine("llama", "int8-2of4", "none", tmp_path)).describe()["remarks"]
    finally:
        cpu.use_isa(best)
    noted = [remark for remark in remarks if "this processor lacks" in remark]
    assert len(noted) == bool(fragment)
    assert all(fragment in remark for remark in noted)


def test_an_engine_that_is_only_asked_for_logits_allocates_no_cache(tmp_path: Path) -> None:
    engine = artifact.load(make_engine("llama", "int8-2of4", "none", tmp_path))
    engine.logits(torch.zeros(2, 16, dtype=torch.int64))
    assert "keys" not in vars(engine._cache)


def test_evaluation_under_a_budget_is_that_of_the_layers(tmp_path: Path) -> None:
    """The library hands each layer's keys over in the memory of the layer before."""
    directory = make_engine("qwen3", "bf16", "none", tmp_path)
    facts = json.loads((directory / "engine.json").read_text())
    (directory / "engine.json").write_text(json.dumps(facts | {"max_seq_len": 256, "kv_cache_budget": 128}))
    engine, layers = artifact.load(directory), artifact.load(directory)
    assert engine.model._cpu_blocks is not None
    layers.model._cpu_blocks = None
    ids = torch.randint(2, 256, (2, 130), generator=torch.Generator().manual_seed(0))
    expected = layers.logits(ids)
    assert (engine.logits(ids) - expected).norm() / expected.norm() < 0.02
