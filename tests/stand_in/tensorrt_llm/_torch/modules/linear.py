"""STAND-IN for 1.2: Linear hands post_load_weights to its method; only the unquantized one loads in parts.

Read in tensorrt_llm/_torch/modules/linear.py of HuiGao-NV/TensorRT-LLM 195839a73571888fc1236254c12fa6db7a815920.
"""

from abc import ABC, abstractmethod

import torch
from torch.nn import functional

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

__all__ = ["Linear", "TensorParallelMode", "WeightMode", "WeightsLoadingConfig"]


class LinearMethodBase(ABC):
    @abstractmethod
    def create_weights(self, module, in_features, out_features, bias, dtype): ...

    @abstractmethod
    def apply(self, module, input, bias, *args, **kwargs): ...

    def load_weights(self, module, weights, weight_mode, allow_partial_loading=False):
        partial = {"allow_partial_loading": allow_partial_loading} if isinstance(self, UnquantizedLinearMethod) else {}
        getattr(self, f"load_weights_{weight_mode.value}")(module, weights, **partial)

    def post_load_weights(self, module):
        return None


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(self, module, in_features, out_features, bias, dtype):
        create(module, (out_features, in_features), dtype, bias, dtype)

    def apply(self, module, input, bias):
        return functional.linear(input, module.weight, bias)

    def load_weights_vanilla(self, module, weights, allow_partial_loading=False):
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

    def load_weights(self, weights, allow_partial_loading=False):
        if not isinstance(self.quant_method, UnquantizedLinearMethod):
            assert allow_partial_loading is False
        mode = self.weights_loading_config.weight_mode
        self.quant_method.load_weights(self, weights, mode, allow_partial_loading=allow_partial_loading)

    def post_load_weights(self):
        self.quant_method.post_load_weights(self)
