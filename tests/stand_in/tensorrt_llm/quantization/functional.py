"""STAND-IN: rounding to 8 bits. `quantize` divides by the scale, `quantize_tensor` multiplies by it."""

import torch

from tensorrt_llm.functional import Tensor


def quantize(x, scale, dtype):
    value = x.trt_tensor.float() / scale.trt_tensor.float()
    if dtype == "fp8":
        return Tensor(value.clamp(-448, 448).to(torch.float8_e4m3fn))
    return Tensor(value.round().clamp(-128, 127).to(torch.int8))


def dequantize(x, scale, axis=-1):
    scale = scale.trt_tensor.float()
    return Tensor(x.trt_tensor.float() * (scale[:, None] if axis == 0 else scale))


def quantize_tensor(x, scale):
    value = x.trt_tensor.float() * scale.trt_tensor
    return Tensor(value.round().clamp(-128, 127).to(torch.int8))
