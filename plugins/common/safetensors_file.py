"""Reads safetensors files without torch: the header, strictly, and tensors as numpy views or chunks of rows.

The format (https://github.com/huggingface/safetensors) is 8 bytes of header length, the header in JSON, the data.
Refused, each with its own message: a header that does not fit, is not JSON or names a tensor twice; a dtype, shape
or range that is not one; data with a hole, an overlap, a missing end or an end that no tensor owns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAX_HEADER = 100_000_000  # bytes, as in the reference implementation
CHUNK_BYTES = 8 << 20

DTYPES = {  # the format's name -> numpy's or ml_dtypes', bytes of a value
    "BOOL": ("bool_", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "F32": ("float32", 4),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
    "F64": ("float64", 8),
}


class HeaderError(ValueError):
    """A file that is not a complete safetensors file. The message is one line and does not name the file."""


@dataclass(frozen=True)
class Tensor:
    """One tensor in a file. `dtype` is the format's name, such as "BF16"; `offset` counts from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype][1]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        import ml_dtypes  # which machines that only run engines may lack

        name = DTYPES[self.dtype][0]
        return np.dtype(getattr(ml_dtypes, name, None) or getattr(np, name))

    def load(self) -> np.ndarray[Any, Any]:
        """All of it, as a read-only view of the file; bfloat16 and float8 with the dtypes of `ml_dtypes`."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.numpy_dtype)
        return np.memmap(self.file, self.numpy_dtype, "r", self.offset, self.shape or (1,)).reshape(self.shape)

    def chunks(self) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
        """(first row, rows [R, K]) in turn, about CHUNK_BYTES each; a vector counts as rows of one value.

        Read, not mapped, so that the memory held stays at one chunk.
        """
        rows = self.shape[0] if self.shape else 1
        width = math.prod(self.shape[1:])
        row_bytes = width * self.itemsize
        step = max(1, CHUNK_BYTES // max(1, row_bytes))
        with self.file.open("rb") as file:
            file.seek(self.offset)
            for start in range(0, rows if width else 0, step):
                count = min(step, rows - start)
                data = file.read(count * row_bytes)
                if len(data) < count * row_bytes:
                    raise HeaderError(f"the file shrank while {self.name!r} was read")
                yield start, np.frombuffer(data, self.numpy_dtype).reshape(count, width)


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name, in the order of their data. Raises HeaderError."""
    size = path.stat().st_size
    if size < 8:
        raise HeaderError(f"{size} bytes are too few for a safetensors file")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            raise HeaderError(f"its header claims {length} bytes, more than the format's limit of {MAX_HEADER}")
        if 8 + length > size:
            raise HeaderError(f"truncated: its header claims {length} bytes, the file has {size - 8}")
        entries = _parse(file.read(length))
    tensors = [_tensor(name, entry, path, 8 + length) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_cover(tensors, 8 + length, size)
    return {tensor.name: tensor for tensor in tensors}


def _parse(header: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for name, value in pairs:
            if name in table:
                raise HeaderError(f"its header contains {name!r} twice")
            table[name] = value
        return table

    if not header.startswith(b"{"):
        raise HeaderError("its header does not begin with '{'")
    try:
        entries = json.loads(header.decode("utf8"), object_pairs_hook=unique)
    except HeaderError:
        raise
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"its header is not JSON ({' '.join(str(error).split())})") from None
    if not isinstance(entries, dict):
        raise HeaderError("its header is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError("its __metadata__ is not a table of strings")
    return entries


def _tensor(name: str, entry: Any, path: Path, data: int) -> Tensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"{name!r} lacks one of dtype, shape and data_offsets, or has more")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise HeaderError(f"{name!r} has the dtype {str(dtype)[:20]!r}, which is unknown here")
    if not _are_sizes(shape):
        raise HeaderError(f"{name!r} has a shape that is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HeaderError(f"{name!r} has data_offsets that are not a range")
    tensor = Tensor(name, dtype, tuple(shape), path, data + offsets[0])
    if tensor.nbytes != offsets[1] - offsets[0]:
        raise HeaderError(
            f"{name!r} has {offsets[1] - offsets[0]} bytes of data, its shape and dtype need {_bytes(tensor.nbytes)}"
        )
    return tensor


def _are_sizes(value: Any) -> bool:
    """Whether it is a list of at most 32 sizes (numpy's limit), each of which a file can have."""
    if not isinstance(value, list) or len(value) > 32:
        return False
    return all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def _bytes(count: int) -> str:
    return str(count) if count < 1 << 63 else "more than 2^63"


def _check_cover(tensors: list[Tensor], begin: int, end: int) -> None:
    """The tensors must fill the data from end to end, once."""
    position = begin
    for tensor in tensors:
        if tensor.offset < position:
            raise HeaderError(f"{tensor.name!r} overlaps the tensor before it")
        if tensor.offset > position:
            raise HeaderError(f"a gap of {tensor.offset - position} bytes before {tensor.name!r}")
        position += tensor.nbytes
    if position > end:
        last = tensors[-1].name
        raise HeaderError(f"truncated: {position - end} bytes are missing at the end, of {last!r} or before")
    if position < end:
        raise HeaderError(f"{end - position} bytes at the end belong to no tensor")
