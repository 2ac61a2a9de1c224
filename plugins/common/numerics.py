"""The numerics of every linear layer in plain torch: the reference of each kernel, and the implementation on a CPU.

    int8   y = (q_MK @ w_NK^T) * input_scale * weight_scale_N
           q = clamp(round(x * pre_quant_scale / input_scale), -128, 127)
           with a scale per token in place of input_scale:
           largest of |x * pre_quant_scale| over the token / 127
    fp8    the same in float8_e4m3fn, saturating at 448, with one weight_scale for the whole tensor

Rounding is to nearest, ties to even. int8 products are summed exactly, in int32; fp8 products, which float32 holds
exactly, in float32. This is what ModelOpt writes and what its fake quantization computes: INT8 is SmoothQuant W8A8
(Xiao et al., arXiv 2211.10438), FP8 the E4M3 of Micikevicius et al., arXiv 2209.05433.

Legend: M tokens, N out_features, K in_features.
"""

from __future__ import annotations

import torch

FP8_MAX = 448.0  # largest e4m3 number
FP8_MIN_NORMAL = 2.0**-6
CUDA_INT_MM_ROWS = 32  # torch._int_mm on CUDA requires more than 16 rows


def quantize_int8(x: torch.Tensor, multiplier: torch.Tensor) -> torch.Tensor:
    """x * multiplier, rounded to int8. `multiplier` is 1 / scale, [] or [K]."""
    return (x * multiplier).round_().clamp_(-128, 127).to(torch.int8)


def quantize_int8_tokens(x_MK: torch.Tensor, smoothing_K: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """x * smoothing as int8 [M, K] by each token's own largest element, and the tokens' scales, float32 [M, 1]."""
    x_MK = x_MK.float() if smoothing_K is None else x_MK.float() * smoothing_K
    largest_M1 = x_MK.abs().amax(dim=-1, keepdim=True)
    multiplier_M1 = torch.where(largest_M1 > 0, 127 / largest_M1, 0)
    return quantize_int8(x_MK, multiplier_M1), largest_M1 / 127


def quantize_fp8(x: torch.Tensor, multiplier: torch.Tensor) -> torch.Tensor:
    """x * multiplier, rounded to float8_e4m3fn and saturated. `multiplier` is 1 / scale, [] or [K]."""
    return (x * multiplier).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def round_to_fp8(x: torch.Tensor, multiplier: torch.Tensor) -> torch.Tensor:
    """The numbers of quantize_fp8 (every zero as +0), held in float32.

    torch converts float8 on a CPU one element at a time; this takes vector instructions. Adding 1.5 * 2^(e + 20), where
    2^e is the power of two under |x|, pushes all but 3 bits of the mantissa out, and float32 addition rounds to the
    rest. Subnormal results share the e of the smallest normal.
    """
    x = (x * multiplier).float().clamp_(-FP8_MAX, FP8_MAX)
    magic = (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=FP8_MIN_NORMAL).mul_(1.5 * 2**20)
    return x.add_(magic).sub_(magic)


def fp8_values(stored: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn numbers as float32; NaN, which no rounding of ours makes, comes out as 480.

    In vector instructions, for the same reason: an e4m3 number's bits, shifted into place, are the float16 number that
    is 2^-8 times as large, subnormal ones included.
    """
    bits = stored.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    return bits.view(torch.float16).float().mul_(256)


def int8_linear(q_MK: torch.Tensor, w_NK: torch.Tensor, scale_N: torch.Tensor) -> torch.Tensor:
    """(q_MK @ w_NK^T) * scale_N: int8 operands, exact int32 sums, out [M, N] in the scale's dtype."""
    tokens = q_MK.shape[0]
    if q_MK.is_cuda and tokens < CUDA_INT_MM_ROWS:
        q_MK = torch.nn.functional.pad(q_MK, (0, 0, 0, CUDA_INT_MM_ROWS - tokens))
    return torch._int_mm(q_MK, w_NK.t())[:tokens] * scale_N


def fp8_linear(q_MK: torch.Tensor, w_NK: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(q_MK @ w_NK^T) * scale: float8_e4m3fn operands, out [M, N] in `dtype`; `scale` float32 []."""
    return torch._scaled_mm(q_MK, w_NK.t(), scale_a=scale, scale_b=torch.ones_like(scale), out_dtype=dtype)


def fp8_inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale by the float32 steps of ModelOpt's fake quantization, which goes through the range 448 * scale."""
    return FP8_MAX / (scale * FP8_MAX)
