"""The source model against its config: what lacks, what nothing reads, what a later stage could not build."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from builder.planning.hub import find_config
from builder.planning.model_config import architecture
from builder.source_check import check_generation, check_settings, check_source
from plugins.common.errors import UserError
from tests.support.models import change_config, random_model

Tensors = dict[str, torch.Tensor]
BLOCK = "model.layers.0."


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return random_model(tmp_path / "model", "Llama")


def rewrite(model: Path, change: Callable[[Tensors], Tensors]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(change(tensors), model / "model.safetensors", metadata={"format": "pt"})


def refusal(model: Path) -> str:
    with pytest.raises(UserError) as error:
        check_source(model)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_whole_model_needs_no_note(model: Path) -> None:
    assert check_source(model) == []


@pytest.mark.parametrize("family", ["Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_family_tied_or_not_is_whole(family: str, tied: bool, tmp_path: Path) -> None:
    notes = check_source(random_model(tmp_path / "model", family, tied=tied))
    assert [note for note in notes if "tokenizer.json" not in note] == []  # the tokenizer is the example's


# weights that are not there


@pytest.mark.parametrize(
    "name",
    ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", f"{BLOCK}mlp.up_proj.weight",
     f"{BLOCK}input_layernorm.weight", "model.layers.1.self_attn.k_proj.weight"],
)  # fmt: skip
def test_a_tensor_that_lacks_is_named(model: Path, name: str) -> None:
    rewrite(model, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name})
    assert f"lacks the tensor '{name}'" in refusal(model)


def test_a_head_that_lacks_gets_advice_about_tying(model: Path) -> None:
    rewrite(model, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != "lm_head.weight"})
    assert "tie_word_embeddings" in refusal(model)


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("_orig_mod.", "torch.compile"),
        ("base_model.model.", "merge_and_unload"),
        ("module.", "DistributedDataParallel"),
        ("module._orig_mod.", "torch.compile"),
        ("student.", "take it off"),
    ],
)
def test_names_behind_a_wrappers_prefix_are_refused_by_it(model: Path, prefix: str, words: str) -> None:
    rewrite(model, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    message = refusal(model)
    assert f"begin with '{prefix}'" in message
    assert words in message


def test_a_model_saved_without_its_head_is_refused(model: Path) -> None:
    rewrite(model, lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    assert "it is there as 'embed_tokens.weight'" in refusal(model)


def test_a_shape_that_is_not_the_configs_is_refused(model: Path) -> None:
    change_config(model / "config.json", model / "config.json", intermediate_size=256)
    assert "has shape [128, 64], config.json says [256, 64]" in refusal(model)


# tensors that nothing reads


@pytest.mark.parametrize(
    "name",
    [f"{BLOCK}self_attn.q_proj.bias", f"{BLOCK}mlp.down_proj.bias", f"{BLOCK}self_attn.q_norm.weight", "lm_head.bias",
     f"{BLOCK}post_feedforward_layernorm.weight", "model.norm.bias"],
)  # fmt: skip
def test_a_tensor_of_a_block_that_nothing_computes_is_refused(model: Path, name: str) -> None:
    rewrite(model, lambda tensors: tensors | {name: torch.ones(64)})
    assert f"holds '{name}'" in refusal(model)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (f"{BLOCK}self_attn.q_proj.lora_A.weight", "an adapter that is not merged"),
        (f"{BLOCK}self_attn.q_proj.weight_scale", "quantized already"),
        (f"{BLOCK}mlp.up_proj.weight_mask", "a mask that is not folded in"),
    ],
)
def test_leftovers_of_other_tools_are_refused_by_kind(model: Path, name: str, words: str) -> None:
    rewrite(model, lambda tensors: tensors | {name: torch.ones(8, 64)})
    assert words in refusal(model)


@pytest.mark.parametrize(
    "name",
    [f"{BLOCK}self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "v_head.summary.weight", "score.weight",
     "model.layers.2.eh_proj.weight", "mtp.fc.weight", f"{BLOCK}self_attn.masked_bias"],
)  # fmt: skip
def test_buffers_extra_heads_and_prediction_blocks_are_left_alone(model: Path, name: str) -> None:
    rewrite(model, lambda tensors: tensors | {name: torch.ones(8)})
    assert check_source(model) == []


def test_a_prediction_block_with_a_whole_decoder_block_is_left_alone(model: Path) -> None:
    rewrite(model, lambda tensors: tensors | _block(tensors, 2) | {"model.layers.2.enorm.weight": torch.ones(64)})
    assert check_source(model) == []


def test_blocks_beyond_the_configs_are_refused(model: Path) -> None:
    rewrite(model, lambda tensors: tensors | _block(tensors, 2))
    assert "holds decoder block 2, and config.json says num_hidden_layers 2" in refusal(model)
    change_config(model / "config.json", model / "config.json", num_nextn_predict_layers=1)
    assert check_source(model) == []


def _block(tensors: Tensors, number: int) -> Tensors:
    return {
        name.replace(BLOCK, f"model.layers.{number}."): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(BLOCK)
    }


def test_any_other_tensor_is_named(model: Path) -> None:
    rewrite(
        model, lambda tensors: tensors | {"vision.patch.weight": torch.ones(8), "vision.norm.weight": torch.ones(8)}
    )
    (note,) = check_source(model)
    assert note.startswith("'vision.norm.weight' (and 1 more)")


# files


@pytest.mark.parametrize("name", ["consolidated.safetensors", "adapter_model.safetensors", "original.safetensors"])
def test_other_safetensors_beside_the_model_are_left_alone(model: Path, name: str) -> None:
    save_file({"layers.0.attention.wq.weight": torch.ones(4)}, model / name)
    assert check_source(model) == []


def test_an_adapter_alone_is_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "adapter_model.safetensors")
    assert "is an adapter: merge it into its base model first" in refusal(model)


def shard(model: Path, index: dict[str, str] | None = None) -> list[str]:
    """Two shards and their index, with the entries of `index` added; the names of the tensors."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names, files = sorted(tensors), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for file, held in zip(files, (names[:9], names[9:]), strict=True):
        save_file({name: tensors[name].clone() for name in held}, model / file, metadata={"format": "pt"})
    weight_map = {name: files[at >= 9] for at, name in enumerate(names)} | (index or {})
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return names


def test_stale_entries_of_an_index_are_left_alone(model: Path) -> None:
    shard(model, {"model.layers.0.self_attn.rotary_emb.inv_freq": "model-00001-of-00002.safetensors"})
    assert check_source(model) == []


def test_a_stale_index_beside_the_one_file_is_left_alone(model: Path) -> None:
    index = {"metadata": {}, "weight_map": {"gone.weight": "model-00001-of-00003.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert check_source(model) == []


def test_shards_without_an_index_and_a_shard_that_lacks_are_refused(model: Path) -> None:
    shard(model)
    (model / "model-00002-of-00002.safetensors").rename(model / "elsewhere")
    assert "names 'model-00002-of-00002.safetensors', which is missing" in refusal(model)
    (model / "elsewhere").rename(model / "model-00002-of-00002.safetensors")
    (model / "model.safetensors.index.json").unlink()
    assert "without an index" in refusal(model)


def test_a_tensor_in_two_shards_is_refused(model: Path) -> None:
    names = shard(model)
    second = model / "model-00002-of-00002.safetensors"
    save_file(load_file(second) | {names[0]: torch.zeros(4096, 64)}, second, metadata={"format": "pt"})
    assert f"holds '{names[0]}' in 'model-00001-of-00002.safetensors' and '{second.name}'" in refusal(model)


# dtypes


@pytest.mark.parametrize(
    ("named", "stored", "expected"),
    [
        (None, torch.float16, "float16"),
        (None, torch.float32, "float32"),
        ("bfloat16", torch.float32, "bfloat16"),
        ("float32", torch.bfloat16, "float32"),
    ],
)
def test_the_dtype_is_the_configs_or_else_the_weights(
    model: Path, named: str | None, stored: torch.dtype, expected: str
) -> None:
    rewrite(model, lambda tensors: {name: tensor.to(stored) for name, tensor in tensors.items()})
    config = json.loads((model / "config.json").read_text())
    del config["dtype"]
    (model / "config.json").write_text(json.dumps(config | ({"dtype": named} if named else {})))
    assert architecture(*find_config(str(model))).dtype == expected
    notes = check_source(model)
    assert len(notes) == (named is not None)
    assert all(f"read as {expected}" in note for note in notes)


def test_quantized_weights_without_a_quantization_config_are_refused(model: Path) -> None:
    rewrite(model, lambda tensors: tensors | {f"{BLOCK}mlp.up_proj.weight": torch.ones(128, 64, dtype=torch.int8)})
    assert "is I8: start from the 16-bit model" in refusal(model)


# settings


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
    ("scaling", "words"),
    [
        ({"rope_type": "llama3", "factor": 8.0}, "lacks 'low_freq_factor'"),
        ({"rope_type": "linear", "factor": "2"}, "factor is '2', not a number above 0"),
        ({"rope_type": "yarn", "factor": -1}, "factor is '-1'"),
        ({"rope_type": ["linear"]}, "rope_type is"),
        ([], "rope_scaling is not a table"),
    ],
)
def test_rope_scalings_that_lack_a_number_are_refused(scaling: Any, words: str) -> None:
    with pytest.raises(UserError, match="(?s)" + words):
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
    ("config", "words"),
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
def test_settings_that_cannot_be_built_are_quoted(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        settings(**config)
    assert words in str(error.value)


# generation config and tokenizer


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"eos_token_id": "</s>"}', "eos_token_id is '</s>', not a token id"),
        ('{"eos_token_id": [1, null]}', "not a token id"),
        ("[]", "is not a JSON object"),
        ("{", "is not JSON"),
    ],
)
def test_a_generation_config_that_cannot_be_read_is_refused(model: Path, content: str, words: str) -> None:
    (model / "generation_config.json").write_text(content)
    with pytest.raises(UserError) as error:
        check_generation(model, {}, 4096)
    assert words in str(error.value)


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
