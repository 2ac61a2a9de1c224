"""Models that pruning refuses, by name, and ModelOpt's own methods on the same recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
)

from plugins.common.errors import UserError
from tests.support.pruning import TOKENS, is_2of4, make_model, names, prune


@pytest.mark.parametrize(
    "name", ["lm_head", "model.layers.9.mlp.up_proj", "model.layers.0.mlp", "model.layers.x.y", "a"]
)
def test_a_name_that_is_no_layer_of_a_block_is_quoted(llama: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"'{name}' is not a linear layer of a decoder block"):
        prune(llama, tmp_path / "out", [name])


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "reconstruct"])
def test_weights_that_are_not_finite_name_the_first_layer_they_reach(tmp_path: Path, method: str) -> None:
    source = make_model(tmp_path / "model")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, str(source / "model.safetensors"), {"format": "pt"})
    with pytest.raises(UserError, match=r"'model\.layers\.1\.mlp\.(up|down)_proj'"):
        prune(source, tmp_path / "out", method=method)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model")
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, str(source / "model.safetensors"), {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks the tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        prune(source, tmp_path / "out")


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model")
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors' is not a complete safetensors file"):
        prune(source, tmp_path / "out")


def test_a_missing_shard_is_named(llama: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"names '{shard.name}', which is missing"):
        prune(tmp_path / "model", tmp_path / "out")


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(UserError, match="'gpt2', which cannot be pruned: use one of llama"):
        prune(source, tmp_path / "out")


def test_modelopt_keeps_our_zeros_through_training_and_folds_them(llama: Path, tmp_path: Path) -> None:
    mts = pytest.importorskip("modelopt.torch.sparsity")
    from calibration.pruning.modelopt import apply_modelopt_masks

    layers = names(0, 1)
    prune(llama, tmp_path / "out", layers)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    zeros = {name: model.get_submodule(name).weight == 0 for name in layers}
    start = model.get_submodule(layers[0]).weight.detach().clone()
    model = apply_modelopt_masks(model, layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    tokens = torch.from_numpy(TOKENS)
    for _ in range(2):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    model = mts.export(model)
    for name in layers:
        folded = model.get_submodule(name)
        assert type(folded) is nn.Linear
        assert (folded.weight[zeros[name]] == 0).all()
    assert not torch.equal(model.get_submodule(layers[0]).weight, start)
    assert not any("_weight_mask" in name for name in model.state_dict())
    assert (model.get_submodule(names(2)[0]).weight != 0).all()


def test_modelopts_sparsegpt_prunes_the_named_layers(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("modelopt.torch.sparsity")
    layers = names(1)
    prune(llama, tmp_path / "out", layers, "modelopt-sparsegpt")
    before, after = load_file(llama / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    for name, weight in after.items():
        assert weight.ndim == 1 or is_2of4(weight) == (name.removesuffix(".weight") in layers)
        kept = weight != 0
        assert torch.equal(weight[kept], before[name][kept])
