"""Sparse linear layers for TensorRT-LLM's PyTorch backend. Imported inside TensorRT-LLM's own processes only.

TensorRT-LLM has no place to register a linear method. What it has is models out of tree: an engine's `twofour_sparse`
package subclasses the built-in model with `SparseLinears` and registers it again under the same architecture, so that
every worker that looks the architecture up imports it. After its layers are made, each chosen one gets a method that

- loads as the built-in one does (fused q/k/v and gate/up, tensor parallel shards, FP8 scales),
- compresses the loaded weight once, in `post_load_weights`, and lets the dense one go,
- multiplies with the kernels of torch_ops.py, which allocate from torch's pool only and never synchronise: safe in
  CUDA graphs.

Legend: M tokens, N out_features, K in_features (of this rank).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from tensorrt_llm._torch.modules.linear import FP8QDQLinearMethod, Linear, UnquantizedLinearMethod
from tensorrt_llm.logger import logger

from plugins.common.errors import UserError
from plugins.linear.factory import build_linear
from plugins.linear.kernel_linear import SKINNY_THEN_CUSPARSELT, Choices
from plugins.sparsity.torch_packing import pack

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
GROUP = 4


class SparseMethod:
    """What both sparse methods add to the built-in method that they extend."""

    def __init__(self, choices: Choices) -> None:
        super().__init__()
        self.choices = choices  # (tokens, kernel) in ascending order

    def post_load_weights(self, module: Any) -> None:
        """Called by TensorRT-LLM once every weight of the model is loaded and rescaled."""
        super().post_load_weights(module)  # type: ignore[misc]
        compress(module, self.choices)

    def apply(
        self, module: Any, input: torch.Tensor, bias: torch.Tensor | None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """y [..., N] of input [..., K]; with tensor parallel rows, this rank's share of the sum."""
        output: torch.Tensor = module.twofour(input)
        return output if bias is None else output + bias

    def apply_out(self, module: Any, input: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
        """The same into a buffer of NCCL's (later releases, before an all-reduce)."""
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


class SparseLinears:
    """Mixed into a built-in `XForCausalLM`: gives the layers named in `layers_file` their sparse method.

    The file holds {"layers": {Hugging Face module name: [[tokens, kernel], ...] or null}}; null leaves the choice of
    kernel to us.
    """

    layers_file: ClassVar[Path]

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # makes the weights, and with them each layer's own method
        layers = json.loads(self.layers_file.read_text(encoding="utf8"))["layers"]
        taken: set[str] = set()
        for name, module, choices in chosen(self, layers):
            give_sparse_method(name, module, choices)
            taken.update(parts(name))
        if missed := sorted(set(layers) - taken):
            logger.warning(f"twofour: {len(missed)} declared 2:4 layers stay dense, such as {missed[0]}")
        logger.info(f"twofour: {len(taken)} of {len(layers)} declared 2:4 layers have the sparse method")


def chosen(model: Any, layers: Mapping[str, Sequence[Any] | None]) -> Iterator[tuple[str, Any, Choices]]:
    """The model's Linear modules that are 2:4 as a whole: a fused one only where each of its parts is."""
    for name, module in model.named_modules():
        if isinstance(module, Linear) and all(part in layers for part in parts(name)):
            choices = layers[parts(name)[0]] or SKINNY_THEN_CUSPARSELT
            yield name, module, [(int(tokens), str(kernel).removeprefix("dense-")) for tokens, kernel in choices]


def parts(name: str) -> tuple[str, ...]:
    """The Hugging Face names of the layers that TensorRT-LLM's module of this name holds."""
    block, _, last = name.rpartition(".")
    return tuple(f"{block}.{part}" for part in FUSED.get(last, (last,))) if block else (name,)


def give_sparse_method(name: str, module: Any, choices: Choices) -> None:
    """Replaces one layer's method. Raises UserError for a method we do not extend, or a shard that cuts a group."""
    method = SPARSE_METHOD.get(type(module.quant_method))
    if method is None:
        known = " and ".join(base.__name__ for base in SPARSE_METHOD)
        raise UserError(f"'{name}' runs on {type(module.quant_method).__name__}, and the sparse methods extend {known}")
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
    if weight.is_cuda:
        tensors = {"weight": weight}
    else:
        tensors = dict(zip(("weight_values", "weight_indices"), pack(weight), strict=True))
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
    # Others ask for its dtype and device: it stays, with nothing in it.
    module.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)


class UnlessQuantized:
    """An input quantizer that lets FP8 inputs through: TensorRT-LLM's attention hands them to its output projection."""

    def __init__(self, quantize: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.quantize = quantize

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.dtype == torch.float8_e4m3fn else self.quantize(x)
