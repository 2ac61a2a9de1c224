"""STAND-IN for spring 2026: the FP8 method extends the unquantized one and rescales after loading; before an
all-reduce, Linear looks for a method that writes into a buffer of NCCL's.

Read in tensorrt_llm/_torch/modules/linear.py of JacobHu-NV/TensorRT-LLM 68acb5c0f767bfdd85f2564c5e1dd5882b250b48; its
window methods in a later text of spring 2026 (NVIDIA's pull requests between 1.3.0rc3 and #15288).
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
        mode = self.weights_loading_config.weight_mode
        self.quant_method.load_weights(self, weights, mode, allow_partial_loading=allow_partial_loading)

    def apply_before_allreduce(self, input, bias):
        if self.tp_size > 1 and hasattr(self.quant_method, "apply_window_output"):
            return self.quant_method.apply_window_output(self, input, bias)
        if self.tp_size > 1 and hasattr(self.quant_method, "apply_out"):
            out = torch.empty(*input.shape[:-1], self.out_features, dtype=self.dtype)
            return self.quant_method.apply_out(self, input, bias, out)
        return self.apply_linear(input, bias)

    def process_weights_after_loading(self):
        self.quant_method.process_weights_after_loading(self)

    def pre_reload_weights(self):
        self.quant_method.pre_reload_weights(self)

    def post_load_weights(self):
        self.quant_method.post_load_weights(self)
