"""The structures of plugins/csrc/include/twofour.h in ctypes. Pointers are plain integers."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_int64, c_uint64, c_void_p
from dataclasses import dataclass

from plugins.common.formats import Format

KERNELS = (
    "skinny",
    "cusparselt",
    "cublaslt",
    "skinny-4of8",
    "skinny-5of8",
    "skinny-6of8",
    "hybrid",
    "hybrid-4of8",
)  # in the order of twofour_kernel
FORMATS = tuple(format.value for format in Format if format.twofour_type is not None)  # in the order of twofour_type


class Gemm(Structure):
    """twofour_gemm: one problem for one kernel."""

    _fields_ = (
        ("kernel", c_int32),
        ("type", c_int32),
        ("out_type", c_int32),
        ("accumulate", c_int32),
        ("tokens", c_int64),
        ("out_features", c_int64),
        ("in_features", c_int64),
        ("scale", c_float),
        ("channel_scales", c_void_p),
        ("bias", c_void_p),
        ("x_pitch", c_int64),
        ("y_pitch", c_int64),
        ("sparse_rows", c_int64),
        ("sparse_inputs", c_int64),
    )


class Algorithm(Structure):
    """twofour_algorithm."""

    _fields_ = (("words", c_uint64 * 8),)


class SearchResult(Structure):
    _fields_ = (("best_us", c_float), ("tried", c_int32), ("over_workspace", c_int32))


class DeviceInfo(Structure):
    _fields_ = (
        ("device", c_int32),
        ("sm", c_int32),
        ("multiprocessors", c_int32),
        ("cusparselt_version", c_int32),
        ("cublaslt_version", c_int32),
        ("l2_bytes", c_int64),
    )


@dataclass(frozen=True)
class Info:
    """The GPU and the libraries on it; versions are 0 where a library cannot be loaded, 801 is cuSPARSELt 0.8.1."""

    device: int
    sm: int
    multiprocessors: int
    cusparselt_version: int
    cublaslt_version: int
    l2_bytes: int


@dataclass(frozen=True)
class Search:
    """A search: time of the chosen algorithm in microseconds; how many were timed, how many left out for memory."""

    best_us: float
    tried: int
    over_workspace: int


def gemm(
    kernel: str,
    format: str,
    out: str,
    out_features: int,
    in_features: int,
    tokens: int = 1,
    scale: float = 1.0,
    channel_scales: int = 0,
    bias: int = 0,
    pitches: tuple[int, int] = (0, 0),
    accumulate: bool = False,
    sparse: tuple[int, int] = (0, 0),
) -> Gemm:
    """A problem from names; `channel_scales` and `bias` are addresses or 0, `pitches` those of x and y.

    `sparse`: of a hybrid kernel, how many of the first rows, or of the first inputs, are sparse; the other is 0.
    """
    types = (FORMATS.index(format), FORMATS.index(out))
    sizes = (tokens, out_features, in_features)
    return Gemm(KERNELS.index(kernel), *types, accumulate, *sizes, scale, channel_scales, bias, *pitches, *sparse)
