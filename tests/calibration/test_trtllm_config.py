"""Rotary settings and biases that ModelOpt loses on the way to a TensorRT-LLM checkpoint under transformers 5."""

import pytest

from calibration.quantization.trtllm_config import complete_config, rotary
from plugins.common.errors import UserError


def test_rotary_of_transformers_4_and_5_is_the_same():
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    four = {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **llama3}}
    five = {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3", **llama3}}
    assert rotary(four) == rotary(five) == (500000.0, {"type": "llama3", "rope_type": "llama3", **llama3})
    assert rotary({"rope_theta": 1e6, "rope_scaling": None}) == (1e6, None)
    assert rotary({}) == (10000.0, None)


def test_real_transformers_config_loses_rope_theta_and_complete_config_finds_it():
    from transformers import LlamaConfig

    config = LlamaConfig(rope_theta=500000.0, hidden_size=64, num_attention_heads=4)
    written = {"architecture": "LlamaForCausalLM"}
    assert complete_config(config.to_dict(), written)["rotary_base"] == 500000.0


def test_qwen_gets_its_type_and_its_biases():
    hf = {"rope_theta": 1e6}
    assert complete_config(hf, {"architecture": "Qwen2ForCausalLM"})["attn_bias"] is True
    done = complete_config(hf, {"architecture": "Qwen3ForCausalLM"})
    assert (done["qwen_type"], done["attn_bias"]) == ("qwen3", False)


def test_disagreeing_rotary_base_is_not_papered_over():
    with pytest.raises(UserError, match=r"rotary_base 10000\.0 and the model 500000\.0"):
        complete_config({"rope_theta": 500000.0}, {"architecture": "LlamaForCausalLM", "rotary_base": 10000.0})


def test_rotary_settings_by_layer_type_are_refused():
    with pytest.raises(UserError, match="differ by layer"):
        rotary({"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}})
