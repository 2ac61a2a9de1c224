"""A model family is one row: a made-up one plans, lays out, exports and loads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from builder.checkpoint.checkpoint_config import Quantization
from builder.checkpoint.layout import hf_tensors
from builder.planning.compatibility import check_architecture
from builder.planning.model_config import architecture
from calibration.quantization.trtllm_config import complete_config
from plugins.common.families import FAMILIES, model_types

CONFIG: dict[str, Any] = {
    "architectures": ["GranaryForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "dtype": "bfloat16",
}


@pytest.fixture
def granary(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family like Qwen3, under another name, with 2 key and value heads by default."""
    row = replace(FAMILIES["Qwen3ForCausalLM"], architecture="GranaryForCausalLM", model_type="granary",
                  num_key_value_heads=2, head_dim=32)  # fmt: skip
    monkeypatch.setitem(FAMILIES, row.architecture, row)


@pytest.mark.usefixtures("granary")
def test_one_row_adds_a_family_everywhere() -> None:
    shapes = architecture(CONFIG)
    assert (shapes.num_kv_heads, shapes.head_dim, shapes.max_position_embeddings) == (2, 32, 32768)
    assert shapes.other_parameters == 256 * 64 + 2 * (2 * 64 + 2 * 32) + 64
    tensors = hf_tensors(shapes, Quantization())
    assert tensors["model.layers.1.self_attn.q_norm.weight"].shapes == ((32,),)
    assert "granary" in model_types()
    assert check_architecture("GranaryForCausalLM", "tensorrt").ok
    exported = complete_config(CONFIG, {"architecture": "GranaryForCausalLM"})
    assert (exported["qwen_type"], exported["attn_bias"]) == ("qwen3", False)
