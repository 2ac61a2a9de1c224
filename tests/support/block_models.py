"""Small models of each family in random weights, as the torch engine's blocks are tested with them."""

from __future__ import annotations

import zlib

import torch

from benchmarks.kernels.model_shapes import Model
from builder.engines.torch_backend.random_model import RandomWeights

CONFIG = Model(64, 96, 4, 2, 3, 128, head_dim=16).config()
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 5},
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
    },
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
}


class Weights(RandomWeights):
    """Random weights, the same of a name every time, with Qwen's biases and norms of heads."""

    def of(self, module: str) -> dict[str, torch.Tensor]:
        own = module.rpartition(".")[2]
        generator = torch.Generator().manual_seed(zlib.crc32(module.encode()))
        shape = self.shapes[module]
        weight = torch.randn(shape.out_features, shape.in_features, generator=generator) / 8
        if own == "lm_head" or self.format == "bf16":
            stored = {"weight": weight}
        elif self.format == "int8":
            scale = weight.abs().amax(1) / 127
            stored = {"weight": (weight / scale[:, None]).round().to(torch.int8), "weight_scale": scale}
        else:
            scale = weight.abs().max() / 448
            stored = {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
        if self.format == "int8":
            stored["pre_quant_scale"] = torch.linspace(0.5, 1.5, weight.shape[1])
        if self.format != "bf16":
            stored["input_scale"] = torch.tensor(0.02)
        if self.config["model_type"] == "qwen2" and own in ("q_proj", "k_proj", "v_proj"):
            stored["bias"] = torch.randn(weight.shape[0], generator=generator) / 4
        return stored

    def __getitem__(self, name: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if name.endswith("embed_tokens.weight"):
            return torch.randn(self.config["vocab_size"], self.config["hidden_size"], generator=generator)
        heads = name.endswith(("q_norm.weight", "k_norm.weight"))
        return torch.rand(self.config["head_dim" if heads else "hidden_size"], generator=generator) + 0.5
