"""Sparse linear layers for TensorRT-LLM's PyTorch backend. Imported inside TensorRT-LLM's own processes only.

TensorRT-LLM has no place to register a linear method. What it has is models out of tree: an engine's `twofour_sparse`
package subclasses the built-in model with `SparseLinears` and registers it again under the same architecture, so that
every worker that looks the architecture up imports it. After its layers are made, each chosen one gets our method
(sparse_method.py); after its weights are loaded, each chosen one is compressed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from tensorrt_llm._torch.modules.linear import Linear
from tensorrt_llm.logger import logger

from plugins.common.fused_layers import fused_parts
from plugins.common.json_files import read_json
from plugins.linear.kernel_linear import SKINNY_THEN_CUSPARSELT, Choices
from plugins.tensorrt_llm.releases import naming_the_release
from plugins.tensorrt_llm.sparse_method import SparseMethod, compress, give_sparse_method


class SparseLinears:
    """Mixed into a built-in `XForCausalLM`: gives the layers named in `layers_file` their sparse method.

    The file holds {"layers": {Hugging Face module name: [[tokens, kernel], ...] or null}}; null leaves the choice of
    kernel to us.
    """

    layers_file: ClassVar[Path]

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # makes the weights, and with them each layer's own method
        layers = read_json(self.layers_file)["layers"]
        taken: set[str] = set()
        with naming_the_release():
            for name, module, choices in chosen(self, layers):
                give_sparse_method(name, module, choices)
                taken.update(fused_parts(name))
        if missed := sorted(set(layers) - taken):
            logger.warning(f"twofour: {len(missed)} declared 2:4 layers stay dense, such as {missed[0]}")
        logger.info(f"twofour: {len(taken)} of {len(layers)} declared 2:4 layers have the sparse method")

    if not hasattr(Linear, "post_load_weights"):  # 1.0: nothing is called after loading

        def load_weights(self, weights: Any, weight_mapper: Any = None, *args: Any, **kwargs: Any) -> None:
            """The loader passes a mapper only to a method that has an argument of this name."""
            super().load_weights(weights, weight_mapper, *args, **kwargs)  # type: ignore[misc]
            compress_all(self)

    def post_load_weights(self) -> None:
        """Later releases call it on every module of a loaded model, on the model itself first."""
        if hasattr(super(), "post_load_weights"):
            super().post_load_weights()  # type: ignore[misc]
        compress_all(self)


def compress_all(model: Any) -> None:
    """Compresses every layer with a sparse method that this pipeline rank holds the weight of."""
    with naming_the_release():
        for module in list(model.modules()):
            method = getattr(module, "quant_method", None)
            if isinstance(method, SparseMethod) and getattr(module, "weight", None) is not None:
                compress(module, method.choices)


def chosen(model: Any, layers: Mapping[str, Sequence[Any] | None]) -> Iterator[tuple[str, Any, Choices]]:
    """The model's Linear modules that are 2:4 as a whole: a fused one only where each of its parts is."""
    for name, module in model.named_modules():
        if isinstance(module, Linear) and all(part in layers for part in fused_parts(name)):
            choices = layers[fused_parts(name)[0]] or SKINNY_THEN_CUSPARSELT
            yield name, module, [(int(tokens), str(kernel).removeprefix("dense-")) for tokens, kernel in choices]
