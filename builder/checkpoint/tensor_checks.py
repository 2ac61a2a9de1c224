"""The checks of one checkpoint: its tensors against its config, then every value, in one pass over each tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from builder.checkpoint.layout import Expected
from builder.checkpoint.reading import Checkpoint
from builder.checkpoint.violations import Code, Violation
from builder.planning.sharding import is_row_parallel
from plugins.common.errors import UserError
from plugins.common.patterns import keep_and_group
from plugins.common.safetensors_file import HeaderError, Tensor
from plugins.sparsity import pattern
from plugins.sparsity.segments import Segment, Segments

Array = np.ndarray[Any, Any]

# dtype -> (exponent bits, all bits but the sign): NaN and infinity have every exponent bit set; e4m3 has NaN only
_EXPONENT = {
    "BF16": 0x7F80,
    "F16": 0x7C00,
    "F32": 0x7F800000,
    "F64": 0x7FF0000000000000,
    "F8_E4M3": 0x7F,
    "F8_E5M2": 0x7C,
}
_QUANTIZER_NAMES = ("_quantizer", "_amax", "_input_scale", "_zero_point")


def check_names(checkpoint: Checkpoint) -> Iterator[Violation]:
    """Tensors that should not be there, and those that should."""
    for key, tensor in checkpoint.tensors.items():
        if key in checkpoint.expected:
            continue
        file, name = tensor.file.name, tensor.name
        if name.endswith("_weight_mask"):
            detail = "a ModelOpt mask: fold the masks into the weights (mts.export) before quantizing and exporting"
            weight = checkpoint.tensors.get(key.removesuffix("_weight_mask") + "weight")
            if weight is not None and checkpoint.quantization.format != "none":
                detail += f"; the config has {checkpoint.quantization.format}, its weight is {weight.dtype}"
            yield Violation(Code.UNFOLDED_MASK, detail, file, name)
        elif any(mark in name for mark in _QUANTIZER_NAMES):
            yield Violation(Code.QUANTIZER_STATE, "a quantizer's own state: export the model again", file, name)
        else:
            yield Violation(Code.UNEXPECTED_TENSOR, "the config has no such tensor", file, name)


def check_presence(checkpoint: Checkpoint) -> Iterator[Violation]:
    """Tensors that the config calls for and no file holds."""
    for key, expected in checkpoint.expected.items():
        if expected.required and key not in checkpoint.tensors:
            rank, _, name = key.rpartition("/")
            file = f"{rank}.safetensors" if rank else None
            reason = f" ({checkpoint.quantization.format} needs it)" if expected.role == "scale" else ""
            yield Violation(Code.MISSING_TENSOR, f"the config requires it, and it is missing{reason}", file, name)


def check_types(checkpoint: Checkpoint) -> Iterator[Violation]:
    """Dtypes and shapes against the config."""
    for key, expected in checkpoint.expected.items():
        tensor = checkpoint.tensors.get(key)
        if tensor is None:
            continue
        where = (tensor.file.name, tensor.name)
        if tensor.dtype not in expected.dtypes:
            yield Violation(
                Code.DTYPE, f"it is {tensor.dtype}, the config requires {' or '.join(expected.dtypes)}", *where
            )
        if tensor.shape not in expected.shapes:
            shape = " or ".join(str(list(shape)) for shape in expected.shapes)
            yield Violation(Code.SHAPE, f"it is {list(tensor.shape)}, the config requires {shape}", *where)


def check_split(checkpoint: Checkpoint, tensor_parallel: int) -> Iterator[Violation]:
    """Whether a split into `tensor_parallel` ranks would cut a group, or give ranks unequal shares of segments."""
    if checkpoint.kind == "trtllm":
        return  # it is split already: check_values looks at each rank
    for layer in checkpoint.sparse_layers:
        tensor, segments = checkpoint.tensors.get(f"{layer}.weight"), checkpoint.declaration.hybrid.get(layer)
        if tensor is None or len(tensor.shape) != 2:
            continue
        K, detail = tensor.shape[1], ""
        _, group = keep_and_group(checkpoint.declaration.pattern)
        if is_row_parallel(layer) and K % (group * tensor_parallel):
            each = f"{K / tensor_parallel:g} each"
            detail = f"in_features {K} over {tensor_parallel} ranks is {each}, not a multiple of {group}"
        elif segments:
            try:
                segments.rank(0, tensor_parallel)
            except UserError as error:
                detail = str(error)
        if detail:
            yield Violation(Code.TENSOR_PARALLEL, detail, tensor.file.name, tensor.name)


def check_values(tensor: Tensor, expected: Expected | None, segments: Segments | None) -> list[Violation]:
    """The first violation of each kind in one tensor: values not finite, scales not positive, groups too full, -0.0."""
    violations: dict[Code, Violation] = {}
    if segments and (len(tensor.shape) != 2 or tensor.shape[1] % keep_and_group(segments.pattern)[1]):
        group = f"groups of {keep_and_group(segments.pattern)[1]}"
        detail = f"its shape {list(tensor.shape)} has no whole {group}, and the layer is declared {segments.pattern}"
        violations[Code.TENSOR_PARALLEL] = Violation(Code.TENSOR_PARALLEL, detail, tensor.file.name, tensor.name)
        segments = None
    try:
        for start, rows in tensor.chunks():
            scale = expected is not None and expected.role == "scale"
            for violation in _check_rows(tensor, start, rows, scale, segments):
                violations.setdefault(violation.code, violation)
    except (OSError, HeaderError) as error:
        violations[Code.FILE] = Violation(Code.FILE, str(error), tensor.file.name, tensor.name)
    return list(violations.values())


def _check_rows(tensor: Tensor, start: int, rows: Array, scale: bool, segments: Segments | None) -> Iterator[Violation]:
    where = (tensor.file.name, tensor.name)
    if scale:
        yield from _check_scale(tensor, start, rows.reshape(-1))
    elif (bad := _not_finite(rows, tensor.dtype)) is not None:
        row, column = bad
        detail = f"column {column} is {float(rows[row, column])}"
        yield Violation(Code.NOT_FINITE, detail, *where, start + row if len(tensor.shape) > 1 else None)
    if segments:
        for segment in segments.sparse:
            yield from _check_segment(tensor, start, rows, segments.axis == "inputs", segment)


def _check_segment(tensor: Tensor, start: int, rows: Array, by_input: bool, segment: Segment) -> Iterator[Violation]:
    """Of the rows from `start` on, what lies in a sparse segment of rows, or of inputs."""
    keep, size = keep_and_group(segment.kind)
    where = (tensor.file.name, tensor.name)
    top = 0 if by_input else max(0, segment.start - start)
    left = segment.start if by_input else 0
    part = rows[:, segment.slice] if by_input else rows[top : max(top, segment.end - start)]
    if not part.size:
        return
    if (at := pattern.first_violation(part, segment.kind)) is not None:
        row, group = at
        count = int(np.count_nonzero(part[row, size * group : size * (group + 1)]))
        detail = f"{count} of {size} values are nonzero, {segment.kind} allows {keep}"
        yield Violation(Code.SPARSITY, detail, *where, start + top + row, left // size + group)
    if (at := pattern.negative_zero(part)) is not None:
        row, column = at
        detail = f"column {left + column} is -0.0, which sparse kernels count as a value: write +0.0"
        yield Violation(Code.NEGATIVE_ZERO, detail, *where, start + top + row, (left + column) // size)


def _check_scale(tensor: Tensor, start: int, values: Array) -> Iterator[Violation]:
    values = values.astype(np.float64)
    bad = np.flatnonzero(~((values > 0) & np.isfinite(values)))
    if bad.size:
        row = None if values.size == 1 and start == 0 else start + int(bad[0])
        detail = f"the scale is {values[bad[0]]:g}, it must be finite and positive"
        yield Violation(Code.SCALE, detail, tensor.file.name, tensor.name, row)


def _not_finite(rows: Array, dtype: str) -> tuple[int, int] | None:
    """(row, column) of the first NaN or infinity, on bit patterns: faster than isfinite for 8 and 16 bits."""
    exponent = _EXPONENT.get(dtype)
    if exponent is None:
        return None
    bits = rows.view(f"u{rows.dtype.itemsize}")
    exponent = bits.dtype.type(exponent)
    bad = (bits & exponent) == exponent
    if not bad.any():
        return None
    row, column = np.unravel_index(int(bad.argmax()), bad.shape)
    return int(row), int(column)
