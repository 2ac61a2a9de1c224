"""The linear layer on libtwofour_cpu: weights held packed, dense or sparse, in the form that the kernel reads.

    cpu-2of4, cpu-6of8, ...   the packed weight, of the bytes that plugins/common/patterns.py gives
    cpu-dense                 the dense weight

int8 weights are multiplied as int8. fp8 weights and inputs are held as bfloat16, which holds every e4m3 number, and
their products summed in float32, as a GPU does.

Legend: M tokens, N out_features, K in_features.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from ctypes import byref, pointer
from typing import Any

import torch
from torch import nn

from plugins.common import numerics
from plugins.common.patterns import cpu_kernel, short_name
from plugins.libtwofour import cpu, weight_memory
from plugins.linear.torch_linear import Linear, Scales
from plugins.sparsity.torch_packing import VALUES, Packed, unpack

DENSE = "cpu-dense"
TYPES = {torch.float32: 0, torch.bfloat16: 1}

Choices = Sequence[tuple[int, str]]


def can_take(dtype: torch.dtype, compute: torch.dtype) -> bool:
    """Whether a kernel multiplies weights of `dtype` where the rest computes in `compute`.

    fp8 in float32 stays with torch's operations, in whose order ModelOpt's fake quantization computes.
    """
    if compute == torch.bfloat16:
        return dtype in (torch.int8, torch.float8_e4m3fn, torch.bfloat16)
    return bool(compute == torch.float32 and dtype == torch.int8)


class CpuLinear(Linear):
    """x [..., K] float32 or bfloat16 -> y [..., N] of the same dtype, from a 16-bit, int8 or fp8 weight.

    `kept` is the dense weight [N, K], or a packed one.
    """

    def __init__(
        self,
        kept: torch.Tensor | Packed,
        scales: Scales | None,
        bias_N: torch.Tensor | None,
        dtype: torch.dtype,
        choices: Choices,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.out_features, self.in_features = kept.shape
        self._tokens, self._kernels = [tokens for tokens, _ in choices], [kernel for _, kernel in choices]
        self.kernel = " or ".join(dict.fromkeys(self._kernels))
        self._scales = nn.Buffer(scales.product) if scales is not None and scales.product.numel() > 1 else None
        self._bias = None if bias_N is None else nn.Buffer(bias_N.float())
        stored = kept.values.dtype if isinstance(kept, Packed) else kept.dtype
        multiplier, rounding = _rounding(stored, scales)
        self._multiplier = None if multiplier is None else nn.Buffer(multiplier)
        self._problems: dict[str, cpu.Linear] = {}
        self.weights: dict[str, torch.Tensor] = {}  # by kernel, packed
        for kernel in dict.fromkeys(self._kernels):
            form = "int8" if stored == torch.int8 else "bf16"
            if kernel == DENSE:
                weight = _packed(form, unpack(*kept) if isinstance(kept, Packed) else kept)
            else:
                assert isinstance(kept, Packed), "only a packed weight has a sparse kernel"
                form += f"-{short_name(kept.pattern)}"
                weight = _packed(form, kept)
            self.weights[kernel] = weight
            self.register_buffer(f"{kernel.replace('-', '_')}_weight", weight, persistent=False)
            self._problems[kernel] = cpu.Linear(
                form=cpu.FORMS.index(form),
                out_features=self.out_features,
                in_features=self.in_features,
                weight=weight.data_ptr(),
                scales=_address(self._scales),
                scale=1.0 if scales is None or self._scales is not None else float(scales.product),
                rounding=cpu.ROUNDINGS.index(rounding),
                multiplier=_address(self._multiplier),
                multipliers=0 if multiplier is None else multiplier.numel(),
                bias=_address(self._bias),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return apply(self.problem(x.numel() // self.in_features), x, self.out_features)

    def problem(self, tokens: int) -> cpu.Linear:
        """The layer as libtwofour_cpu takes it, with the kernel that multiplies `tokens` rows."""
        return self._problems[self._kernels[min(bisect_left(self._tokens, tokens), len(self._tokens) - 1)]]


def apply(problem: cpu.Linear, x: torch.Tensor, out_features: int) -> torch.Tensor:
    """y [..., out_features] of x [..., in_features], which the problem takes in its dtype."""
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], out_features)
    tokens = x.numel() // x.shape[-1]
    cpu.check(cpu.load().twofour_cpu_apply(byref(problem), tokens, TYPES[x.dtype], x.data_ptr(), y.data_ptr()))
    return y


def join_parts(first: cpu.Linear, rest: cpu.Linear, axis: str) -> cpu.Linear:
    """The problem of a layer in two parts along `axis`, "rows" or "inputs"; it keeps both alive."""
    joined = cpu.Linear.from_buffer_copy(first)
    joined.axis, joined.rest = cpu.AXES.index(axis), pointer(rest)
    return joined


class PackedEmbedding(nn.Module):
    """The embedding of a model whose output layer is the same weight: read from the output layer's packed form."""

    def __init__(self, head: CpuLinear) -> None:
        super().__init__()
        self.head = head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        ids = ids.contiguous()
        y = torch.empty(*ids.shape, self.head.in_features, dtype=torch.bfloat16)
        problem = byref(self.head.problem(1))
        cpu.check(cpu.load().twofour_cpu_rows(problem, ids.numel(), ids.data_ptr(), y.data_ptr()))
        return y


def choices_of(tactics: Mapping[str, Any] | None, pattern: str | None) -> Choices:
    """The choices of one layer's entry in tactics.json; without an entry, its own form at any number of tokens.

    `pattern` is that of the stored weight, None if it is dense.
    """
    if pattern is None:
        return ((1, DENSE),)
    buckets = [] if tactics is None else tactics["buckets"]
    sparse = cpu_kernel(pattern)
    names = {sparse: sparse, "dense-cpu": DENSE}
    known = sorted((int(b["tokens"]), names[b["kernel"]]) for b in buckets if b["kernel"] in names)
    return known or ((1, sparse),)


def build(
    tensors: Mapping[str, torch.Tensor], scales: Scales | None, dtype: torch.dtype, choices: Choices
) -> CpuLinear:
    """The layer that stored `tensors` describe (factory.py)."""
    kept = Packed.of(tensors) if VALUES in tensors else tensors["weight"]
    return CpuLinear(kept, scales, tensors.get("bias"), dtype, choices)


def _rounding(stored: torch.dtype, scales: Scales | None) -> tuple[torch.Tensor | None, str]:
    """What inputs are multiplied by before they are rounded, and to what."""
    if scales is None:
        return None, "as is"
    if scales.input is None:
        return None if scales.pre_quant is None else scales.pre_quant.contiguous(), "int8 each token"
    if stored == torch.int8:
        return scales.multiplier.contiguous(), "int8"
    inverse = numerics.fp8_inverse(scales.input)
    multiplier = inverse if scales.pre_quant is None else inverse * scales.pre_quant
    return multiplier.contiguous(), "fp8"


def _packed(form: str, kept: torch.Tensor | Packed) -> torch.Tensor:
    """A weight in one of the library's forms: uint8."""
    values, positions = (kept.values, kept.positions.contiguous()) if isinstance(kept, Packed) else (kept, None)
    if values.dtype == torch.float8_e4m3fn:  # every e4m3 number is a bfloat16
        values = numerics.fp8_values(values).to(torch.bfloat16)
    values, shape = values.contiguous(), (kept.shape[0], kept.shape[1])
    packed = weight_memory.allocate(cpu.weight_bytes(form, *shape))
    cpu.pack(form, shape, values.data_ptr(), _address(positions) or 0, packed.data_ptr())
    return packed


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
