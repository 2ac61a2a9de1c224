"""Sparse linear layers for TensorRT-LLM's TensorRT engines (1.0 to 1.2). Imported inside TensorRT-LLM's processes only.

An engine's `hooks/models.py` subclasses TensorRT-LLM's model with `SparseNetwork`. When the model has quantized its
layers, and before any weight is loaded, the layers that routes.json gives to our plugin are swapped, by TensorRT-LLM's
own `quantize_layers`, for classes here: same parameters, so that the checkpoint loads as before, and another product.

The plugin (plugins/csrc/tensorrt) takes rounded inputs: y [..., N] = scale * (x [..., K] w_NK^T), where the scale is a
number or one a row. Bias and the collectives stay TensorRT-LLM's.

Legend: N out_features, K in_features (of this rank).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorrt as trt
from tensorrt_llm._common import default_net, default_trtnet
from tensorrt_llm._utils import str_dtype_to_trt
from tensorrt_llm.functional import _create_tensor, cast, constant, mul
from tensorrt_llm.layers import ColumnLinear, RowLinear
from tensorrt_llm.quantization.functional import quantize, quantize_tensor
from tensorrt_llm.quantization.layers import FP8Linear, FP8RowLinear, Int8SmoothQuantLinear, Int8SmoothQuantRowLinear
from tensorrt_llm.quantization.quantize import quantize_layers

from plugins.common.errors import UserError
from plugins.common.json_files import read_json
from plugins.tensorrt_llm.layer_names import local_name

PLUGIN = ("TwofourGemm", "1", "twofour")  # name, version, namespace
TYPES = {"float16": 0, "bfloat16": 1, "int8": 2, "fp8": 3}  # twofour_type


class SparseNetwork:
    """Mixed into a TensorRT-LLM `XForCausalLM`: swaps the layers that `routes` gives to the plugin."""

    routes: ClassVar[Path]

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # quantizes: each layer has its final class now
        layers = read_json(self.routes)["layers"]
        config = self.config  # type: ignore[attr-defined]
        held = config.mapping.pp_layers(config.num_hidden_layers)
        here = {local_name(name, held, config.num_hidden_layers) for name, route in layers.items() if route == "plugin"}
        swap(self, {name for name in here if name is not None})


def swap(model: Any, names: set[str]) -> None:
    """Puts the layers of these names on our plugin. Raises UserError for a name that is not a layer it can run."""
    modules = {name: module for name, module, _ in model.named_modules_with_parent()}
    for name in names:
        if type(modules.get(name)) not in SPARSE_LAYER:
            actual = type(modules[name]).__name__ if name in modules else "not a layer"
            raise UserError(f"'{name}' is {actual} in this model: route it natively, or build from its own checkpoint")
    if names:
        quantization = copy.copy(model.config.quantization)
        quantization.exclude_modules = [name for name in modules if name not in names]
        quantize_layers(model, quantization, SPARSE_LAYER)


class _Sparse:
    """What all of them share. The weight goes into the plugin and never becomes a TensorRT constant."""

    weight_type: ClassVar[str | None] = None  # None: the layer's own dtype

    def forward(self, x: Any, lora_runtime_params: Any = None, **collective: Any) -> Any:
        assert lora_runtime_params is None, "no LoRA on a 2:4 layer"
        x, scales = self.round_input(x)  # type: ignore[attr-defined]
        return self.collect_and_bias(add_plugin(self, x, scales), **collective)  # type: ignore[attr-defined]


class _Sparse16(_Sparse):
    def round_input(self, x: Any) -> tuple[Any, np.ndarray[Any, Any]]:
        return x, np.ones(1, np.float32)


class _SparseFP8(_Sparse):
    weight_type = "fp8"

    def round_input(self, x: Any) -> tuple[Any, np.ndarray[Any, Any]]:
        """x in e4m3; an attention layer before it may have rounded it already."""
        input_scale = raw(self, "activation_scaling_factor")
        if x.dtype != trt.fp8:
            # the scale stays float32, as in the plugin
            x = quantize(cast(x, trt.float32), constant(input_scale), "fp8")
        return x, input_scale * raw(self, "weights_scaling_factor")


class _SparseInt8(_Sparse):
    weight_type = "int8"

    def round_input(self, x: Any) -> tuple[Any, np.ndarray[Any, Any]]:
        """x * prequant / input_scale in int8: by quantize_tensor, as TensorRT's quantize layer breaks INT8 plugins."""
        input_scale = raw(self, "activation_scaling_factor")
        x = mul(x, self.prequant_scaling_factor.value)  # type: ignore[attr-defined]
        return quantize_tensor(x, constant(1 / input_scale)), input_scale * raw(self, "weights_scaling_factor")


class SparseColumnLinear(_Sparse16, ColumnLinear): ...


class SparseRowLinear(_Sparse16, RowLinear): ...


class SparseFP8Linear(_SparseFP8, FP8Linear): ...


class SparseFP8RowLinear(_SparseFP8, FP8RowLinear): ...


class SparseInt8Linear(_SparseInt8, Int8SmoothQuantLinear): ...


class SparseInt8RowLinear(_SparseInt8, Int8SmoothQuantRowLinear): ...


# quantize_layers takes the first that isinstance() finds: subclasses stand before their bases
SPARSE_LAYER = {
    FP8Linear: SparseFP8Linear,
    FP8RowLinear: SparseFP8RowLinear,
    Int8SmoothQuantLinear: SparseInt8Linear,
    Int8SmoothQuantRowLinear: SparseInt8RowLinear,
    ColumnLinear: SparseColumnLinear,
    RowLinear: SparseRowLinear,
}


def add_plugin(layer: Any, x: Any, scales: np.ndarray[Any, Any]) -> Any:
    """Adds our plugin to the network being defined. `scales` float32 [1], or [N] for one a row."""
    creator = trt.get_plugin_registry().get_creator(*PLUGIN)
    if creator is None:
        raise UserError(
            f"TensorRT has no plugin {PLUGIN[0]}: preload libtwofour_tensorrt.so, as the engine's launch/env.sh does"
        )
    fields = plugin_fields(layer, scales)
    plugin = creator.create_plugin("twofour", trt.PluginFieldCollection(list(fields.values())), trt.TensorRTPhase.BUILD)
    if plugin is None:
        raise UserError("TensorRT could not create our plugin for a layer: see the previous log line")
    added = default_trtnet().add_plugin_v3([x.trt_tensor], [], plugin)
    return _create_tensor(added.get_output(0), added)


def plugin_fields(layer: Any, scales: np.ndarray[Any, Any]) -> dict[str, Any]:
    """The plugin's fields. Their arrays are kept as long as the network."""
    out_features, in_features = layer.weight.raw_value.shape
    out_type = {trt.float16: "float16", trt.bfloat16: "bfloat16"}[dtype_of(layer)]
    kinds = trt.PluginFieldType
    whole = {"weight_type": TYPES[layer.weight_type or out_type], "out_type": TYPES[out_type]}
    whole |= {"out_features": out_features, "in_features": in_features}
    weight = np.frombuffer(np.ascontiguousarray(layer.weight.raw_value).tobytes(), np.uint8)
    arrays: dict[str, tuple[Any, Any]] = {n: (np.array([value], np.int32), kinds.INT32) for n, value in whole.items()}
    name = "scale" if scales.size == 1 else "channel_scales"
    arrays |= {name: (np.ascontiguousarray(scales, np.float32), kinds.FLOAT32), "weight": (weight, kinds.UNKNOWN)}
    for array, _ in arrays.values():
        default_net().register_ndarray(array)
    return {name: trt.PluginField(name, array, kind) for name, (array, kind) in arrays.items()}


def raw(layer: Any, name: str) -> np.ndarray[Any, Any]:
    """A float32 parameter's numbers, flat."""
    values: np.ndarray[Any, Any] = np.asarray(getattr(layer, name).raw_value, np.float32).reshape(-1)
    return values


def dtype_of(layer: Any) -> Any:
    return str_dtype_to_trt(layer.dtype) if isinstance(layer.dtype, str) else layer.dtype
