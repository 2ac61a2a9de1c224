"""STAND-IN: quantized linear layers. All go through quantize, dequantize and a product, as TensorRT sees them."""

import tensorrt as trt

from tensorrt_llm.functional import Tensor, matmul, mul
from tensorrt_llm.layers import ColumnLinear, RowLinear
from tensorrt_llm.module import Parameter
from tensorrt_llm.quantization.functional import dequantize, quantize


class _FP8:
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight = Parameter((self.out_features, self.in_features), trt.fp8)
        self.activation_scaling_factor = Parameter((1,), trt.float32)
        self.weights_scaling_factor = Parameter((1,), trt.float32)

    def forward(self, x, lora_runtime_params=None, **collective):
        rounded = quantize(x, self.activation_scaling_factor.value, "fp8")
        a = dequantize(rounded, self.activation_scaling_factor.value)
        y = matmul(a, dequantize(self.weight.value, self.weights_scaling_factor.value), transb=True)
        return self.collect_and_bias(Tensor(y.trt_tensor.to(x.trt_tensor.dtype)), **collective)


class _Int8:
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight = Parameter((self.out_features, self.in_features), trt.int8)
        self.activation_scaling_factor = Parameter((1,), trt.float32)
        self.weights_scaling_factor = Parameter((self.out_features,), trt.float32)
        self.prequant_scaling_factor = Parameter((self.in_features,), trt.bfloat16)

    def forward(self, x, lora_runtime_params=None, **collective):
        smoothed = mul(x, self.prequant_scaling_factor.value)
        a = dequantize(
            quantize(smoothed, self.activation_scaling_factor.value, "int8"), self.activation_scaling_factor.value
        )
        y = matmul(a, dequantize(self.weight.value, self.weights_scaling_factor.value, axis=0), transb=True)
        return self.collect_and_bias(Tensor(y.trt_tensor.to(x.trt_tensor.dtype)), **collective)


COLUMN = ["in_features", "out_features", "bias", "dtype", "tp_group", "tp_size", "gather_output"]


class FP8Linear(_FP8, ColumnLinear):
    def __init__(self, in_features, out_features, bias=True, dtype=None, tp_group=None, tp_size=1, gather_output=True):
        super().__init__(in_features, out_features, bias, dtype, tp_group, tp_size, gather_output)


class FP8RowLinear(_FP8, RowLinear):
    def __init__(self, in_features, out_features, bias=True, dtype=None, tp_group=None, tp_size=1):
        super().__init__(in_features, out_features, bias, dtype, tp_group, tp_size)


class Int8SmoothQuantLinear(_Int8, ColumnLinear):
    def __init__(self, in_features, out_features, bias=True, dtype=None, tp_group=None, tp_size=1, gather_output=True):
        super().__init__(in_features, out_features, bias, dtype, tp_group, tp_size, gather_output)


class Int8SmoothQuantRowLinear(_Int8, RowLinear):
    def __init__(self, in_features, out_features, bias=True, dtype=None, tp_group=None, tp_size=1):
        super().__init__(in_features, out_features, bias, dtype, tp_group, tp_size)
