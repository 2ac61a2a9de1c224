"""STAND-IN for 1.0: nothing is called after loading, neither on Linear nor on its method.

Read in tensorrt_llm/_torch/modules/linear.py of NVShreyas/TensorRT-LLM 29665dddb1c6f40be5e8e3a0a8f2e2d4d838110a, and as
late as 1.1.0rc6 in that of Ataraksia/TensorRT-LLM a451bf93888ef588251268516ac6cd4be0a124c5.
"""

from abc import ABC, abstractmethod

import torch
from tensorrt_llm._torch.modules.shared import (
    LinearModule,
    TensorParallelMode,
    WeightMode,
    WeightsLoadingConfig,
    copy_bias,
    create,
    create_scales,
    fuse_fp8,
    multiply_fp8,
    shards,
)
from torch.nn import functional

__all__ = ["Linear", "TensorParallelMode", "WeightMode", "WeightsLoadingConfig"]


class LinearMethodBase(ABC):
    @abstractmethod
    def create_weights(self, module, in_features, out_features, bias, dtype): ...

    @abstractmethod
    def apply(self, module, input, bias, *args, **kwargs): ...

    def load_weights(self, module, weights, weight_mode):
        getattr(self, f"load_weights_{weight_mode.value}")(module, weights)


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(self, module, in_features, out_features, bias, dtype):
        create(module, (out_features, in_features), dtype, bias, dtype)

    def apply(self, module, input, bias):
        return functional.linear(input, module.weight, bias)

    def load_weights_vanilla(self, module, weights):
        module.weight.data.copy_(torch.cat(shards(module, weights, "weight")))
        copy_bias(module, weights)

    load_weights_fused_qkv_linear = load_weights_fused_gate_up_linear = load_weights_vanilla


class FP8QDQLinearMethod(LinearMethodBase):
    def create_weights(self, module, in_features, out_features, bias, dtype):
        create(module, (out_features, in_features), torch.float8_e4m3fn, bias, dtype)
        create_scales(module)

    def apply(self, module, input, bias):
        return multiply_fp8(module, input, bias)

    def load_weights_vanilla(self, module, weights):
        fuse_fp8(module, weights)
        copy_bias(module, weights)

    load_weights_fused_qkv_linear = load_weights_fused_gate_up_linear = load_weights_vanilla


def get_quant_method(quant_config=None):
    if quant_config is None or not quant_config.layer_quant_mode.has_any_quant():
        return UnquantizedLinearMethod()
    if quant_config.layer_quant_mode.has_fp8_qdq():
        return FP8QDQLinearMethod()
    raise ValueError(f"unsupported quant mode: {quant_config.quant_algo}")


class Linear(LinearModule):
    def get_quant_method(self, quant_config=None):
        return get_quant_method(quant_config)

    def load_weights(self, weights):
        self.quant_method.load_weights(self, weights, self.weights_loading_config.weight_mode)
