"""Small random models of each family, and their pruning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from calibration.config import Sparsity
from calibration.pruning.block_pruner import LayerReport
from calibration.pruning.sparsify import sparsify
from plugins.sparsity.declaration import Declaration

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}


CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, head_dim=8, sliding_window=4),
    "qwen2": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
}


LINEARS = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]


TOKENS = np.random.default_rng(0).integers(0, 96, (12, 16))


def make_model(directory: Path, config: PretrainedConfig | None = None, dtype: torch.dtype = torch.bfloat16) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or CONFIGS["llama"]).to(dtype)
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    return directory


def names(*blocks: int) -> list[str]:
    return [f"model.layers.{block}.{linear}" for block in blocks for linear in LINEARS]


def is_2of4(weight: torch.Tensor) -> bool:
    return bool(((weight.unflatten(1, (-1, 4)) != 0).sum(2) <= 2).all())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"))


def prune(
    source: Path,
    out: Path,
    layers: list[str] | None = None,
    method: str = "sparsegpt",
    work: Path | None = None,
    progress=lambda stage, done, total: None,
) -> list[LayerReport]:
    layers = names(0, 1, 2) if layers is None else layers
    work = work or out.parent / f"{out.name}.work"
    return sparsify(source, TOKENS, Sparsity(method=method), Declaration(tuple(layers)), out, work, progress)
