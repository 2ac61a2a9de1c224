"""Whether our kernels beat the dense ones at an engine's own batch, measured where there is a GPU and our library.

TensorRT times its own sparse tactics against its dense ones by itself. What it cannot time is our plugin against
either: this is that measurement, per shape of one rank, at the tokens that a full batch decodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from builder import compatibility
from builder.engines.base import EngineConfig
from builder.engines.gpu import gpus
from plugins.errors import UserError


class Sized(compatibility.Shardable, Protocol):
    """What is read of a checkpoint's layer (builder.checkpoint.LayerFacts), of all ranks together."""

    @property
    def format(self) -> str: ...


def measure(layers: Iterable[Sized], config: EngineConfig, dtype: str) -> dict[str, float]:
    """Dense over sparse time of each 2:4 layer; a ratio above 1 means ours is faster. Nothing where none can be timed.

    `dtype` ("bf16" or "fp16") is what the layers put out.
    """
    if not gpus():
        return {}
    from plugins import tuner

    shapes = {
        layer.name: tuner.Shape(*_of_rank(layer, config), layer.format, layer.format == "int8", dtype)
        for layer in layers
        if layer.sparse
    }
    try:
        return ratios(tuner.tune(shapes, buckets=(config.max_batch_size,)), config.max_batch_size)
    except UserError:  # no libtwofour, or a GPU that it was not built for: TensorRT decides alone
        return {}


def ratios(tactics: Mapping[str, Any], tokens: int) -> dict[str, float]:
    """Of a measured tactics.json: dense over sparse at `tokens`, of the layers where a sparse kernel was kept."""
    found = {}
    for name, layer in tactics["layers"].items():
        bucket = next((bucket for bucket in layer["buckets"] if bucket["tokens"] >= tokens), None)
        if bucket and bucket["measured"] and bucket["ratio"] and not bucket["kernel"].startswith("dense"):
            found[name] = float(bucket["ratio"])
    return found


def _of_rank(layer: Sized, config: EngineConfig) -> tuple[int, int]:
    """(out_features, in_features) of one rank's shard."""
    if compatibility.is_row_parallel(layer.name):
        return layer.out_features, layer.in_features // config.tensor_parallel
    return layer.out_features // config.tensor_parallel, layer.in_features
