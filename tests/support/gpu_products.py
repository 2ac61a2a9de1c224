"""Products of libtwofour on a GPU, against float64; integers against exact arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import torch

from plugins.autotune import timing
from plugins.common.errors import UserError
from plugins.common.patterns import PATTERNS, TENSOR_CORE, skinny_kernel
from plugins.libtwofour import torch_ops

DEVICE = torch.device("cuda", 0)
DTYPES = (torch.float8_e4m3fn, torch.int8, torch.bfloat16, torch.float16)
OPERATORS: dict[str, Callable[..., torch.Tensor]] = dict(torch_ops.OPERATORS)
PATTERN_OF = {skinny_kernel(pattern): pattern for pattern in PATTERNS}


def weight_for(kernel: str, n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """A random weight [n, k] in the kernel's pattern, every group full."""
    return timing.random_sparse(n, k, dtype, DEVICE, pattern=PATTERN_OF.get(kernel, TENSOR_CORE))


def out_of(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.bfloat16


def refused(call: Callable[[], object]) -> str:
    try:
        call()
    except UserError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def check(kernel: str, dtype: torch.dtype, n: int, k: int, tokens: int, scaled: bool, biased: bool) -> None:
    """One product against float64; integers against exact arithmetic."""
    what = (kernel, dtype, n, k, tokens, scaled, biased)
    w, x = weight_for(kernel, n, k, dtype), timing.random_operand(tokens, k, dtype, DEVICE)
    out, eight_bit = out_of(dtype), dtype in (torch.int8, torch.float8_e4m3fn)
    scale = 2.0**-9 if eight_bit else 1.0
    scales = torch.rand(n, device=DEVICE) * scale if scaled and eight_bit else None
    bias = torch.randn(n, device=DEVICE).to(out) if biased else None
    y = OPERATORS[kernel](x, torch_ops.prepare(w, kernel), scale, scales, bias, n, out)
    factor = torch.tensor(scale, device=DEVICE) if scales is None else scales
    exact = x.double() @ w.double().T * factor.double()
    if bias is not None:
        exact = exact + bias.double()
    if dtype == torch.int8 and (kernel != "cusparselt" or biased):  # our own epilogue: bit for bit
        sums = (x.double() @ w.double().T).float()  # exact: below 2^53, and float rounds once as the kernel does
        expected = sums * factor if bias is None else sums * factor + bias.float()
        assert torch.equal(y, expected.to(out)), what
        return
    epsilon = 2.0 ** (-10 if out == torch.float16 else -7)
    size = x.double().abs() @ w.double().abs().T * factor.double()
    sums = 2.0**-10 if dtype == torch.float8_e4m3fn else 2.0**-17  # Hopper's own fp8 products keep about 14 bits
    assert bool(((y.double() - exact).abs() <= epsilon * exact.abs() + sums * size + 1e-4).all()), what
