"""Models of random weights in a known model's shape, for timing: they show nothing of accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from builder.engines.torch_backend.decoder import Decoder
from builder.planning.model_config import architecture
from plugins.autotune import timing
from plugins.common.linear_shape import LinearShape
from plugins.common.patterns import TENSOR_CORE
from plugins.linear.factory import share_input
from plugins.linear.kernel_linear import DENSE, Choices, KernelLinear, choices_of
from plugins.linear.torch_linear import Linear, Scales

SCALES = (0.02, 0.05)  # of every weight and of every input


class RandomWeights:
    """A checkpoint's tensors made up on the device: linear layers 2:4, in bf16 or fp8 with static scales."""

    def __init__(self, config: dict[str, Any], format: str, device: torch.device) -> None:
        self.config, self.format, self.device = config, format, device
        self.shapes = {shape.name: shape for shape in architecture(config).linears()}

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def of(self, module: str) -> dict[str, torch.Tensor]:
        shape = (self.shapes[module].out_features, self.shapes[module].in_features)
        if module.endswith("lm_head") or self.format == "bf16":
            return {"weight": timing.random_sparse(*shape, torch.bfloat16, self.device).mul_(0.02)}
        weight = timing.random_sparse(*shape, torch.float8_e4m3fn, self.device)
        weight_scale, input_scale = (torch.tensor(scale, device=self.device) for scale in SCALES)
        return {"weight": weight, "weight_scale": weight_scale, "input_scale": input_scale}

    def __getitem__(self, name: str) -> torch.Tensor:
        width = int(self.config["hidden_size"])
        if name.endswith("embed_tokens.weight"):
            return torch.randn(int(self.config["vocab_size"]), width, device=self.device, dtype=torch.bfloat16)
        return torch.ones(width, device=self.device, dtype=torch.bfloat16)  # norms


def decoder_of(config: dict[str, Any], format: str, device: torch.device, positions: int) -> Decoder:
    """A dense model for sequences of up to `positions` tokens, its blocks' linear layers on our kernels on a GPU."""
    weights = RandomWeights(config, format, device)
    decoder = Decoder(config, weights, dtype=torch.bfloat16, device=device, positions=positions)
    if format == "bf16" and device.type == "cuda":
        replace(decoder, lambda layer: KernelLinear(layer.weight, None, None, decoder.dtype, DENSE), sparse=False)
    return decoder


def make_sparse(decoder: Decoder, tactics: dict[str, Any] | None) -> None:
    """Turns a dense fp8 model into its 2:4 twin: the same weights, on the kernels that `tactics` names by shape."""
    layers = (tactics or {}).get("layers", {})
    scales = Scales(*(torch.full((1,), scale, device=decoder.device) for scale in SCALES))

    def twin(layer: Linear) -> KernelLinear:
        kernels: Choices = choices_of(layers.get(key(layer)), TENSOR_CORE)
        return KernelLinear(layer.weights["cublaslt"], scales, layer.bias, decoder.dtype, kernels)

    replace(decoder, twin, sparse=True)


def replace(decoder: Decoder, make: Callable[[Linear], KernelLinear], sparse: bool) -> None:
    """Replaces each linear layer of the blocks by one made from its tensors."""
    decoder.linears.clear()  # or the weights of before would stay in memory
    for block in decoder.blocks:
        for parent in (block.self_attn, block.mlp):
            layers = [(name, layer) for name, layer in parent.named_children() if isinstance(layer, Linear)]
            for name, layer in layers:
                new = make(layer)
                new.format, new.pattern = layer.format, "2:4" if sparse else None
                setattr(parent, name, new)
                decoder.linears[f"{len(decoder.linears)}.{name}"] = new
        if hasattr(block.self_attn, "q_proj"):
            share_input([block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj])
            share_input([block.mlp.gate_proj, block.mlp.up_proj])
    if decoder.fused:
        decoder.fuse()


def kernel_layers(decoder: Decoder) -> list[KernelLinear]:
    """The linear layers that run on our kernels."""
    return [layer for layer in decoder.linears.values() if isinstance(layer, KernelLinear)]


def shapes_of(decoder: Decoder) -> dict[str, LinearShape]:
    """Their shapes, each once."""
    return {
        key(layer): LinearShape(layer.out_features, layer.in_features, layer.format) for layer in kernel_layers(decoder)
    }


def key(layer: Linear) -> str:
    return f"{layer.out_features}x{layer.in_features}"
