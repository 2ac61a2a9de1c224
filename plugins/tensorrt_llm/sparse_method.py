"""The method that multiplies a 2:4 layer in TensorRT-LLM's PyTorch backend, in place of the built-in one.

It extends the built-in method: loading, fusing q/k/v and gate/up, tensor parallel shards and FP8 scales stay as they
are. Once the weights are loaded, `compress` builds our layer from the dense weight and lets the dense one go. Its
kernels (plugins/libtwofour/torch_ops.py) allocate from torch's pool only and never synchronise: safe in CUDA graphs.

Legend: M tokens, N out_features, K in_features (of this rank).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from tensorrt_llm._torch.modules.linear import FP8QDQLinearMethod, UnquantizedLinearMethod
from tensorrt_llm.logger import logger

from plugins.common.errors import UserError
from plugins.linear.factory import build_linear
from plugins.linear.kernel_linear import Choices
from plugins.linear.torch_linear import InputQuantizer
from plugins.sparsity.torch_packing import pack
from plugins.tensorrt_llm import releases

GROUP = 4


class SparseMethod:
    """What both sparse methods add to the built-in method that they extend."""

    supports_nccl_symmetric_memory_window_output: ClassVar[bool] = False  # `apply` returns an ordinary tensor

    def __init__(self, choices: Choices) -> None:
        super().__init__()
        self.choices = choices  # (tokens, kernel) in ascending order

    def apply(
        self, module: Any, input: torch.Tensor, bias: torch.Tensor | None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """y [..., N] of input [..., K]; with tensor parallel rows, this rank's share of the sum.

        Raises UserError where the layer was never compressed.
        """
        layer = getattr(module, "twofour", None)
        if layer is None:
            raise UserError(
                f"TensorRT-LLM {releases.installed()} loaded this model without calling post_load_weights on it, so "
                f"its 2:4 layers were not compressed: use load_format auto, or the container {releases.CONTAINER}"
            )
        output: torch.Tensor = layer(input)
        return output if bias is None else output + bias

    def apply_out(self, module: Any, input: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
        """The same into a buffer of NCCL's (1.3 before June 2026, ahead of an all-reduce)."""
        return out.copy_(self.apply(module, input, bias))

    def apply_window_output(self, module: Any, input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self.apply(module, input, bias)

    def pre_reload_weights(self, module: Any) -> None:
        raise UserError("compressed 2:4 weights cannot be reloaded in place: start the engine again")


class SparseLinearMethod(SparseMethod, UnquantizedLinearMethod):
    """16-bit weights."""


class SparseFP8LinearMethod(SparseMethod, FP8QDQLinearMethod):
    """FP8 weights and activations, one static scale each."""


SPARSE_METHOD: dict[type, type[SparseMethod]] = {
    UnquantizedLinearMethod: SparseLinearMethod,
    FP8QDQLinearMethod: SparseFP8LinearMethod,
}


def give_sparse_method(name: str, module: Any, choices: Choices) -> None:
    """Replaces one layer's method. Raises UserError for a layer that ours cannot compute as TensorRT-LLM would."""
    method = SPARSE_METHOD.get(type(module.quant_method))
    if method is None:
        known = " and ".join(base.__name__ for base in SPARSE_METHOD)
        kind = type(module.quant_method).__name__
        raise UserError(f"'{name}' runs on {kind}, and the sparse methods extend {known}", "leave the layer dense")
    if method is SparseFP8LinearMethod and getattr(module, "force_dynamic_quantization", False):
        raise UserError(
            f"'{name}' is 2:4, and its inputs take the checkpoint's static scale: remove force_dynamic_quantization"
        )
    if module.in_features % GROUP:
        raise UserError(
            f"'{name}' has {module.in_features} inputs on this rank, which cuts a 2:4 group of {GROUP}: "
            "use a smaller tensor_parallel_size"
        )
    module.quant_method = method(choices)


def compress(module: Any, choices: Choices) -> None:
    """Builds `module.twofour` from the loaded weight and lets the dense weight go. A second call does nothing.

    Raises UserError where the weight is not 2:4: it would be computed wrongly otherwise.
    """
    if hasattr(module, "twofour"):
        return
    weight = module.weight.data
    tensors = {"weight": weight} if weight.is_cuda else pack(weight).stored()
    if weight.dtype == torch.float8_e4m3fn:
        if module.input_scale is None:
            raise UserError("an FP8 layer has no static input scale: export the checkpoint with one")
        tensors |= {"weight_scale": module.weight_scale.data, "input_scale": module.input_scale.data}
    layer = build_linear(tensors, module.dtype, weight.device, choices if weight.is_cuda else None)
    if layer.refused:
        logger.warning(f"twofour: a 2:4 layer runs dense, {layer.refused}")
    if layer.quantizer is not None:
        layer.quantizer = UnlessQuantized(layer.quantizer)  # type: ignore[assignment]
    module.twofour = layer
    # Other code reads its dtype and device: it stays, empty.
    module.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)


class UnlessQuantized:
    """An input quantizer that takes e4m3 inputs as they are.

    TensorRT-LLM's attention passes them to its output projection, and a fused all-reduce to the layers after it.
    """

    def __init__(self, quantizer: InputQuantizer) -> None:
        self.quantizer = quantizer

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float8_e4m3fn:
            return self.quantizer(x)
        return x if self.quantizer.scale is None else x.to(self.quantizer.scale.dtype) * self.quantizer.scale
