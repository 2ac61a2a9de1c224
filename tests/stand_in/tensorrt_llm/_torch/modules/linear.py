"""STAND-IN: Linear and its methods, of the generation in which FP8QDQLinearMethod extends the unquantized one."""

import enum
from abc import ABC, abstractmethod
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


def load_weight_shard(tensor, tp_size, tp_rank, mode):
    """This rank's rows (column parallel) or columns (row parallel); scalars and a row-parallel bias go whole."""
    if mode is None or tp_size == 1 or tensor.ndim == 0 or (tensor.ndim == 1 and mode == TensorParallelMode.ROW):
        return tensor
    return tensor.chunk(tp_size, 0 if mode == TensorParallelMode.COLUMN else 1)[tp_rank].contiguous()


class LinearMethodBase(ABC):
    @abstractmethod
    def create_weights(self, module, in_features, out_features, bias, dtype): ...

    @abstractmethod
    def apply(self, module, input, bias, *args, **kwargs): ...

    @abstractmethod
    def load_weights(self, module, weights, weight_mode, allow_partial_loading=False): ...

    def post_load_weights(self, module):
        return None


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(self, module, in_features, out_features, bias, dtype):
        module.weight = Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)
        module.register_parameter("bias", Parameter(torch.empty(out_features, dtype=dtype), False) if bias else None)

    def apply(self, module, input, bias, *args, **kwargs):
        return functional.linear(input, module.weight, bias)

    def apply_out(self, module, input, bias, out):
        return out.copy_(self.apply(module, input, bias))

    def load_weights(self, module, weights, weight_mode, allow_partial_loading=False):
        shards = [load_weight_shard(w["weight"], module.tp_size, module.tp_rank, module.tp_mode) for w in weights]
        self.set_weight(module, shards, weights)
        if module.bias is not None:
            biases = [load_weight_shard(w["bias"], module.tp_size, module.tp_rank, module.tp_mode) for w in weights]
            module.bias.data.copy_(torch.cat(biases))

    def set_weight(self, module, shards, weights):
        module.weight.data.copy_(torch.cat(shards))


class FP8QDQLinearMethod(UnquantizedLinearMethod):
    """FP8 weights and inputs, one scale each. Fused layers take the largest of their parts' scales, and round again."""

    def create_weights(self, module, in_features, out_features, bias, dtype):
        super().create_weights(module, in_features, out_features, bias, dtype)
        module.weight = Parameter(module.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
        for name in ("weight_scale", "input_scale", "inv_input_scale"):
            setattr(module, name, Parameter(torch.tensor(1.0), requires_grad=False))

    def set_weight(self, module, shards, weights):
        scales = [w["weight_scale"].reshape(()) for w in weights]
        largest = max(scales)
        rescaled = [(shard.to(module.dtype) * scale) / largest for shard, scale in zip(shards, scales, strict=True)]
        module.weight.data.copy_(torch.cat(rescaled).to(torch.float8_e4m3fn))
        module.weight_scale.data.copy_(largest)
        module.input_scale.data.copy_(max(w["input_scale"].reshape(()) for w in weights))
        module.inv_input_scale.data.copy_(1 / module.input_scale)

    def apply(self, module, input, bias, *args, **kwargs):
        quantized = input
        if input.dtype != torch.float8_e4m3fn:
            quantized = (input.float() / module.input_scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        wide = torch.promote_types(module.dtype, torch.float32)
        product = functional.linear(quantized.to(wide), module.weight.to(wide)) * (
            module.input_scale * module.weight_scale
        )
        output = product.to(module.dtype)
        return output if bias is None else output + bias


def get_quant_method(quant_config):
    if quant_config is None or not quant_config.layer_quant_mode.has_any_quant():
        return UnquantizedLinearMethod()
    if quant_config.layer_quant_mode.has_fp8_qdq():
        return FP8QDQLinearMethod()
    raise ValueError(f"unsupported quant mode: {quant_config.quant_algo}")


class Linear(nn.Module):
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
    ):
        super().__init__()
        self.mapping = mapping or Mapping()
        self.tp_size, self.tp_rank, self.tp_mode = self.mapping.tp_size, self.mapping.tp_rank, tensor_parallel_mode
        self.in_features = in_features // (self.tp_size if self.tp_mode == TensorParallelMode.ROW else 1)
        self.out_features = out_features // (self.tp_size if self.tp_mode == TensorParallelMode.COLUMN else 1)
        self.has_bias, self.dtype, self.gather_output = bias, dtype, gather_output
        self.quant_config = quant_config
        self.weights_loading_config = weights_loading_config or WeightsLoadingConfig()
        self._weights_created = False
        if not skip_create_weights_in_init:
            self.create_weights()

    def create_weights(self):
        if self._weights_created:
            return
        self.quant_method = get_quant_method(self.quant_config)
        self.quant_method.create_weights(self, self.in_features, self.out_features, self.has_bias, self.dtype)
        self._weights_created = True

    def load_weights(self, weights):
        self.quant_method.load_weights(self, weights, self.weights_loading_config.weight_mode)

    def post_load_weights(self):
        self.quant_method.post_load_weights(self)

    def forward(self, input):
        if self.tp_mode == TensorParallelMode.ROW:
            output = self.quant_method.apply(self, input, None if self.tp_rank else self.bias)
            return output if self.tp_size == 1 else sum(self.mapping.group.exchange(self.tp_rank, output))
        output = self.quant_method.apply(self, input, self.bias)
        if self.gather_output and self.tp_size > 1:
            return torch.cat(self.mapping.group.exchange(self.tp_rank, output), -1)
        return output
