"""The order of channels: an exact permutation for every family, with biases, norms of heads and grouped heads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from calibration.model.channel_order import ChannelOrder
from plugins.common.errors import UserError

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 128,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama, heads not grouped": LlamaConfig(**SIZES | {"num_key_value_heads": 8}),
    "mistral": MistralConfig(**SIZES, sliding_window=4),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
}
TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, 128, (4, 16)))


def random_orders(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    random = np.random.default_rng(1)
    halves = {"mlp": config.intermediate_size, "self_attn": config.num_key_value_heads}
    return {
        f"model.layers.{number}.{half}": tuple(random.permutation(count).tolist())
        for number in range(config.num_hidden_layers)
        for half, count in halves.items()
    }


@pytest.mark.parametrize("family", CONFIGS)
def test_the_reordered_model_is_the_dense_one(tmp_path: Path, family: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):  # zeros and ones hide a wrong order
            torch.nn.init.normal_(parameter, mean=1.0)
    model.save_pretrained(tmp_path)
    tensors, order = load_file(tmp_path / "model.safetensors"), ChannelOrder(model.config, random_orders(model.config))
    moved = {name: order.apply(name, tensor) for name, tensor in tensors.items()}
    changed = {name for name in tensors if not torch.equal(moved[name], tensors[name])}
    assert changed == {name for name in tensors if order.moves(name)}
    assert len([name for name in changed if name.endswith("weight")]) == 2 * 7
    save_file(
        {name: tensor.contiguous() for name, tensor in moved.items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits, atol=1e-5, rtol=1e-5)
    answers = [
        reader.generate(TOKENS, max_new_tokens=24, do_sample=False, pad_token_id=0).tolist()
        for reader in (again, model)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("orders", "fragment"),
    [
        ({"model.layers.2.mlp": range(96)}, "the model has no 'model.layers.2.mlp'"),
        ({"model.layers.0.self_attn": range(8)}, "each channel from 0 to 3 once"),
        ({"model.layers.0.mlp": [0] * 96}, "each channel from 0 to 95 once"),
    ],
)
def test_an_order_that_does_not_fit_the_model_is_refused(orders: dict[str, list[int]], fragment: str) -> None:
    with pytest.raises(UserError, match=fragment):
        ChannelOrder(CONFIGS["llama"], orders)
