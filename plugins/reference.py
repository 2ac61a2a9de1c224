"""The numerics of every linear layer in plain torch: what each kernel must reproduce, and what runs on a CPU.

    int8   y = (q_MK @ w_NK^T) * input_scale * weight_scale_N,  q = clamp(round(x * pre_quant_scale / input_scale), -128, 127)
    fp8    the same with float8_e4m3fn for int8, saturating at 448, and one weight_scale for the whole tensor

Rounding is to nearest, ties to even. int8 products are summed exactly in int32; fp8 products, which float32 holds exactly, in
float32. Scales are float32. This is what ModelOpt writes and what its fake quantization computes: INT8 is SmoothQuant W8A8
(Xiao et al., arXiv 2211.10438), FP8 the E4M3 of Micikevicius et al., arXiv 2209.05433.

Legend: M tokens, N out_features, K in_features.
"""

from __future__ import annotations

import torch

FP8_MAX = 448.0  # largest e4m3 number
FP8_MIN_NORMAL = 2.0**-6


def quantize_int8(x: torch.Tensor, multiplier: torch.Tensor) -> torch.Tensor:
    """x * multiplier, rounded to int8. `multiplier` is 1 / scale, [] or [K]."""
    return (x * multiplier).round_().clamp_(-128, 127).to(torch.int8)


def quantize_fp8(x: torch.Tensor, multiplier: torch.Tensor) -> torch.Tensor:
    """x * multiplier, rounded to float8_e4m3fn and saturated. `multiplier` is 1 / scale, [] or [K]."""
    return (x * multiplier).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def round_to_fp8(x: torch.Tensor) -> torch.Tensor:
    """x rounded to the nearest e4m3 number and saturated, float32 in and out.

    The same numbers as x.clamp(-448, 448).to(float8_e4m3fn).float() (every zero comes out as +0), in vector instructions:
    torch converts float8 one element at a time on a CPU. Adding 1.5 * 2^(e + 20), where 2^e is the power of two under |x|, pushes all but 3 bits of
    the mantissa out, and float32 addition rounds them as asked. Subnormal results share the e of the smallest normal.
    """
    x = x.clamp(-FP8_MAX, FP8_MAX)
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=FP8_MIN_NORMAL)
    magic = power.mul_(1.5 * 2**20)
    return x.add_(magic).sub_(magic)


def int8_linear(q_MK: torch.Tensor, w_NK: torch.Tensor, scale_N: torch.Tensor) -> torch.Tensor:
    """(q_MK @ w_NK^T) * scale_N: int8 operands, exact int32 sums, out float32 [M, N]."""
    return torch._int_mm(q_MK, w_NK.t()) * scale_N


def dequantize(w_NK: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An int8 or fp8 weight [N, K] as numbers; `weight_scale` is [] or [N]."""
    scale = weight_scale.float()
    return (w_NK.float() * (scale[:, None] if scale.ndim else scale)).to(dtype)
