"""STAND-IN: what every release's linear.py has in common: modes, shards, FP8 arithmetic, and the module itself.

Upstream all of it is in linear.py, with load helpers that put every tensor on the GPU.
"""

import enum
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import Parameter, functional

from tensorrt_llm.mapping import Mapping


class WeightMode(str, enum.Enum):
    VANILLA = "vanilla"
    FUSED_QKV_LINEAR = "fused_qkv_linear"
    FUSED_GATE_UP_LINEAR = "fused_gate_up_linear"


@dataclass(kw_only=True)
class WeightsLoadingConfig:
    weight_mode: WeightMode = WeightMode.VANILLA


class TensorParallelMode(str, enum.Enum):
    COLUMN = "column"
    ROW = "row"


def shards(module, weights, label):
    """Each part's rows (column parallel) or columns (row parallel) of this rank; a row-parallel bias goes whole."""

    def shard(tensor):
        if module.tp_mode is None or module.tp_size == 1 or (tensor.ndim == 1 and module.tp_mode == "row"):
            return tensor
        return tensor.chunk(module.tp_size, 1 if module.tp_mode == "row" else 0)[module.tp_rank].contiguous()

    return [shard(part[label]) for part in weights]


def create(module, shape, weight_dtype, bias, dtype):
    module.weight = Parameter(torch.empty(shape, dtype=weight_dtype), requires_grad=False)
    module.register_parameter("bias", Parameter(torch.empty(shape[:1], dtype=dtype), False) if bias else None)


def create_scales(module):
    for name in ("weight_scale", "input_scale", "inv_input_scale"):
        setattr(module, name, Parameter(torch.tensor(1.0), requires_grad=False))


def copy_bias(module, weights):
    if module.bias is not None:
        module.bias.data.copy_(torch.cat(shards(module, weights, "bias")))


def fuse_fp8(module, weights):
    """Weight and scales of a loaded FP8 layer: parts go to the largest of their scales, and are rounded again."""
    scales = [part["weight_scale"].reshape(()) for part in weights]
    parts = [
        part.to(module.dtype) * scale for part, scale in zip(shards(module, weights, "weight"), scales, strict=True)
    ]
    module.weight.data.copy_((torch.cat(parts) / max(scales)).to(torch.float8_e4m3fn))
    module.weight_scale.data.copy_(max(scales))
    if "input_scale" in weights[0]:
        module.input_scale.data.copy_(max(part["input_scale"].reshape(()) for part in weights))
        module.inv_input_scale.data.copy_(1 / module.input_scale)
    else:
        module.input_scale = module.inv_input_scale = None


def quantize(x, scale):
    """static_quantize_e4m3_per_tensor."""
    return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def multiply_fp8(module, input, bias):
    """FP8QDQLinearMethod.apply: e4m3 inputs pass, others are quantized, by the static scale or by one of their own."""
    scale = module.input_scale
    if input.dtype != torch.float8_e4m3fn:
        if scale is None or module.force_dynamic_quantization:
            scale = input.abs().max().float() / 448
        input = quantize(input, scale)
    wide = torch.promote_types(module.dtype, torch.float32)
    product = functional.linear(input.to(wide), module.weight.to(wide)) * (scale * module.weight_scale)
    return product.to(module.dtype) if bias is None else product.to(module.dtype) + bias


class LinearModule(nn.Module):
    """Linear without what changed between releases: how a method is found, loaded and called after loading."""

    def __init__(
        self,
        in_features,
        out_features,
        bias=False,
        dtype=None,
        mapping=None,
        tensor_parallel_mode=None,
        gather_output=False,
        quant_config=None,
        weights_loading_config=None,
        skip_create_weights_in_init=True,
        force_dynamic_quantization=False,
    ):
        super().__init__()
        self.mapping = mapping or Mapping()
        self.tp_size, self.tp_rank, self.tp_mode = self.mapping.tp_size, self.mapping.tp_rank, tensor_parallel_mode
        self.in_features = in_features // (self.tp_size if self.tp_mode == TensorParallelMode.ROW else 1)
        self.out_features = out_features // (self.tp_size if self.tp_mode == TensorParallelMode.COLUMN else 1)
        self.has_bias, self.dtype, self.gather_output = bias, dtype, gather_output
        self.quant_config, self.force_dynamic_quantization = quant_config, force_dynamic_quantization
        self.weights_loading_config = weights_loading_config or WeightsLoadingConfig()
        self._weights_created = False
        if not skip_create_weights_in_init:
            self.create_weights()

    def create_weights(self):
        if self._weights_created:
            return
        self.quant_method = self.get_quant_method(self.quant_config)
        self.quant_method.create_weights(self, self.in_features, self.out_features, self.has_bias, self.dtype)
        self._weights_created = True

    @property
    def has_fp8_qdq(self):
        return self.quant_config is not None and self.quant_config.layer_quant_mode.has_fp8_qdq()

    def apply_linear(self, input, bias):
        return self.quant_method.apply(self, input, bias)

    apply_before_allreduce = apply_linear  # 1.3 puts the product into a buffer of NCCL's

    def forward(self, input):
        if self.tp_mode == TensorParallelMode.ROW:
            output = self.apply_before_allreduce(input, None if self.tp_rank else self.bias)
            return output if self.tp_size == 1 else sum(self.mapping.group.exchange(self.tp_rank, output))
        output = self.apply_linear(input, self.bias)
        if self.gather_output and self.tp_size > 1:
            return torch.cat(self.mapping.group.exchange(self.tp_rank, output), -1)
        return output
