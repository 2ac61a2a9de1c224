"""The engine, loaded from the files it wrote, against ModelOpt's fake-quantized model in memory."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from builder.engines.torch_backend import artifact, engine_weights
from builder.engines.torch_backend.artifact import Limits, TorchEngine
from builder.planning.model_config import architecture, read_config
from calibration.config import Quantization
from calibration.quantization import export, quantize
from plugins.common.patterns import Pattern, bytes_per_weight, keep_and_group
from plugins.common.request import Request
from plugins.sparsity.declaration import Declaration
from plugins.sparsity.torch_packing import PACKED

LENGTH = 128
WINDOWS = 16  # 2048 evaluation tokens
CASES: dict[str, tuple[Any, Pattern | None, Any]] = {  # format, pattern, KV cache; "-token": a scale for each token
    "int8": ("int8", None, "none"),
    "fp8": ("fp8", None, "none"),
    "int8-2of4": ("int8", "2:4", "none"),
    "int8-2of4-token": ("int8", "2:4", "none"),
    "int8-6of8": ("int8", "6:8", "none"),
    "fp8-2of4": ("fp8", "2:4", "none"),
    "fp8-2of4-kv": ("fp8", "2:4", "fp8"),
    "int8-kv": ("int8", None, "int8"),
}
# What the logits are held to. Both sides compute from the same 8-bit weights: fp8 in the same float32 operations, int8
# in exact sums where ModelOpt adds floats. A last bit that differs takes an activation next to a tie to the other side,
# and what that sets off behind it is far larger: ModelOpt's own model, computed in float64 and in float32, agrees with
# itself on 98.3 to 99.4% of these tokens. So 99% is asked, or what ModelOpt's model reaches against itself, less SLACK.
# Measured, error and agreement: int8 0.0055, 99.4%; fp8 0.0041, 99.6%; int8-2of4 0.0048, 99.1%; fp8-2of4 0, 100%;
# fp8-2of4-kv 0.0073, 98.8%; int8-kv 0.0075, 98.6%.
MAX_ERROR = 0.01  # relative, in the Frobenius norm
SLACK = 0.01


@dataclass
class Built:
    """One case: ModelOpt's logits [B, T, V] of the evaluation tokens, their agreement with float64, the engine."""

    modelopt: torch.Tensor
    agrees_with_itself: float
    directory: Path


def windows(model: Path, file: str, count: int) -> torch.Tensor:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids: list[int] = []
    with (model / file).open(encoding="utf8") as lines:
        for line in lines:
            ids += tokenizer(json.loads(line)["text"])["input_ids"]
            if len(ids) >= count * LENGTH:
                break
    return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)


def prune(layer: nn.Linear, pattern: Pattern) -> None:
    keep, group = keep_and_group(pattern)
    groups = layer.weight.data.view(-1, group)
    groups.scatter_(-1, groups.abs().topk(group - keep, largest=False).indices, 0)


@pytest.fixture(scope="module")
def build(docs_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """Calibrates, exports and builds a case on first use."""
    pytest.importorskip("modelopt", reason="needs the 'calibrate' extra")
    calibration = windows(docs_llama, "calibration.jsonl", 8).numpy()
    evaluation = windows(docs_llama, "evaluation.jsonl", WINDOWS)
    layers = [linear.name for linear in architecture(read_config(docs_llama)).linears() if linear.name != "lm_head"]
    known: dict[str, Built] = {}

    def make(case: str) -> Built:
        if case in known:
            return known[case]
        number_format, pattern, kv_cache = CASES[case]
        out = tmp_path_factory.mktemp(case)
        model = quantize.load_model(docs_llama)
        for name in layers if pattern else ():
            prune(model.get_submodule(name), pattern)
        per_token = case.endswith("-token")
        activations: Any = "per_token" if per_token else "per_tensor"
        config = Quantization(format=number_format, activations=activations, kv_cache=kv_cache)
        model = quantize.quantize(model, config, layers, calibration)
        with torch.inference_mode():
            logits = copy.deepcopy(model).float()(evaluation).logits
            itself = agreement(copy.deepcopy(model).double()(evaluation).logits, logits)
        declared = Declaration(tuple(layers), pattern=pattern) if pattern else Declaration()
        export.export_hf(model, docs_llama, out / "checkpoint", declared, per_token)
        artifact.build(out / "checkpoint", out / "engine", Limits(max_batch_size=4))
        known[case] = Built(logits, itself, out / "engine")
        return known[case]

    return make


@pytest.fixture(scope="module")
def evaluation(docs_llama: Path) -> torch.Tensor:
    return windows(docs_llama, "evaluation.jsonl", WINDOWS)


@pytest.fixture(scope="module")
def dense(docs_llama: Path, evaluation: torch.Tensor) -> torch.Tensor:
    return artifact.load_hf(docs_llama, dtype=torch.float32).logits(evaluation)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_modelopts(
    case: str, build: Callable[[str], Built], evaluation: torch.Tensor, dense: torch.Tensor
) -> None:
    built = build(case)
    logits = artifact.load(built.directory, dtype=torch.float32).logits(evaluation)
    agreed, error = agreement(logits, built.modelopt), relative_error(logits, built.modelopt)
    print(f"{case}: relative error {error:.5f}, top-1 agreement {agreed:.4f} on {evaluation.numel()} tokens")
    print(f"{case}: ModelOpt's model in float64 and float32 agrees on {built.agrees_with_itself:.4f}")
    assert agreed >= min(0.99, built.agrees_with_itself - SLACK)
    assert error < MAX_ERROR
    assert relative_error(logits, dense) > 2 * MAX_ERROR, "an engine that rounded nothing would pass otherwise"


def agreement(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """The share of tokens with the same most probable next one."""
    return (logits.argmax(-1) == reference.argmax(-1)).double().mean().item()


def relative_error(logits: torch.Tensor, reference: torch.Tensor) -> float:
    return ((logits - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("case", CASES)
def test_engine_directory_matches_its_description(case: str, build: Callable[[str], Built], docs_llama: Path) -> None:
    number_format, pattern, kv_cache = CASES[case]
    directory = build(case).directory
    engine = json.loads((directory / "engine.json").read_text())
    assert (engine["backend"], engine["format"], engine["kv_cache"]) == ("torch", number_format, kv_cache)
    assert engine["max_seq_len"] == 512, "cut to the model's positions"
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())
    assert (directory / "tokenizer.json").read_bytes() == (docs_llama / "tokenizer.json").read_bytes()
    elements = sum(x.numel for x in architecture(read_config(docs_llama)).linears() if x.name != "lm_head")
    tensors = engine_weights.open_tensors(directory)
    parts = tuple(f"_proj.{name}" for name in ("weight", *PACKED))
    stored = sum(tensors[name].nbytes for name in tensors if name.endswith(parts))
    assert stored == elements * (bytes_per_weight(pattern, 1) if pattern else 1)
    assert engine["pattern"] == pattern


@pytest.mark.parametrize("case", ["int8-2of4", "int8-6of8", "fp8-2of4-kv", "int8-kv"])
def test_cached_decoding_is_the_uncached_model(
    case: str, build: Callable[[str], Built], evaluation: torch.Tensor
) -> None:
    """Greedy tokens through prefill, cache and decode are the argmax of the logits over the whole sequence."""
    engine = artifact.load(build(case).directory, dtype=torch.float64)
    prompts = [evaluation[0, :60], evaluation[1, :17], evaluation[2, :1]]
    requests = [_request(str(i), prompt, 24) for i, prompt in enumerate(prompts)]
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    for token in engine.generate(requests):
        tokens[token.request_id].append(token.token)
    for request, prompt in zip(requests, prompts, strict=True):
        whole = torch.cat([prompt, torch.tensor(tokens[request.id])])[None]
        assert engine.logits(whole)[0, len(prompt) - 1 : -1].argmax(-1).tolist() == tokens[request.id]


@pytest.mark.parametrize("kept", ["2of4", "6of8"])
def test_kernels_and_bytes_are_described(build: Callable[[str], Built], kept: str) -> None:
    engine: TorchEngine = artifact.load(build(f"int8-{kept}").directory)
    facts = engine.describe()
    assert facts["kernels"][f"cpu-{kept}"] == 42
    assert not any("unpacked" in remark for remark in facts["remarks"])
    assert any("layers that are not 8 bit compute in" in remark for remark in facts["remarks"])


def _request(name: str, prompt: torch.Tensor, new: int) -> Request:
    return Request(name, tuple(prompt.tolist()), new, ignore_eos=True)
