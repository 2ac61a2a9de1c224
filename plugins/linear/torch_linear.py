"""Linear layers on torch's own products: 16-bit, INT8 W8A8 and FP8. Numerics are those of plugins/common/numerics.py.

Legend: M tokens, N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from plugins.common import numerics


class Linear(nn.Module):
    """What all layers have in common: x [..., K] -> y [..., N] in the compute dtype."""

    format: str  # of the stored weight, one of FORMATS
    pattern: str | None = None  # of the stored weight where it is packed, as "2:4"
    kernel: str  # what multiplies, as reports name it
    dtype: torch.dtype  # of y
    out_features: int
    in_features: int
    sparse_rows: tuple[int, ...] = ()  # of each of the layers that this one joins: y has these first, then the others
    quantizer: InputQuantizer | None = None
    refused: str | None = None  # why our kernels did not take the layer, where they were asked to
    operand: torch.dtype | None = None  # 8-bit dtype of what `multiply` takes; None: the layer rounds its input itself

    @property
    def sparse(self) -> bool:
        """Whether the stored weight is packed."""
        return self.pattern is not None

    def multiply(self, q_MK: torch.Tensor) -> torch.Tensor:
        """y [M, N] of an input that was multiplied by `quantizer.multiplier` and rounded to `operand` already."""
        raise NotImplementedError

    def write(self, y_MN: torch.Tensor, x_MK: torch.Tensor, add: bool = False) -> None:
        """y [M, N] = or += the product of x [M, K], rounded already where there is an `operand`. Both may be slices."""
        product_MN = self(x_MK) if self.operand is None else self.multiply(x_MK.contiguous())
        if add:
            y_MN.add_(product_MN)
        else:
            y_MN.copy_(product_MN)

    def extra_repr(self) -> str:
        kind = f"{self.format}, {self.pattern}" if self.sparse else self.format
        return f"{self.in_features}, {self.out_features}, {kind}, {self.kernel}"


class DenseLinear(Linear):
    """A layer whose operands are floats of one dtype."""

    kernel = "floats (torch linear)"

    def __init__(self, w_NK: torch.Tensor, bias_N: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight = nn.Buffer(w_NK.to(dtype))
        self.bias = None if bias_N is None else nn.Buffer(bias_N.to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def write(self, y_MN: torch.Tensor, x_MK: torch.Tensor, add: bool = False) -> None:
        w_KN = self.weight.t()
        if add and self.bias is None:
            y_MN.addmm_(x_MK, w_KN)
        elif add:
            super().write(y_MN, x_MK, add)
        elif self.bias is None:
            torch.mm(x_MK, w_KN, out=y_MN)
        else:
            torch.addmm(self.bias, x_MK, w_KN, out=y_MN)


@dataclass(frozen=True)
class Scales:
    """Of an 8-bit layer, float32: weight [1] or [N], input [1], and SmoothQuant's factor on the input, [K] or None.

    An `input` of None: each token has its own.
    """

    weight: torch.Tensor
    input: torch.Tensor | None
    pre_quant: torch.Tensor | None = None

    @property
    def product(self) -> torch.Tensor:
        """What a sum of 8-bit products is multiplied by, beside a token's own scale: [1] or [N]."""
        return self.weight if self.input is None else self.weight * self.input

    @property
    def multiplier(self) -> torch.Tensor:
        """What an input is multiplied by before it is rounded by a static scale: [1] or [K]."""
        assert self.input is not None
        inverse = 1 / self.input
        return inverse if self.pre_quant is None else inverse * self.pre_quant


class InputQuantizer:
    """Scales and rounds a layer's input. Layers that `share_input` round their common input once.

    Not an nn.Module, whose attributes cost microseconds: this runs in every layer of every step.
    """

    def __init__(
        self,
        multiplier: torch.Tensor,
        quantize: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        scale: torch.Tensor | None = None,
    ) -> None:
        self.multiplier, self.quantize = multiplier, quantize  # multiplier: [1] or [K]
        self.scale = scale  # [1]: takes the rounded numbers back to the input's range; None leaves them
        self.users = 1
        self._due = 0  # users that have not taken the kept output yet; it is let go at 0
        self._input: torch.Tensor | None = None
        self._output: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.users == 1:
            return self._round(x)
        output = self._output
        if output is None or x is not self._input:
            self._input, self._output, self._due = x, self._round(x), self.users
            output = self._output
        self._due -= 1
        if self._due == 0:
            self._input = self._output = None
        return output

    def _round(self, x: torch.Tensor) -> torch.Tensor:
        q = self.quantize(x, self.multiplier)
        return q if self.scale is None else q.mul_(self.scale)

    def rounds_like(self, other: InputQuantizer) -> bool:
        """Whether both make the same of any input."""
        return other.quantize is self.quantize and torch.equal(other.multiplier, self.multiplier)


class QuantizedLinear(Linear):
    """A layer with 8-bit operands."""

    quantizer: InputQuantizer

    def __init__(self, w_NK: torch.Tensor, scales: Scales, bias_N: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.bias = None if bias_N is None else nn.Buffer(bias_N.to(dtype))
        self.prepare(w_NK, scales)

    def prepare(self, w_NK: torch.Tensor, scales: Scales) -> None:
        """Sets the weight, the scale and the quantizer as the layer's product wants them."""
        raise NotImplementedError

    def product(self, q_MK: torch.Tensor) -> torch.Tensor:
        """[M, N] of the rounded inputs [M, K], without the bias, in the compute dtype or a wider one."""
        raise NotImplementedError

    def multiply(self, q_MK: torch.Tensor) -> torch.Tensor:
        y_MN = self.product(q_MK)
        if self.bias is not None:
            y_MN = y_MN + self.bias
        return y_MN.to(self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiply(self.quantizer(x).view(-1, x.shape[-1])).view(*x.shape[:-1], -1)


class Int8Linear(QuantizedLinear):
    """W8A8: int8 activations with one static scale, int8 weights with one scale a row, exact int32 sums."""

    kernel = "int8 x int8 -> int32 (torch._int_mm)"
    operand = torch.int8

    def prepare(self, w_NK: torch.Tensor, scales: Scales) -> None:
        self.quantizer = InputQuantizer(scales.multiplier, numerics.quantize_int8)
        self.weight = nn.Buffer(w_NK)
        self.scale = nn.Buffer(scales.product.to(torch.promote_types(self.dtype, torch.float32)))

    def product(self, q_MK: torch.Tensor) -> torch.Tensor:
        return numerics.int8_linear(q_MK, self.weight, self.scale)


class Int8TokenLinear(Linear):
    """W8A8 with a scale of its own for each token: exact int32 sums, scaled in float32."""

    kernel = "int8 x int8 -> int32, a scale a token (torch._int_mm)"

    def __init__(self, w_NK: torch.Tensor, scales: Scales, bias_N: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight, self.scale = nn.Buffer(w_NK), nn.Buffer(scales.product)
        self.smoothing = None if scales.pre_quant is None else nn.Buffer(scales.pre_quant)
        self.bias = None if bias_N is None else nn.Buffer(bias_N.float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q_MK, scale_M1 = numerics.quantize_int8_tokens(x.reshape(-1, x.shape[-1]), self.smoothing)
        y_MN = numerics.int8_linear(q_MK, self.weight, self.scale) * scale_M1
        if self.bias is not None:
            y_MN = y_MN + self.bias
        return y_MN.to(self.dtype).view(*x.shape[:-1], -1)


class Fp8Linear(QuantizedLinear):
    """E4M3 activations with one static scale, E4M3 weights with one or one a row, multiplied as float8 (CUDA, SM89)."""

    kernel = "fp8 x fp8 (torch._scaled_mm)"
    operand = torch.float8_e4m3fn

    def prepare(self, w_NK: torch.Tensor, scales: Scales) -> None:
        self.quantizer = InputQuantizer(scales.multiplier, numerics.quantize_fp8)
        self.weight = nn.Buffer(w_NK)
        self.scale = nn.Buffer(scales.product)

    def product(self, q_MK: torch.Tensor) -> torch.Tensor:
        if self.scale.numel() == 1:
            return numerics.fp8_linear(q_MK, self.weight, self.scale.reshape(()), self.dtype)
        return numerics.fp8_linear(q_MK, self.weight, torch.ones_like(self.scale[0]), torch.float32) * self.scale


class Fp8ValuesLinear(QuantizedLinear):
    """Fp8Linear where float8 has no fast product: on a CPU torch's takes 20 to 50 times as long as float32's.

    Inputs and weights are rounded to e4m3, scaled back and multiplied as floats, with the operations of ModelOpt's fake
    quantization, in their order: the same float32 numbers come out.
    """

    kernel = "fp8 values multiplied as floats (torch linear)"

    def prepare(self, w_NK: torch.Tensor, scales: Scales) -> None:
        inverse = numerics.fp8_inverse(scales.input)
        multiplier = inverse if scales.pre_quant is None else inverse * scales.pre_quant
        self.quantizer = InputQuantizer(multiplier, numerics.round_to_fp8, 1 / inverse)
        self.weight = nn.Buffer(w_NK.to(self.dtype) * (1 / numerics.fp8_inverse(scales.weight)).to(self.dtype)[:, None])

    def product(self, q_MK: torch.Tensor) -> torch.Tensor:
        return F.linear(q_MK.to(self.dtype), self.weight)
