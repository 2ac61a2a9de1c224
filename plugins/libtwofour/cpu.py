"""libtwofour_cpu through ctypes: built at first use where it is not yet. Imports no torch.

The structures mirror plugins/csrc/cpu/twofour_cpu.h. Pointers are plain integers; whoever calls keeps the memory alive.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from functools import cache
from pathlib import Path

from plugins.common.errors import UserError
from plugins.common.patterns import PATTERNS, short_name
from plugins.libtwofour import cpu_compiler

ISAS = ("portable", "avx2", "avx512")
FORMS = tuple(f"{dtype}{kept}" for dtype in ("int8", "bf16") for kept in ("", *(f"-{short_name(p)}" for p in PATTERNS)))
TYPES = ("float32", "bfloat16")
AXES = ("rows", "inputs")
ROUNDINGS = ("as is", "int8", "int8 each token", "fp8")


class Linear(Structure):
    """twofour_cpu_linear."""


Linear._fields_ = (
    ("form", c_int32),
    ("axis", c_int32),
    ("out_features", c_int64),
    ("in_features", c_int64),
    ("weight", c_void_p),
    ("scales", c_void_p),
    ("scale", c_float),
    ("rounding", c_int32),
    ("multiplier", c_void_p),
    ("multipliers", c_int64),
    ("bias", c_void_p),
    ("rest", POINTER(Linear)),
)


class Block(Structure):
    """twofour_cpu_block."""

    _fields_ = (
        *((name, POINTER(Linear)) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, c_void_p) for name in ("first_norm", "second_norm", "q_norm", "k_norm")),
        *((name, c_float) for name in ("attention_scale", "v_scale", "k_multiplier", "v_multiplier")),
        ("window", c_int64),
        ("keys", c_void_p),
        ("values", c_void_p),
    )


class Step(Structure):
    """twofour_cpu_step."""

    _fields_ = (
        ("type", c_int32),
        ("cache_int8", c_int32),
        *((name, c_int64) for name in ("tokens", "hidden", "heads", "kv_heads", "head_dim", "intermediate")),
        ("eps", c_float),
        ("reserved", c_int32),
        *((name, c_void_p) for name in ("cos", "sin", "final_norm", "positions", "table")),
        ("table_stride", c_int64),
        ("page_size", c_int64),
    )


class Attention(Structure):
    """twofour_cpu_attention."""

    _fields_ = (
        *((name, c_int64) for name in ("sequences", "queries", "keys", "heads", "kv_heads", "head_dim", "window")),
        *((name, c_float) for name in ("scale", "v_scale")),
        *((name, c_void_p) for name in ("q", "k", "v", "out")),
        *((name, c_int64 * 3) for name in ("q_strides", "k_strides", "v_strides")),
    )


def library_file() -> Path:
    """$TWOFOUR_CPU_LIBRARY, else what was built of these sources, else built now.

    Raises UserError where there is no compiler, or the compilation fails.
    """
    named = os.environ.get("TWOFOUR_CPU_LIBRARY")
    return Path(named) if named else cpu_compiler.built() or cpu_compiler.build()


@cache
def load() -> ctypes.CDLL:
    """The library, loaded once. Raises UserError as `library_file` does, and where the file cannot be loaded."""
    file = library_file()
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:
        raise UserError(f"cannot load '{file}' ({error})", "run `twofour plugins build`") from error
    library.twofour_cpu_last_error.restype = c_char_p
    linear, size = POINTER(Linear), (c_int, c_int64, c_int64)
    signatures: dict[str, tuple[object, tuple[object, ...]]] = {
        "use_isa": (c_int, (c_int,)),
        "set_threads": (c_int, (c_int,)),
        "weight_bytes": (c_size_t, size),
        "pack": (c_int, (*size, c_void_p, c_void_p, c_void_p)),
        "unpack": (c_int, (*size, c_void_p, c_void_p)),
        "matmul_int8": (c_int, (linear, c_int64, c_void_p, c_void_p, c_int, c_void_p)),
        "apply": (c_int, (linear, c_int64, c_int, c_void_p, c_void_p)),
        "apply_all": (c_int, (POINTER(linear), c_int, c_int64, c_int, c_void_p, POINTER(c_void_p))),
        "rows": (c_int, (linear, c_int64, c_void_p, c_void_p)),
        "decode": (c_int, (POINTER(Step), POINTER(Block), c_int, c_void_p)),
        "before_attention": (c_int, (POINTER(Step), POINTER(Block), *[c_void_p] * 5)),
        "after_attention": (c_int, (POINTER(Step), POINTER(Block), *[c_void_p] * 3)),
        "final_norm": (c_int, (POINTER(Step), *[c_void_p] * 3)),
        "attend_prompts": (c_int, (POINTER(Attention),)),
        "read": (c_uint64, (c_void_p, c_size_t)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"twofour_cpu_{name}")
        function.restype, function.argtypes = result, arguments
    return library


def is_loaded() -> bool:
    """Whether this process has loaded the library: nothing is compiled to find out."""
    return load.cache_info().currsize > 0


def isa() -> str:
    """The instruction set in use, one of ISAS."""
    return ISAS[load().twofour_cpu_isa_in_use()]


def use_isa(name: str) -> None:
    """Takes a lesser instruction set than the best, or the best again. Raises UserError where there is no such here."""
    check(load().twofour_cpu_use_isa(ISAS.index(name)))


def has_bf16() -> bool:
    """Whether bfloat16 products have instructions of their own."""
    return bool(load().twofour_cpu_has_bf16())


def set_threads(threads: int) -> int:
    """How many threads share a product; those in use, which are never more than the processors of this process."""
    return int(load().twofour_cpu_set_threads(threads))


def weight_bytes(form: str, out_features: int, in_features: int) -> int:
    """Bytes of a packed weight."""
    return int(load().twofour_cpu_weight_bytes(FORMS.index(form), out_features, in_features))


def pack(form: str, shape: tuple[int, int], values: int, positions: int, packed: int) -> None:
    """Packs a weight of `shape` (out_features, in_features); `positions` is 0 for a dense form."""
    check(load().twofour_cpu_pack(FORMS.index(form), *shape, values, positions or None, packed))


def unpack(form: str, shape: tuple[int, int], packed: int, weight: int) -> None:
    """Writes the dense weight of a packed one."""
    check(load().twofour_cpu_unpack(FORMS.index(form), *shape, packed, weight))


def check(status: int) -> None:
    """Raises UserError with the library's message where `status` is not 0."""
    if status != 0:
        raise UserError(load().twofour_cpu_last_error().decode(errors="replace"))
