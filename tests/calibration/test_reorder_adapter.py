"""A LoRA adapter of the dense model on a checkpoint whose channels are in another order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from calibration.lora.peft_format import tensor_names
from calibration.lora.reorder import reorder_adapter
from calibration.model.channel_order import ChannelOrder
from plugins.common.errors import UserError
from plugins.sparsity.declaration import Declaration
from tests.support.command import done, refused
from tests.support.models import random_model

RANK = 3
ORDER = {"model.layers.0.mlp": tuple(reversed(range(128))), "model.layers.1.self_attn": (1, 0)}
IDS = torch.arange(40)[None] % 4096


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dense`, the same model as `reordered`, and `adapter` for the dense one."""
    root = tmp_path_factory.mktemp("reorder")
    dense = random_model(root / "dense", "Qwen2")
    reordered = root / "reordered"
    order = ChannelOrder(AutoConfig.from_pretrained(dense), ORDER)
    reordered.mkdir()
    for file in dense.iterdir():
        (reordered / file.name).write_bytes(file.read_bytes())
    tensors = load_file(dense / "model.safetensors")
    moved = {name: order.apply(name, tensor).contiguous() for name, tensor in tensors.items()}
    save_file(moved, reordered / "model.safetensors", {"format": "pt"})
    Declaration(order=ORDER).write(reordered)
    torch.manual_seed(0)
    lora = {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            a, b = tensor_names(name.removesuffix(".weight"))
            lora[a], lora[b] = torch.randn(RANK, tensor.shape[1]) / 20, torch.randn(tensor.shape[0], RANK)
    (root / "adapter").mkdir()
    save_file(lora, root / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    (root / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK}))
    return root


def logits(model: Path, adapter: Path) -> torch.Tensor:
    """Of the model with the adapter merged into its weights, in float64."""
    opened = AutoModelForCausalLM.from_pretrained(model).double()
    lora = load_file(adapter / "adapter_model.safetensors")
    for name, module in opened.named_modules():
        a, b = tensor_names(name)
        if a in lora:
            module.weight.data += lora[b].double() @ lora[a].double()
    with torch.inference_mode():
        return opened(IDS).logits


def test_the_adapter_does_on_the_reordered_model_what_it_does_on_the_dense_one(places: Path, tmp_path: Path) -> None:
    printed = done("adapter", places / "adapter", places / "reordered", "--out", tmp_path / "out").stdout
    assert printed.startswith("7 matrices reordered")
    expected = logits(places / "dense", places / "adapter")
    torch.testing.assert_close(logits(places / "reordered", tmp_path / "out"), expected)
    assert not torch.allclose(logits(places / "reordered", places / "adapter"), expected)


def test_an_adapter_that_is_in_the_order_already_is_refused(places: Path, tmp_path: Path) -> None:
    reorder_adapter(places / "adapter", places / "reordered", tmp_path / "out")
    assert "already in a build's channel order" in refused(
        "adapter", tmp_path / "out", places / "reordered", "--out", tmp_path / "twice"
    )


def test_a_checkpoint_without_an_order_is_refused(places: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lists no channel order: the adapter fits as it is"):
        reorder_adapter(places / "adapter", places / "dense", tmp_path / "out")


def test_an_adapter_of_another_model_is_refused(places: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "adapter_config.json").write_text("{}")
    _, b = tensor_names("model.layers.0.mlp.up_proj")
    save_file({b: torch.zeros(64, RANK)}, wrong / "adapter_model.safetensors")
    with pytest.raises(UserError, match="128 channels"):
        reorder_adapter(wrong, places / "reordered", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_directory_that_is_no_adapter_is_refused(places: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give the directory of a PEFT adapter"):
        reorder_adapter(tmp_path, places / "reordered", tmp_path / "out")
