"""The source model against its config: what lacks, what nothing reads, what a later stage could not build."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from builder.planning.hub import find_config
from builder.planning.model_config import architecture
from builder.source_check import check_source
from plugins.common.errors import UserError
from tests.support.models import change_config, random_model

Tensors = dict[str, torch.Tensor]


BLOCK = "model.layers.0."


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
    ("prefix", "fragment"),
    [
        ("_orig_mod.", "torch.compile"),
        ("base_model.model.", "merge_and_unload"),
        ("module.", "DistributedDataParallel"),
        ("module._orig_mod.", "torch.compile"),
        ("student.", "take it off"),
    ],
)
def test_names_behind_a_wrappers_prefix_are_refused_by_it(model: Path, prefix: str, fragment: str) -> None:
    rewrite(model, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    message = refusal(model)
    assert f"begin with '{prefix}'" in message
    assert fragment in message


def test_a_model_saved_without_its_head_is_refused(model: Path) -> None:
    rewrite(model, lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    assert "it is there as 'embed_tokens.weight'" in refusal(model)


def test_a_shape_that_is_not_the_configs_is_refused(model: Path) -> None:
    change_config(model / "config.json", model / "config.json", intermediate_size=256)
    assert "has shape [128, 64], config.json gives [256, 64]" in refusal(model)


@pytest.mark.parametrize(
    "name",
    [f"{BLOCK}self_attn.q_proj.bias", f"{BLOCK}mlp.down_proj.bias", f"{BLOCK}self_attn.q_norm.weight", "lm_head.bias",
     f"{BLOCK}post_feedforward_layernorm.weight", "model.norm.bias"],
)  # fmt: skip
def test_a_tensor_of_a_block_that_nothing_computes_is_refused(model: Path, name: str) -> None:
    rewrite(model, lambda tensors: tensors | {name: torch.ones(64)})
    assert f"holds '{name}'" in refusal(model)


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        (f"{BLOCK}self_attn.q_proj.lora_A.weight", "an adapter that is not merged"),
        (f"{BLOCK}self_attn.q_proj.weight_scale", "quantized already"),
        (f"{BLOCK}mlp.up_proj.weight_mask", "a mask that is not folded in"),
    ],
)
def test_leftovers_of_other_tools_are_refused_by_kind(model: Path, name: str, fragment: str) -> None:
    rewrite(model, lambda tensors: tensors | {name: torch.ones(8, 64)})
    assert fragment in refusal(model)


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
    assert "holds decoder block 2, and config.json has num_hidden_layers 2" in refusal(model)
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
