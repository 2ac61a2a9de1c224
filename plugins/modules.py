"""The linear layers that the torch engine runs: 16-bit, INT8 W8A8 and FP8, from dense or packed 2:4 weights.

A layer is made by `build_linear` from the tensors stored under its name:

    weight [N, K] | weight_values [N, K/2] and weight_indices uint8 [N, ceil(K/8)] (plugins/pattern.py)
    weight_scale  [] or [N], input_scale [], pre_quant_scale [K]    float, 8-bit layers only
    bias          [N]

The weight's dtype says the format. Numerics are those of plugins/reference.py.

Legend: M tokens, N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from plugins import pattern, reference
from plugins.errors import UserError

FORMATS = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int8: "int8",
    torch.float8_e4m3fn: "fp8",
}


class Linear(nn.Module):
    """What all layers tell: x [..., K] -> y [..., N] in the compute dtype."""

    format: str  # of the stored weight: "bf16", "fp16", "fp32", "int8" or "fp8"
    sparse: bool  # whether the stored weight is packed 2:4
    kernel: str  # what multiplies, in words
    out_features: int
    in_features: int

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format}{', 2:4' if self.sparse else ''}, {self.kernel}"


class DenseLinear(Linear):
    """A layer whose operands are floats of one dtype."""

    kernel = "dense"

    def __init__(self, w_NK: torch.Tensor, bias_N: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(w_NK.to(dtype), requires_grad=False)
        self.bias = None if bias_N is None else nn.Parameter(bias_N.to(dtype), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class Int8Linear(Linear):
    """W8A8: int8 activations with one static scale, int8 weights with one scale a row, exact int32 sums."""

    kernel = "int8 x int8 -> int32 (torch._int_mm)"

    def __init__(
        self,
        w_NK: torch.Tensor,
        scale_N: torch.Tensor,
        multiplier: torch.Tensor,
        bias_N: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        wide = torch.promote_types(dtype, torch.float32)
        self.dtype = dtype
        self.quantizer = InputQuantizer(multiplier.to(wide), reference.quantize_int8)
        self.weight = nn.Buffer(w_NK)
        self.scale = nn.Buffer(scale_N.to(wide).expand(w_NK.shape[0]).contiguous())
        self.bias = None if bias_N is None else nn.Buffer(bias_N.to(wide))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q_MK = self.quantizer(x).view(-1, x.shape[-1])
        y_MN = reference.int8_linear(q_MK, self.weight, self.scale)
        if self.bias is not None:
            y_MN += self.bias
        return y_MN.to(self.dtype).view(*x.shape[:-1], -1)


class Fp8Linear(Linear):
    """E4M3 activations and weights, one static scale each, multiplied as float8 (CUDA)."""

    kernel = "fp8 x fp8 (torch._scaled_mm)"

    def __init__(
        self,
        w_NK: torch.Tensor,
        scale: torch.Tensor,
        multiplier: torch.Tensor,
        bias_N: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.quantizer = InputQuantizer(multiplier, reference.quantize_fp8)
        self.weight = nn.Buffer(w_NK)
        self.scale = nn.Buffer(scale.reshape(()))
        self.bias = None if bias_N is None else nn.Buffer(bias_N.to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q_MK = self.quantizer(x).view(-1, x.shape[-1])
        y_MN = reference.fp8_linear(q_MK, self.weight, self.scale, self.dtype)
        if self.bias is not None:
            y_MN += self.bias
        return y_MN.view(*x.shape[:-1], -1)


class Fp8ValuesLinear(Linear):
    """Fp8Linear where float8 has no fast product: a CPU, where torch's is 20 to 50 times slower than float32.

    Inputs are rounded to e4m3 numbers and the weights are e4m3 numbers, both held as floats that represent them exactly.
    """

    kernel = "fp8 values, products and sums in float32"

    def __init__(
        self,
        w_NK: torch.Tensor,
        scale: torch.Tensor,
        multiplier: torch.Tensor,
        bias_N: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.quantizer = InputQuantizer(multiplier, reference.round_to_fp8)
        self.weight = nn.Buffer(reference.dequantize(w_NK, scale, dtype))
        self.bias = None if bias_N is None else nn.Buffer(bias_N.to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.quantizer(x).to(self.weight.dtype), self.weight, self.bias)


class InputQuantizer(nn.Module):
    """Scales and rounds a layer's input. Layers that were `share_input`-ed round their common input once."""

    def __init__(
        self, multiplier: torch.Tensor, quantize: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        self.multiplier = nn.Buffer(multiplier)  # pre_quant_scale / input_scale: [1] or [K]
        self.quantize = quantize
        self.users = 1
        self._due = 0  # users that have not taken the kept output yet: at 0 it is let go
        self._input: torch.Tensor | None = None
        self._output: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x is self._input and self._output is not None:
            output = self._output
        else:
            output = self.quantize(x, self.multiplier)
            self._input, self._output, self._due = x, output, self.users
        self._due -= 1
        if self._due == 0:
            self._input = self._output = None
        return output


def share_input(layers: Sequence[nn.Module]) -> None:
    """Lets layers that are always called with one and the same tensor, and scale it alike, round it once."""
    first: InputQuantizer | None = None
    for layer in layers:
        quantizer = getattr(layer, "quantizer", None)
        if quantizer is None:
            continue
        if first is None:
            first = quantizer
        elif quantizer.quantize is first.quantize and torch.equal(quantizer.multiplier, first.multiplier):
            layer.quantizer = first
            first.users += 1


def build_linear(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, device: torch.device) -> Linear:
    """The layer that `tensors` describe (see the module's docstring), computing in `dtype` on `device`.

    Raises UserError where a tensor is missing, or the weight's dtype is none of ours.
    """
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    sparse = "weight_values" in tensors
    stored = tensors["weight_values" if sparse else "weight"]
    if stored.dtype not in FORMATS:
        raise UserError(
            f"a weight of dtype {stored.dtype} is none of {', '.join(FORMATS.values())}: build the engine again"
        )
    w_NK = unpack(stored, tensors["weight_indices"]) if sparse else stored
    bias_N = tensors.get("bias")
    layer: Linear
    if stored.dtype in (torch.int8, torch.float8_e4m3fn):
        for name in ("weight_scale", "input_scale"):
            if name not in tensors:
                raise UserError(f"an {FORMATS[stored.dtype]} layer has no {name}: export it with static scales")
        scale = tensors["weight_scale"].float().reshape(-1) * tensors["input_scale"].float().reshape(1)
        multiplier = (
            tensors.get("pre_quant_scale", torch.ones(1, device=device)).float() / tensors["input_scale"].float()
        )
        kind = Int8Linear if stored.dtype == torch.int8 else Fp8Linear if device.type == "cuda" else Fp8ValuesLinear
        layer = kind(w_NK, scale, multiplier.reshape(-1), bias_N, dtype)
    else:
        layer = DenseLinear(w_NK, bias_N, dtype)
    layer.format, layer.sparse = FORMATS[stored.dtype], sparse
    layer.out_features, layer.in_features = w_NK.shape
    return layer


def unpack(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The dense weight [N, K] of a packed one, as plugins.pattern.unpack."""
    return from_numpy(pattern.unpack(to_numpy(values), to_numpy(indices)), values.dtype).to(values.device)


def pack(w_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values [N, K/2], indices uint8 [N, ceil(K/8)]) of a 2:4 weight, as plugins.pattern.pack. Raises UserError."""
    values, indices = pattern.pack(to_numpy(w_NK))
    return from_numpy(values, w_NK.dtype), torch.from_numpy(indices)


def to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A tensor's memory as an array. numpy lacks bfloat16 and float8: they come as void types of the same width."""
    tensor = tensor.detach().cpu().contiguous()
    width = tensor.element_size()
    if tensor.dtype in (torch.bfloat16, torch.float8_e4m3fn):
        return tensor.view(_INTEGERS[width]).numpy().view(f"V{width}")
    array: np.ndarray[Any, Any] = tensor.numpy()
    return array


def from_numpy(array: np.ndarray[Any, Any], dtype: torch.dtype) -> torch.Tensor:
    """The tensor of `dtype` over an array's memory: the inverse of `to_numpy`."""
    return torch.from_numpy(array.view(f"i{array.itemsize}")).view(dtype)


_INTEGERS = {1: torch.int8, 2: torch.int16}
