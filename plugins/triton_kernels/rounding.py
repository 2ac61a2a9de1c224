"""How every kernel here rounds what it puts out, as plugins' numerics do: int8, float8_e4m3fn, or as it is."""

from __future__ import annotations

import triton
import triton.language as tl

# Added to a float32 under 2^22 and taken off again, it rounds to an integer, ties to even.
INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2^23
FP8_MAX = tl.constexpr(448.0)


@triton.jit
def load_multiplier(pointer, columns, inside, MULTIPLIERS: tl.constexpr):
    """1 / input scale: none (0), one number (1), or one a column (2)."""
    if MULTIPLIERS == 0:
        return 1.0
    elif MULTIPLIERS == 1:
        return tl.load(pointer)
    else:
        return tl.load(pointer + columns, mask=inside, other=0.0)


@triton.jit
def round_to(y, multiplier, dtype: tl.constexpr, MULTIPLIERS: tl.constexpr):
    """y * multiplier in `dtype`, to nearest, ties to even, saturated; y itself without a multiplier."""
    if MULTIPLIERS == 0:
        return y.to(dtype)
    else:
        scaled = y.to(tl.float32) * multiplier
        if dtype == tl.int8:
            # Clamped first, which changes no result, so that no fused multiply-add can skip the product's rounding.
            clamped = tl.minimum(tl.maximum(scaled, -128.0), 127.0)
            return ((clamped + INTEGER) - INTEGER).to(tl.int8)
        else:
            clamped = tl.where(scaled > FP8_MAX, FP8_MAX, tl.where(scaled < -FP8_MAX, -FP8_MAX, scaled))  # keeps NaN
            return clamped.to(dtype)
