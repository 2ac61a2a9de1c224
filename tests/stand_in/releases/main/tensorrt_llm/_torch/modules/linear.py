"""STAND-IN for main since June 2026: Linear calls its method's transform_weights once, and nobody calls the method's
post_load_weights.

Read in tensorrt_llm/_torch/modules/linear.py of brb-nv/TensorRT-LLM 046c5b6064e3baabbef974568f17bafdc7bd3315.
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

    def load_weights(self, module, weights, weight_mode, allow_partial_loading=False):
        partial = {"allow_partial_loading": allow_partial_loading} if isinstance(self, UnquantizedLinearMethod) else {}
        getattr(self, f"load_weights_{weight_mode.value}")(module, weights, **partial)
        if not allow_partial_loading:
            self.process_weights_after_loading(module)

    def process_weights_after_loading(self, module):
        return None

    supports_nccl_symmetric_memory_window_output = False

    def transform_weights(self, module):
        return None

    def post_load_weights(self, module):
        self.transform_weights(module)


class UnquantizedLinearMethod(LinearMethodBase):
    supports_nccl_symmetric_memory_window_output = True

    def create_weights(self, module, in_features, out_features, bias, dtype):
        create(module, (out_features, in_features), dtype, bias, dtype)

    def apply(self, module, input, bias):
        return functional.linear(input, module.weight, bias)

    def load_weights_vanilla(self, module, weights, allow_partial_loading=False):
        module.weight.data.copy_(torch.cat(shards(module, weights, "weight")))
        copy_bias(module, weights)

    load_weights_fused_qkv_linear = load_weights_fused_gate_up_linear = load_weights_vanilla


class FP8QDQLinearMethod(UnquantizedLinearMethod):
    def create_weights(self, module, in_features, out_features, bias, dtype):
        create(module, (out_features, in_features), torch.float8_e4m3fn, bias, dtype)
        create_scales(module)

    def apply(self, module, input, bias):
        return multiply_fp8(module, input, bias)

    def load_weights_vanilla(self, module, weights, allow_partial_loading=False):
        module.parts = weights
        copy_bias(module, weights)

    def process_weights_after_loading(self, module):  # the scales of fused parts are known only now
        fuse_fp8(module, module.__dict__.pop("parts"))

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
        self._weights_transformed = False
        mode = self.weights_loading_config.weight_mode
        self.quant_method.load_weights(self, weights, mode, allow_partial_loading=allow_partial_loading)

    def apply_before_allreduce(self, input, bias):
        output = self.apply_linear(input, bias)
        if self.tp_size > 1 and self.quant_method.supports_nccl_symmetric_memory_window_output:
            output.in_nccl_window = True  # what the all-reduce would then read without a copy
        return output

    def transform_weights(self):
        if not self._weights_transformed:
            self.quant_method.transform_weights(self)
            self._weights_transformed = True

    def cache_derived_state(self):
        self._weights_transformed = True

    def process_weights_after_loading(self):
        self.quant_method.process_weights_after_loading(self)

    def pre_reload_weights(self):
        self.quant_method.pre_reload_weights(self)

    def post_load_weights(self):
        self.transform_weights()
