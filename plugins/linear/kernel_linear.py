"""The linear layer on our own kernels (libtwofour/torch_ops.py): which one multiplies depends on the number of tokens.

On CUDA that is libtwofour. The operators' CPU forms compute the same numbers, so that tests of this layer need no GPU.

Legend: M tokens, N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from plugins.common import numerics
from plugins.common.defaults import MAX_SKINNY_TOKENS
from plugins.common.patterns import PATTERNS, TENSOR_CORE, skinny_kernel
from plugins.libtwofour import torch_ops
from plugins.linear.torch_linear import InputQuantizer, Linear, Scales

Choices = Sequence[tuple[int, str]]
"""(tokens, kernel) in ascending order: the kernel for up to so many tokens, the last also for more."""

LIMIT = MAX_SKINNY_TOKENS
SKINNY_THEN_CUSPARSELT: Choices = ((LIMIT, "skinny"), (LIMIT + 1, "cusparselt"))
SKINNY = {skinny_kernel(pattern): pattern for pattern in PATTERNS}
DENSE: Choices = ((1, "cublaslt"),)


def choices_of(tactics: Mapping[str, Any] | None, pattern: str | None) -> Choices:
    """The choices of one layer's entry in tactics.json; without an entry, or in a dense layer, the usual ones.

    `pattern` is that of the layer's packed weight, None in a dense layer.
    """
    if pattern is None:
        return DENSE
    usual = _runnable(((LIMIT, skinny_kernel(pattern)),))
    if tactics is None:
        return usual
    named = [(int(bucket["tokens"]), str(bucket["kernel"]).removeprefix("dense-")) for bucket in tactics["buckets"]]
    known = sorted((tokens, kernel) for tokens, kernel in named if kernel in torch_ops.OPERATORS)
    return known or usual


class Dense(NamedTuple):
    """How a layer multiplies by its dense weight: by "cublaslt" or "torch", with its tokens padded to so many.

    cuBLASLt is often faster in FP8 with 16 or 32 tokens than with fewer (vllm-project/vllm#4691).
    """

    product: str = "cublaslt"
    least_tokens: int = 1


class KernelLinear(Linear):
    """x [..., K] float16 or bfloat16 -> y [..., N] of the same dtype, from a 16-bit, int8 or fp8 weight."""

    dense = Dense()

    def __init__(
        self,
        w_NK: torch.Tensor,
        scales: Scales | None,
        bias_N: torch.Tensor | None,
        dtype: torch.dtype,
        choices: Choices,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.bias = None if bias_N is None else nn.Buffer(bias_N.to(dtype))
        per_channel = scales is not None and scales.product.numel() > 1
        self.scale = 1.0 if scales is None or per_channel else float(scales.product)
        self.channel_scales = nn.Buffer(scales.product) if scales is not None and per_channel else None
        self._factor = None if scales is None else scales.product
        self._one = None if scales is None else torch.ones_like(scales.product[0])
        self.operand = None if scales is None else w_NK.dtype
        self.quantizer = None if scales is None else InputQuantizer(scales.multiplier, _quantize_to(w_NK.dtype))
        self.out_features, self.in_features = w_NK.shape
        runnable = _runnable(choices)
        self._tokens, self._kernels = [tokens for tokens, _ in runnable], [kernel for _, kernel in runnable]
        self.kernel = " or ".join(dict.fromkeys(self._kernels))
        w_NK = w_NK.to(dtype) if scales is None else w_NK
        self.weights = {kernel: torch_ops.prepare(w_NK, kernel) for kernel in dict.fromkeys(self._kernels)}
        for kernel, weight in self.weights.items():  # so that the model's bytes count them
            self.register_buffer(f"{kernel}_weight", weight, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x if self.quantizer is None else self.quantizer(x)
        return self.multiply(q.view(-1, x.shape[-1])).view(*x.shape[:-1], -1)

    def multiply(self, q_MK: torch.Tensor) -> torch.Tensor:
        tokens = q_MK.shape[0]
        kernel = self.kernel_for(tokens)
        if kernel == "cublaslt" and tokens < self.dense.least_tokens:
            q_MK = _lengthen(q_MK, self.dense.least_tokens)
        if kernel == "cublaslt" and self.dense.product == "torch":
            return self._multiply_by_torch(q_MK)[:tokens]
        y_MN = torch_ops.OPERATORS[kernel](
            q_MK, self.weights[kernel], self.scale, self.channel_scales, self.bias, self.out_features, self.dtype
        )
        return y_MN[:tokens]

    def write(self, y_MN: torch.Tensor, x_MK: torch.Tensor, add: bool = False) -> None:
        kernel = self.kernel_for(x_MK.shape[0])
        dense = kernel == "cublaslt"
        if (add and not dense) or (dense and self.dense != Dense()):  # those of `dense` put out a y of their own
            super().write(y_MN, x_MK, add)
            return
        torch_ops.linear_into(y_MN, x_MK, self.weights[kernel], kernel, self.scale, self.channel_scales, self.bias, add)

    def _multiply_by_torch(self, q_MK: torch.Tensor) -> torch.Tensor:
        w_NK, factor = self.weights["cublaslt"], self._factor
        if factor is None:
            return F.linear(q_MK, w_NK, self.bias)
        if w_NK.dtype == torch.int8:
            y_MN = numerics.int8_linear(q_MK, w_NK, factor)
        elif factor.numel() == 1:
            y_MN = torch._scaled_mm(q_MK, w_NK.t(), factor[0], self._one, out_dtype=self.dtype)
        else:
            y_MN = torch._scaled_mm(q_MK, w_NK.t(), self._one, self._one, out_dtype=torch.float32) * factor
        return (y_MN if self.bias is None else y_MN + self.bias).to(self.dtype)

    def kernel_for(self, tokens: int) -> str:
        """The kernel that multiplies `tokens` rows."""
        for most, kernel in zip(self._tokens, self._kernels, strict=True):  # no bisect: torch.compile traces this
            if tokens <= most:
                return kernel
        return self._kernels[-1]


def _lengthen(x_MK: torch.Tensor, tokens: int) -> torch.Tensor:
    """x with rows of whatever memory holds after its own: a row of a product depends on its own row alone."""
    longer = x_MK.new_empty(tokens, x_MK.shape[1])
    longer[: x_MK.shape[0]] = x_MK
    return longer


def _runnable(choices: Choices) -> Choices:
    """The choices, with a kernel for many tokens above the number that a skinny kernel takes.

    That is cuSPARSELt for 2:4, and for n:8, which has no such kernel, cuBLASLt on a dense copy of the weight.
    """
    chosen = [(tokens, _for_many(kernel) if tokens > LIMIT else kernel) for tokens, kernel in choices]
    if chosen[-1][1] in SKINNY:
        chosen.append((LIMIT + 1, _for_many(chosen[-1][1])))
    return tuple(chosen)


def _for_many(kernel: str) -> str:
    pattern = SKINNY.get(kernel)
    return kernel if pattern is None else "cusparselt" if pattern == TENSOR_CORE else "cublaslt"


@cache  # one function a dtype: layers that share an input are known by it
def _quantize_to(dtype: torch.dtype) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def quantize(x: torch.Tensor, multiplier: torch.Tensor) -> torch.Tensor:
        quantized: torch.Tensor = torch_ops.quantize(x, multiplier, dtype)
        return quantized

    return quantize
