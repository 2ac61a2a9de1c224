from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from builder.verify import verify
from calibration.config import Quantization
from calibration.quantization import export, quantize
from calibration.quantization.quantize import shares_embedding
from plugins.sparsity.declaration import Declaration
from tests.support.models import random_model

pytest.importorskip("modelopt", reason="needs the 'calibrate' extra")


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return random_model(tmp_path / "model", "Llama", tied=True)


def linears(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 4096, (4, 32))


@pytest.mark.parametrize("config", [
    Quantization(format="int8"),
    Quantization(format="int8", activations="per_token"),
    Quantization(format="fp8"),
])  # fmt: skip
def test_an_8_bit_head_leaves_the_embedding_that_it_shared_alone(config: Quantization, tied: Path) -> None:
    from safetensors.torch import load_file

    model = quantize.load_model(tied)
    assert shares_embedding(model, "lm_head")
    embedding = model.get_input_embeddings().weight.detach().clone()
    model = quantize.quantize(model, config, linears(model), tokens())
    out = tied.parent / "out"
    export.export_hf(model, tied, out, Declaration(()), config.activations == "per_token")
    stored = load_file(out / "model.safetensors")
    assert torch.equal(stored["model.embed_tokens.weight"], embedding)
    assert stored["lm_head.weight"].dtype == (torch.int8 if config.format == "int8" else torch.float8_e4m3fn)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert verify(out).ok


def test_channels_without_weights_or_inputs_are_not_smoothed(tied: Path) -> None:
    """Pruning empties whole columns; a dead channel before it has no inputs."""
    model = quantize.load_model(tied)
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        mlp.down_proj.weight[:, 5] = 0
        mlp.up_proj.weight[7] = 0
    layers = [name for name in linears(model) if name != "lm_head"]
    model = quantize.quantize(model, Quantization(format="int8", activations="per_token"), layers, tokens())
    smoothing = model.model.layers[0].mlp.down_proj.input_quantizer.pre_quant_scale
    assert (smoothing[5], smoothing[7]) == (1, 1)
    assert torch.isfinite(model(torch.from_numpy(tokens())).logits).all()
    gate, up = (getattr(mlp, name).input_quantizer.pre_quant_scale for name in ("gate_proj", "up_proj"))
    assert torch.equal(gate, up)


def test_a_scale_for_each_token_leaves_no_input_scale_and_a_stray_one_is_detected(tied: Path) -> None:
    from safetensors.torch import load_file, save_file

    config = Quantization(format="int8", activations="per_token", exclude=("lm_head",))
    model = quantize.load_model(tied)
    layers = [name for name in linears(model) if name != "lm_head"]
    model = quantize.quantize(model, config, layers, tokens())
    out = tied.parent / "out"
    export.export_hf(model, tied, out, Declaration(()), per_token=True)
    assert verify(out).ok
    stored = load_file(out / "model.safetensors")
    assert not [name for name in stored if name.endswith("input_scale")]
    stored[f"{layers[0]}.input_scale"] = torch.tensor(0.5)
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    assert [violation.tensor for violation in verify(out).violations] == [f"{layers[0]}.input_scale"]
