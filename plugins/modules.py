"""The linear layers that the torch engine runs: 16-bit, INT8 W8A8 and FP8, from dense or packed 2:4 weights.

A layer is made by `build_linear` from the tensors stored under its name:

    weight [N, K] | weight_values [N, K/2] and weight_indices uint8 [N, ceil(K/8)] (plugins/pattern.py)
    weight_scale  [] or [N], input_scale [], pre_quant_scale [K]    8-bit layers only
    bias          [N]

The weight's dtype says the format. Numerics are those of plugins/reference.py.

Legend: M tokens, N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from plugins import reference
from plugins.errors import UserError
from plugins.packing import unpack

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

    format: str  # of the stored weight, one of FORMATS
    sparse: bool  # whether the stored weight is packed 2:4
    kernel: str  # what multiplies, in words
    out_features: int
    in_features: int

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format}{', 2:4' if self.sparse else ''}, {self.kernel}"


class DenseLinear(Linear):
    """A layer whose operands are floats of one dtype."""

    kernel = "floats (torch linear)"

    def __init__(self, w_NK: torch.Tensor, bias_N: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Buffer(w_NK.to(dtype))
        self.bias = None if bias_N is None else nn.Buffer(bias_N.to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class InputQuantizer:
    """Scales and rounds a layer's input. Layers that `share_input` round their common input once.

    Not an nn.Module, whose attributes cost microseconds: this runs in every layer of every step.
    """

    def __init__(
        self, multiplier: torch.Tensor, quantize: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> None:
        self.multiplier = multiplier  # pre_quant_scale / input_scale: [1] or [K]
        self.quantize = quantize
        self.users = 1
        self._due = 0  # users that have not taken the kept output yet; it is let go at 0
        self._input: torch.Tensor | None = None
        self._output: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.users == 1:
            return self.quantize(x, self.multiplier)
        output = self._output
        if output is None or x is not self._input:
            self._input, self._output, self._due = x, self.quantize(x, self.multiplier), self.users
            output = self._output
        self._due -= 1
        if self._due == 0:
            self._input = self._output = None
        return output


class QuantizedLinear(Linear):
    """A layer with 8-bit operands; `scale` [1] or [N] is input_scale * weight_scale."""

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
        self.bias = None if bias_N is None else nn.Buffer(bias_N.to(dtype))
        self.prepare(w_NK, scale, multiplier)

    quantizer: InputQuantizer

    def prepare(self, w_NK: torch.Tensor, scale: torch.Tensor, multiplier: torch.Tensor) -> None:
        """Sets the weight, the scale and the quantizer as the layer's product wants them."""
        raise NotImplementedError

    def product(self, q_MK: torch.Tensor) -> torch.Tensor:
        """[M, N] of the rounded inputs [M, K], without the bias, in the compute dtype or a wider one."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y_MN = self.product(self.quantizer(x).view(-1, x.shape[-1]))
        if self.bias is not None:
            y_MN = y_MN + self.bias
        return y_MN.to(self.dtype).view(*x.shape[:-1], -1)


class Int8Linear(QuantizedLinear):
    """W8A8: int8 activations with one static scale, int8 weights with one scale a row, exact int32 sums."""

    kernel = "int8 x int8 -> int32 (torch._int_mm)"

    def prepare(self, w_NK: torch.Tensor, scale: torch.Tensor, multiplier: torch.Tensor) -> None:
        self.quantizer = InputQuantizer(multiplier, reference.quantize_int8)
        self.weight = nn.Buffer(w_NK)
        self.scale = nn.Buffer(scale.to(torch.promote_types(self.dtype, torch.float32)))

    def product(self, q_MK: torch.Tensor) -> torch.Tensor:
        return reference.int8_linear(q_MK, self.weight, self.scale)


class Fp8Linear(QuantizedLinear):
    """E4M3 activations and weights, one static scale each, multiplied as float8 (CUDA, SM89 and later)."""

    kernel = "fp8 x fp8 (torch._scaled_mm)"

    def prepare(self, w_NK: torch.Tensor, scale: torch.Tensor, multiplier: torch.Tensor) -> None:
        self.quantizer = InputQuantizer(multiplier, reference.quantize_fp8)
        self.weight = nn.Buffer(w_NK)
        self.scale = nn.Buffer(scale.reshape(()))

    def product(self, q_MK: torch.Tensor) -> torch.Tensor:
        return reference.fp8_linear(q_MK, self.weight, self.scale, self.dtype)


class Fp8ValuesLinear(QuantizedLinear):
    """Fp8Linear where float8 has no fast product: on a CPU torch's takes 20 to 50 times as long as float32's.

    Inputs and weights are e4m3 numbers held as floats, which represent them exactly.
    """

    kernel = "fp8 values multiplied as floats (torch linear)"

    def prepare(self, w_NK: torch.Tensor, scale: torch.Tensor, multiplier: torch.Tensor) -> None:
        self.quantizer = InputQuantizer(multiplier, reference.round_to_fp8)
        self.weight = nn.Buffer(reference.dequantize(w_NK, scale, self.dtype))

    def product(self, q_MK: torch.Tensor) -> torch.Tensor:
        return F.linear(q_MK.to(self.dtype), self.weight)


def build_linear(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, device: torch.device) -> Linear:
    """The layer that `tensors` describe (see the module's docstring), computing in `dtype` on `device`.

    Raises UserError where a tensor is missing, or the weight's dtype is none of ours.
    """
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    sparse = "weight_values" in tensors
    stored = tensors["weight_values" if sparse else "weight"]
    if stored.dtype not in FORMATS:
        raise UserError(f"a weight of dtype {stored.dtype} is none of {', '.join(FORMATS.values())}: export it again")
    w_NK = unpack(stored, tensors["weight_indices"]) if sparse else stored
    layer: Linear
    if stored.dtype in (torch.int8, torch.float8_e4m3fn):
        layer = _quantized(w_NK, tensors, dtype)
    else:
        layer = DenseLinear(w_NK, tensors.get("bias"), dtype)
    layer.format, layer.sparse = FORMATS[stored.dtype], sparse
    layer.out_features, layer.in_features = w_NK.shape
    return layer


def _quantized(w_NK: torch.Tensor, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> QuantizedLinear:
    for name in ("weight_scale", "input_scale"):
        if name not in tensors:
            raise UserError(f"an {FORMATS[w_NK.dtype]} layer has no {name}: export it with static scales")
    input_scale = tensors["input_scale"].float().reshape(1)
    scale = tensors["weight_scale"].float().reshape(-1) * input_scale
    pre_quant_scale = tensors.get("pre_quant_scale")
    multiplier = 1 / input_scale if pre_quant_scale is None else pre_quant_scale.float() / input_scale
    kind: type[QuantizedLinear] = Int8Linear
    if w_NK.dtype == torch.float8_e4m3fn:
        kind = Fp8Linear if w_NK.is_cuda else Fp8ValuesLinear
    return kind(w_NK, scale, multiplier, tensors.get("bias"), dtype)


def remarks(layers: Iterable[Linear]) -> list[str]:
    """What a reader of measurements should know of how these layers run, in words."""
    layers = list(layers)
    on_cpu = any(layer.weight.device.type == "cpu" for layer in layers)
    words = []
    if on_cpu and any(layer.sparse for layer in layers):
        words.append("2:4 weights are unpacked when they are loaded: no CPU kernel gains from 2:4")
    if any(isinstance(layer, Fp8ValuesLinear) for layer in layers):
        words.append("fp8 numbers are multiplied as floats: torch's own float8 product is far slower on a CPU")
    return words


def share_input(layers: Sequence[Linear]) -> None:
    """Lets layers that are always called with one and the same tensor, and scale it alike, round it once."""
    quantized = [layer for layer in layers if isinstance(layer, QuantizedLinear)]
    for layer in quantized[1:]:
        first, own = quantized[0].quantizer, layer.quantizer
        if own.quantize is first.quantize and torch.equal(own.multiplier, first.multiplier):
            layer.quantizer = first
            first.users += 1
