"""What one product of an engine multiplies: its shape, in the form that the tuner times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from builder.planning import sharding
from plugins.autotune.choice import Hybrid
from plugins.common.formats import KERNEL_OUTPUTS
from plugins.common.fused_layers import fused_name, fused_parts
from plugins.common.linear_shape import LinearShape

if TYPE_CHECKING:
    from builder.checkpoint.reading import LayerFacts
    from plugins.sparsity.segments import Axis

DTYPES = {format.dtype: format.value for format in KERNEL_OUTPUTS}  # config.json's name -> ours


def shape(layer: LinearShape, ranks: int, dtype: str, fused: Mapping[str, LinearShape] | None = None) -> LinearShape:
    """What one rank multiplies. With `fused`, the sparse layers by name: all that TensorRT-LLM makes one product of."""
    rows, columns = layer.out_features, layer.in_features
    members = fused_parts(fused_name(layer.name))
    if fused and all(member in fused for member in members):
        rows = sum(fused[member].out_features for member in members)
    if sharding.is_row_parallel(layer.name):
        columns //= ranks
    else:
        rows //= ranks
    return LinearShape(rows, columns, kernel_format(layer, dtype), pattern=layer.pattern)


def shape_on_cpu(layer: LayerFacts, dtype: str) -> LinearShape | Hybrid:
    """A sparse layer as the torch engine multiplies it on a CPU: alone, both parts of a hybrid layer in one call."""
    whole = shape(layer.shape, 1, dtype)
    if layer.segments is None:
        return whole
    return Hybrid.of(whole, layer.segments.axis, _sparse_size(layer, layer.segments.axis))


def hybrids(layers: Sequence[LayerFacts], dtype: str) -> dict[str, Hybrid]:
    """The products of layers that are 2:4 in part, under the name of each 2:4 layer that the engine joins in them."""
    groups: dict[str, list[LayerFacts]] = {}
    for layer in layers:
        groups.setdefault(fused_name(layer.shape.name), []).append(layer)
    timed: dict[str, Hybrid] = {}
    for members in groups.values():
        cuts = [member.segments for member in members if member.segments]
        if not cuts or not all(cut.in_two for cut in cuts):
            continue
        shapes = [member.shape for member in members]
        whole = replace(shape(shapes[0], 1, dtype), out_features=sum(each.out_features for each in shapes))
        size = sum(_sparse_size(member, cuts[0].axis) for member in members)
        timed |= {each.name: Hybrid.of(whole, cuts[0].axis, size) for each in shapes if each.sparse}
    return timed


def _sparse_size(layer: LayerFacts, axis: Axis) -> int:
    """How many of a layer's rows or inputs are sparse."""
    if layer.segments is not None:
        return sum(part.size for part in layer.segments.sparse)
    whole = layer.shape
    return (whole.out_features if axis == "rows" else whole.in_features) if whole.sparse else 0


def kernel_format(layer: LinearShape, dtype: str) -> str:
    """The number format of the weight that a kernel takes, in a model of `dtype`."""
    return layer.format if layer.format in ("int8", "fp8") else DTYPES.get(dtype, dtype)
