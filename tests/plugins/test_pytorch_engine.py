"""The pytorch backend's engine directory: what is written, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from builder.engines.trtllm import pytorch, sparse_package
from plugins.common.errors import UserError
from tests.support import stand_ins
from tests.support.pytorch_checkpoints import (
    CONFIG,
    token_ids,
)
from tests.support.stand_ins import job


def test_engine_is_the_checkpoint_linked_with_a_module_and_launch_files(checkpoints, tmp_path):
    source, engine = checkpoints[True, True], tmp_path / "engine"
    pytorch.build(source, engine, CONFIG)
    assert (engine / "model.safetensors").samefile(source / "model.safetensors")
    facts = json.loads((engine / "engine.json").read_text())
    assert (facts["backend"], facts["format"]) == ("pytorch", "fp8")
    assert yaml.safe_load((engine / "llm_args.yaml").read_text())["max_batch_size"] == 4
    assert f'exec python3 -m {sparse_package.NAME} "$engine"' in (engine / "launch/serve.sh").read_text()
    assert not any(path.is_symlink() for path in engine.rglob("*"))


def test_dense_engine_needs_no_module(checkpoints, tmp_path):
    pytorch.build(checkpoints[False, False], tmp_path / "engine", CONFIG)
    assert not (tmp_path / "engine" / sparse_package.NAME).exists()
    assert 'exec trtllm-serve "$engine"' in (tmp_path / "engine/launch/serve.sh").read_text()


def test_transformers_4_finds_the_rotary_base_the_dtype_and_the_tokenizer_class(checkpoints, tmp_path):
    source = tmp_path / "checkpoint"
    source.mkdir()
    for path in checkpoints[False, False].iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 500000.0, "rope_type": "default"}
    (source / "config.json").write_text(json.dumps(config))
    pytorch.build(source, tmp_path / "engine", CONFIG)
    written = json.loads((tmp_path / "engine/config.json").read_text())
    assert (written["rope_theta"], written["rope_scaling"]) == (500000.0, None)
    assert written["rope_parameters"] == config["rope_parameters"]
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"
    tokenizer = json.loads((tmp_path / "engine/tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_measured_kernels_reach_the_module(checkpoints, tmp_path):
    layer = "model.layers.0.mlp.down_proj"
    buckets = [{"tokens": 16, "kernel": "skinny"}, {"tokens": 256, "kernel": "dense-cublaslt"}]
    for source, expected in (("measured", [[16, "skinny"], [256, "dense-cublaslt"]]), ("predicted", None)):
        tactics = {"source": source, "layers": {layer: {"buckets": buckets}}}
        engine = tmp_path / source
        pytorch.build(checkpoints[False, True], engine, CONFIG, tactics=tactics)
        layers = json.loads((engine / sparse_package.NAME / "layers.json").read_text())["layers"]
        assert layers[layer] == expected
        assert layers["model.layers.1.mlp.down_proj"] is None
        assert json.loads((engine / "tactics.json").read_text()) == tactics


def test_int8_is_refused_with_what_to_use_instead(checkpoints, tmp_path):
    checkpoint = tmp_path / "int8"
    checkpoint.mkdir()
    for path in checkpoints[True, False].iterdir():
        (checkpoint / path.name).write_bytes(path.read_bytes().replace(b'"FP8"', b'"W8A8_SQ_PER_CHANNEL"'))
    with pytest.raises(UserError, match=r"no INT8 W8A8 linear layer.*use quantization.format=fp8"):
        pytorch.build(checkpoint, tmp_path / "engine", CONFIG)


def test_tensor_parallel_that_cuts_a_group_is_refused(checkpoints, tmp_path):
    config = CONFIG.model_copy(update={"tensor_parallel": 128})
    with pytest.raises(UserError, match="cuts a 2:4 group of 4"):
        pytorch.build(checkpoints[False, True], tmp_path / "engine", config)


def test_unknown_algorithm_of_a_newer_modelopt_is_refused(checkpoints, tmp_path):
    checkpoint = tmp_path / "newer"
    checkpoint.mkdir()
    for path in checkpoints[True, False].iterdir():
        (checkpoint / path.name).write_bytes(path.read_bytes())
    path = checkpoint / "config.json"
    path.write_text(path.read_text().replace('"FP8"', '"NVFP9"'))
    with pytest.raises(UserError, match="quant_algo is 'NVFP9': only NO_QUANT, W8A8_SQ_PER_CHANNEL, FP8"):
        pytorch.build(checkpoint, tmp_path / "engine", CONFIG)


def leave_in_16_bit(source: Path, out: Path, names: list[str]) -> Path:
    """The FP8 checkpoint, with layers of the first block excluded from quantization."""
    out.mkdir()
    for path in source.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    tensors = load_file(out / "model.safetensors")
    for name in names:
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.bfloat16)
        del tensors[f"{name}.weight_scale"], tensors[f"{name}.input_scale"]
    save_file(tensors, out / "model.safetensors")
    for file, keys in (
        ("config.json", ("quantization_config", "ignore")),
        ("hf_quant_config.json", ("quantization", "exclude_modules")),
    ):
        content = json.loads((out / file).read_text())
        content[keys[0]][keys[1]] += names
        (out / file).write_text(json.dumps(content))
    return out


@pytest.mark.parametrize("release", ["1.0", "main"])
def test_excluded_projections_are_excluded_as_the_fused_layer_that_they_become(checkpoints, tmp_path, release):
    """1.0 looks for `qkv_proj` among the excluded names, later releases for its parts too."""
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    checkpoint = leave_in_16_bit(checkpoints[True, True], tmp_path / "checkpoint", names)
    pytorch.build(checkpoint, tmp_path / "engine", CONFIG)
    (result,) = stand_ins.load(tmp_path, token_ids(), job(tmp_path / "engine"), release=release)
    assert result["methods"]["model.layers.0.self_attn.qkv_proj"] == "SparseLinearMethod"
    assert result["methods"]["model.layers.1.self_attn.qkv_proj"] == "SparseFP8LinearMethod"


def test_some_parts_of_a_fused_layer_cannot_be_excluded(checkpoints, tmp_path):
    names = ["model.layers.0.self_attn.q_proj"]
    checkpoint = leave_in_16_bit(checkpoints[True, True], tmp_path / "checkpoint", names)
    with pytest.raises(
        UserError, match=r"q_proj bf16, k_proj fp8, v_proj fp8, and TensorRT-LLM fuses them into one qkv"
    ):
        pytorch.build(checkpoint, tmp_path / "engine", CONFIG)
