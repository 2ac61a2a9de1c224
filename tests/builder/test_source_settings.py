"""What a model's config and generation config ask for, before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from builder.planning.model_config import architecture
from builder.source_check import check_generation, check_settings, check_source
from plugins.common.errors import UserError

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
    "max_position_embeddings": 256,
}  # fmt: skip


LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def settings(backend: str = "torch", evaluated: bool = True, max_seq_len: int = 64, **config: Any) -> list[str]:
    values = SIZES | LLAMA | config
    return check_settings(values, architecture(values), "config.json", backend, evaluated, max_seq_len)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "ntk", "su"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rope_types_that_the_engine_does_not_run_are_refused_by_the_config_alone(kind: str, key: str) -> None:
    with pytest.raises(UserError, match=f"rope_type '{kind}' is not supported"):
        settings(**{key: {"type": kind, "factor": 2.0}})


def test_tensorrt_llms_own_rope_types_pass_where_nothing_is_evaluated() -> None:
    assert settings("tensorrt", evaluated=False, rope_scaling={"rope_type": "dynamic", "factor": 2.0}) == []
    with pytest.raises(UserError, match="accuracy.data=null"):
        settings("tensorrt", rope_scaling={"rope_type": "dynamic", "factor": 2.0})


@pytest.mark.parametrize(
    ("scaling", "fragment"),
    [
        ({"rope_type": "llama3", "factor": 8.0}, "lacks 'low_freq_factor'"),
        ({"rope_type": "linear", "factor": "2"}, "factor is '2', not a number above 0"),
        ({"rope_type": "yarn", "factor": -1}, "factor is '-1'"),
        ({"rope_type": ["linear"]}, "rope_type is"),
        ([], "rope_scaling is not a table"),
    ],
)
def test_rope_scalings_that_lack_a_number_are_refused(scaling: Any, fragment: str) -> None:
    with pytest.raises(UserError, match="(?s)" + fragment):
        settings(rope_scaling=scaling)


def test_attention_biases_are_refused_where_tensorrt_llm_has_none() -> None:
    qwen3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_key_value_heads": 2}
    assert settings(**qwen3, attention_bias=True) == []
    assert settings("pytorch", **qwen3, attention_bias=True) == []
    with pytest.raises(UserError, match="TensorRT-LLM's Qwen3 has no attention biases"):
        settings("tensorrt", **qwen3, attention_bias=True)


def test_attention_biases_of_a_family_without_are_noted_as_ignored() -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 2}
    (note,) = settings(**mistral, attention_bias=True)
    assert "attention_bias" in note
    assert not architecture({**_sizes(), **mistral, "attention_bias": True}).bias_qkv


def _sizes() -> dict[str, Any]:
    return {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 9,
    }


@pytest.mark.parametrize("backend", ["tensorrt", "pytorch", "torch"])
@pytest.mark.parametrize(
    ("family", "config", "window"),
    [
        ("Mistral", {"sliding_window": 16}, 16),
        ("Mistral", {"sliding_window": None}, None),
        ("Mistral", {"sliding_window": 64}, None),
        ("Qwen2", {"sliding_window": 16}, None),
        ("Qwen2", {"sliding_window": 16, "use_sliding_window": True}, 16),
        ("Qwen3", {"sliding_window": 16, "use_sliding_window": True}, 16),
        ("Llama", {"sliding_window": 16}, None),
    ],
)
def test_a_window_that_tensorrt_llm_does_not_apply_is_noted(
    backend: str, family: str, config: dict[str, Any], window: int | None
) -> None:
    names = {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower(), "num_key_value_heads": 2}
    notes = settings(backend, **names, **config)
    if window is None or backend == "torch":
        assert notes == []
    else:
        assert f"max_attention_window [{window}]" in notes[0]


@pytest.mark.parametrize(
    ("config", "fragment"),
    [
        ({"hidden_act": "mish"}, "hidden_act 'mish'"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"dtype": "torch.bfloat16"}, "dtype is 'torch.bfloat16'"),
        ({"num_attention_heads": 5}, "does not divide hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide"),
        ({"hidden_size": 64.5}, "hidden_size is '64.5'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is '0'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"architectures": "LlamaForCausalLM", "vocab_size": None}, "vocab_size is 'None'"),
    ],
)
def test_settings_that_cannot_be_built_are_quoted(config: dict[str, Any], fragment: str) -> None:
    with pytest.raises(UserError) as error:
        settings(**config)
    assert fragment in str(error.value)


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ('{"eos_token_id": "</s>"}', "eos_token_id is '</s>', not a token id"),
        ('{"eos_token_id": [1, null]}', "not a token id"),
        ("[]", "is not a JSON object"),
        ("{", "is not JSON"),
    ],
)
def test_a_generation_config_that_cannot_be_read_is_refused(model: Path, content: str, fragment: str) -> None:
    (model / "generation_config.json").write_text(content)
    with pytest.raises(UserError) as error:
        check_generation(model, {}, 4096)
    assert fragment in str(error.value)


def test_an_end_of_text_outside_the_vocabulary_is_noted(model: Path) -> None:
    (model / "generation_config.json").write_text('{"eos_token_id": [1, 9999], "pad_token_id": -1}')
    (note,) = check_generation(model, {}, 4096)
    assert "token 9999" in note


def test_tokens_that_the_model_has_not_are_noted(model: Path) -> None:
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append({"id": 4096, "content": "<|im_start|>", "special": True, **flags})
    path.write_text(json.dumps(tokenizer))
    (note,) = check_source(model)
    assert "from 4096 '<|im_start|>' on" in note
