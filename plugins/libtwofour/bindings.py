"""libtwofour through ctypes: loading it, its statuses as UserErrors, one Context a device. Imports no torch.

The structures mirror plugins/csrc/include/twofour.h. Pointers are plain integers; whoever calls keeps the memory alive.
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from functools import cache
from pathlib import Path

from plugins.common.errors import UserError
from plugins.libtwofour.structures import (
    FORMATS,
    KERNELS,
    Algorithm,
    DeviceInfo,
    Gemm,
    Info,
    Search,
    SearchResult,
)

HOST = -1
VERSION = 103  # TWOFOUR_VERSION of the header that structures.py mirrors
OLDEST_CUSPARSELT = 801  # 0.8.1; TWOFOUR_CUSPARSELT_OLDEST=800 accepts an older one for measuring, never for shipping
MAX_ALGORITHMS = 512  # of one problem; cuSPARSELt has about 80
STATUSES = (
    "ok",
    "invalid argument",
    "not 2:4",
    "misaligned",
    "no GPU",
    "SM unsupported",
    "library missing",
    "library too old",
    "wrong build",
    "out of memory",
    "workspace too small",
    "not planned",
    "unsupported",
    "CUDA error",
    "cuSPARSELt error",
    "cuBLASLt error",
)


class LibraryError(UserError):
    """A status of libtwofour that is not ok; `status` is its name in STATUSES."""

    def __init__(self, status: int, message: str) -> None:
        self.status = STATUSES[status] if status < len(STATUSES) else str(status)
        super().__init__(message or self.status)


def path() -> Path:
    """Where libtwofour.so is: $TWOFOUR_LIBRARY, else what `twofour plugins build` left. Raises UserError."""
    chosen = Path(os.environ.get("TWOFOUR_LIBRARY") or Path(__file__).parents[1] / "lib" / "libtwofour.so")
    if not chosen.exists():
        raise UserError(f"no '{chosen}'", "run `twofour plugins build`, or set TWOFOUR_LIBRARY")
    return chosen


def tensorrt_plugin_path() -> Path:
    """Where the TensorRT plugin is. Raises UserError with how to build and load it."""
    chosen = Path(
        os.environ.get("TWOFOUR_PLUGIN_LIBRARY") or Path(__file__).parents[1] / "lib" / "libtwofour_tensorrt.so"
    )
    if not chosen.exists():
        raise UserError(
            f"no '{chosen}', which this engine's sparse layers need: TENSORRT_INCLUDE=... twofour plugins build, then "
            "load it before the engine (LD_PRELOAD, or IPluginRegistry::loadLibrary)"
        )
    return chosen


@cache
def load() -> ctypes.CDLL:
    """The library, loaded once. Raises UserError where it is not built."""
    _point_at_wheels()
    return open_library(path())


def open_library(file: Path) -> ctypes.CDLL:
    """A library's functions with their argument types. Raises UserError where the file cannot be loaded."""
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:
        raise UserError(f"cannot load '{file}' ({error}): run `twofour plugins build`") from error
    try:
        _declare(library)
    except AttributeError as error:
        raise UserError(f"'{file}' has another version ({error}): run `twofour plugins build`") from error
    return library


def _declare(library: ctypes.CDLL) -> None:
    """Gives the functions their argument types."""
    if library.twofour_version() != VERSION:
        raise AttributeError(f"{library.twofour_version()}, not {VERSION}")
    library.twofour_last_error.restype = c_char_p
    library.twofour_destroy.restype = None
    library.twofour_destroy.argtypes = (c_void_p,)
    problem, pointer, number = POINTER(Gemm), c_void_p, c_int64
    signatures: dict[str, tuple[object, ...]] = {
        "library_version": (c_int, POINTER(c_int32)),
        "create": (c_int, POINTER(c_void_p)),
        "get_info": (pointer, POINTER(DeviceInfo)),
        "weight_bytes": (pointer, problem, POINTER(c_size_t)),
        "prepare_weight": (pointer, problem, pointer, pointer, pointer),
        "plan": (pointer, problem),
        "workspace_bytes": (pointer, problem, POINTER(c_size_t)),
        "search": (pointer, problem, *[pointer] * 4, c_size_t, pointer, c_size_t, pointer, POINTER(SearchResult)),
        "list_algorithms": (pointer, problem, pointer, c_int32, POINTER(c_int32)),
        "get_algorithm": (pointer, problem, POINTER(Algorithm)),
        "set_algorithm": (pointer, problem, POINTER(Algorithm)),
        "quantize": (pointer, c_int, c_int, number, number, pointer, pointer, number, pointer, pointer),
        "matmul": (pointer, problem, *[pointer] * 4, c_size_t, pointer),
    }
    for name, arguments in signatures.items():
        getattr(library, f"twofour_{name}").argtypes = arguments


def version(kernel: str) -> int:
    """The version of what `kernel` runs on, read without a GPU: 801 is cuSPARSELt 0.8.1.

    Raises UserError where it is missing or too old.
    """
    number = c_int32()
    _check(load().twofour_library_version(KERNELS.index(kernel), byref(number)))
    return number.value


class Context:
    """One device; HOST simulates the skinny kernel. Methods mirror the C functions of the same names."""

    def __init__(self, device: int) -> None:
        self._library = load()
        self._handle = c_void_p()
        self._call("create", device, byref(self._handle), handle=False)

    def close(self) -> None:
        """Frees the context; only after all work on it has finished."""
        self._library.twofour_destroy(self._handle)
        self._handle = c_void_p()

    def info(self) -> Info:
        info = DeviceInfo()
        self._call("get_info", byref(info))
        return Info(*(getattr(info, name) for name, _ in DeviceInfo._fields_))

    def weight_bytes(self, problem: Gemm) -> int:
        return self._size("weight_bytes", problem)

    def workspace_bytes(self, problem: Gemm) -> int:
        return self._size("workspace_bytes", problem)

    def prepare_weight(self, problem: Gemm, weight: int, prepared: int, stream: int = 0) -> None:
        self._call("prepare_weight", byref(problem), weight, prepared, stream)

    def plan(self, problem: Gemm) -> None:
        self._call("plan", byref(problem))

    def search(
        self,
        problem: Gemm,
        x: int,
        prepared: int,
        y: int,
        workspace: tuple[int, int],
        flush: tuple[int, int] = (0, 0),
        stream: int = 0,
    ) -> Search:
        """`workspace` and `flush` are (address, bytes)."""
        result = SearchResult()
        self._call("search", byref(problem), x, prepared, y, *workspace, *flush, stream, byref(result))
        return Search(result.best_us, result.tried, result.over_workspace)

    def algorithms(self, problem: Gemm) -> list[tuple[int, ...]]:
        """All algorithms of the problem's kernel that a search would try."""
        listed, count = (Algorithm * MAX_ALGORITHMS)(), c_int32()
        self._call("list_algorithms", byref(problem), listed, MAX_ALGORITHMS, byref(count))
        return [tuple(algorithm.words) for algorithm in listed[: min(count.value, MAX_ALGORITHMS)]]

    def algorithm(self, problem: Gemm) -> tuple[int, ...]:
        algorithm = Algorithm()
        self._call("get_algorithm", byref(problem), byref(algorithm))
        return tuple(algorithm.words)

    def set_algorithm(self, problem: Gemm, values: tuple[int, ...]) -> None:
        self._call("set_algorithm", byref(problem), byref(Algorithm((c_uint64 * 8)(*values))))

    def quantize(
        self,
        format: str,
        x_format: str,
        shape: tuple[int, int],
        x: int,
        multiplier: tuple[int, int],
        q: int,
        stream: int = 0,
    ) -> None:
        """`shape` is (tokens, in_features), `multiplier` (address, count)."""
        types = FORMATS.index(format), FORMATS.index(x_format)
        self._call("quantize", *types, *shape, x, *multiplier, q, stream)

    def matmul(
        self, problem: Gemm, x: int, prepared: int, y: int, workspace: tuple[int, int] = (0, 0), stream: int = 0
    ) -> None:
        self._call("matmul", byref(problem), x, prepared, y, *workspace, stream)

    def _size(self, name: str, problem: Gemm) -> int:
        size = c_size_t()
        self._call(name, byref(problem), byref(size))
        return size.value

    def _call(self, name: str, *arguments: object, handle: bool = True) -> None:
        first = (self._handle,) if handle else ()
        _check(getattr(self._library, f"twofour_{name}")(*first, *arguments))


def _check(status: int) -> None:
    if status != 0:
        raise LibraryError(status, load().twofour_last_error().decode(errors="replace"))


@cache
def context(device: int) -> Context:
    """The context of a device that all of this process share."""
    return Context(device)


def _point_at_wheels() -> None:
    """Lets the library find cuSPARSELt and cuBLASLt in the PyPI wheels, where the loader does not look by itself."""
    for variable, pattern in (
        ("TWOFOUR_CUSPARSELT", "nvidia/*/lib/libcusparseLt.so.0"),
        ("TWOFOUR_CUBLASLT", "nvidia/*/lib/libcublasLt.so.1[23]"),
    ):
        if variable not in os.environ:
            files = [file for entry in sys.path if entry for file in sorted(Path(entry).glob(pattern))]
            if files:
                os.environ[variable] = str(files[0])
