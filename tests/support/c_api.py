"""Functions of libtwofour that C++ code calls and Python does not: check, unpack_weight and stamps."""

from __future__ import annotations

from ctypes import Structure, byref, c_int32, c_int64, c_void_p

from plugins.libtwofour.bindings import Context, LibraryError
from plugins.libtwofour.structures import FORMATS, Gemm


class Stamp(Structure):
    """twofour_stamp: what a prepared weight was made for."""

    _fields_ = (
        ("kernel", c_int32),
        ("type", c_int32),
        ("out_features", c_int64),
        ("in_features", c_int64),
        ("sm", c_int32),
        ("version", c_int32),
    )


def first_violation(
    context: Context, format: str, out_features: int, in_features: int, weight: int
) -> tuple[int, int] | None:
    """(row, group) of the first group with more than 2 nonzeros, or None."""
    row, group = c_int64(-1), c_int64(-1)
    shape = c_int64(out_features), c_int64(in_features)
    try:
        context._call("check", FORMATS.index(format), *shape, c_void_p(weight), None, byref(row), byref(group))
    except LibraryError as error:
        if error.status != "not 2:4":
            raise
        return row.value, group.value
    return None


def unpack_weight(context: Context, problem: Gemm, prepared: int, weight: int) -> None:
    context._call("unpack_weight", byref(problem), c_void_p(prepared), c_void_p(weight), None)


def get_stamp(context: Context, problem: Gemm) -> Stamp:
    stamp = Stamp()
    context._call("get_stamp", byref(problem), byref(stamp))
    return stamp


def check_stamp(context: Context, problem: Gemm, stamp: Stamp) -> None:
    context._call("check_stamp", byref(problem), byref(stamp))
