"""One probe for each thing of the machine that a build may need, and the list of all probes.

Each is bounded in time and always returns a Finding.

What could hang or crash (a driver, a library, the import of a large package) runs in a child process.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from builder.doctor.finding import Finding, run_child
from builder.doctor.package_probes import modelopt, tensorrt, tensorrt_llm, torch, transformers, triton
from builder.hardware import machine
from builder.planning.compatibility import check
from plugins.common.errors import UserError
from plugins.common.json_files import read_json
from plugins.common.nvidia_smi import gpus
from plugins.libtwofour.bindings import OLDEST_CUSPARSELT

DISK_BYTES = 20 << 30
SECONDS = 20  # a driver or a library


def python() -> Finding:
    return Finding("Python", "ok", platform.python_version(), sys.executable)


def gpu() -> Finding:
    """The GPUs, by their driver."""
    if cards := gpus():
        first = cards[0]
        detail = f"{len(cards)} x {first.name}, SM{first.sm}, {first.memory_total / 1e9:.0f} GB, driver {first.driver}"
        verdict = check("bf16", True, "torch", first.sm)
        if not verdict.ok:
            return Finding("GPU", "unfit", f"SM{first.sm}", f"{detail}: {verdict.reason}", "use SM80 (A100) or newer")
        return Finding("GPU", "ok", f"SM{first.sm}", detail)
    if shutil.which("nvidia-smi") is None:
        return Finding("GPU", "missing", None, "no nvidia-smi", "use a machine with an NVIDIA GPU and its driver")
    return Finding(
        "GPU", "broken", None, "nvidia-smi finds no GPU, or does not respond", "run nvidia-smi and fix the driver"
    )


def cuda() -> Finding:
    """The newest CUDA that the driver can run."""
    script = "import ctypes; v = ctypes.c_int(); d = ctypes.CDLL('libcuda.so.1')"
    script += "; assert d.cuDriverGetVersion(ctypes.byref(v)) == 0; print(v.value)"
    code, output = run_child([sys.executable, "-c", script], SECONDS)
    if code == 0 and output.isdigit():
        return Finding("CUDA driver", "ok", f"{int(output) // 1000}.{int(output) % 1000 // 10}")
    return Finding("CUDA driver", "missing", None, "libcuda.so.1 cannot be loaded", "install NVIDIA's driver")


def cusparselt() -> Finding:
    """The version that the library reports; wheels and toolkits name it differently."""
    script = """
import ctypes, sys
for name in sys.argv[1:]:
    try: library = ctypes.CDLL(name)
    except OSError: continue
    value, parts = ctypes.c_int(), []
    for part in range(3):
        library.cusparseLtGetProperty(part, ctypes.byref(value)); parts.append(value.value)
    print(*parts, name); break
"""
    wheels = [str(path) for place in sys.path if place for path in Path(place).glob("nvidia/*/lib/libcusparseLt.so.0")]
    named = [os.environ[name] for name in ("TWOFOUR_CUSPARSELT",) if os.environ.get(name)]
    code, output = run_child([sys.executable, "-c", script, *named, *wheels, "libcusparseLt.so.0"], SECONDS)
    fix = "pip install 'nvidia-cusparselt-cu13>=0.8.1'"
    if code != 0:
        return Finding("cuSPARSELt", "broken", None, "the library crashes when its version is read", fix)
    if not output:
        return Finding("cuSPARSELt", "missing", None, "no libcusparseLt.so.0 that loads", fix)
    major, minor, patch, path = output.split(maxsplit=3)
    version = (int(major), int(minor), int(patch))
    if 1000 * version[0] + 100 * version[1] + version[2] < OLDEST_CUSPARSELT:
        reason = "older than 0.8.1, which the kernels need"
        return Finding("cuSPARSELt", "unfit", ".".join(map(str, version)), reason, fix)
    return Finding("cuSPARSELt", "ok", ".".join(map(str, version)), path)


def kernels() -> Finding:
    """Our own CUDA library."""
    from plugins.libtwofour import bindings

    try:
        path = bindings.path()
    except UserError as error:
        return Finding("libtwofour", "missing", None, error.message, "twofour plugins build")
    code, _ = run_child(
        [sys.executable, "-c", "import plugins.libtwofour.bindings; plugins.libtwofour.bindings.load()"], SECONDS
    )
    if code != 0:
        return Finding("libtwofour", "broken", None, f"'{path}' cannot be loaded", "twofour plugins build")
    try:
        built = read_json(path.parent / "build.json")
        sms, detail = built["sms"], f"{path}, for SM {', '.join(built['sms'])}, nvcc {built['nvcc']}"
    except (OSError, ValueError, KeyError, TypeError):  # a library that this command did not build has no record
        return Finding("libtwofour", "ok", None, str(path))
    if gpus() and not any(sm.rstrip("af") == str(gpus()[0].sm) for sm in sms):
        return Finding("libtwofour", "unfit", None, f"{detail}: not for this GPU", "twofour plugins build")
    return Finding("libtwofour", "ok", None, detail)


def nvcc() -> Finding:
    from plugins.libtwofour.compiler import find_nvcc

    try:
        path = find_nvcc()
    except UserError as error:
        return Finding("nvcc", "missing", None, error.message, error.hint)
    return _compiler("nvcc", path, r"release [\d.]+, V([\d.]+)")


def cxx() -> Finding:
    path = shutil.which(os.environ.get("CXX", "g++"))
    if path is None:
        return Finding("C++ compiler", "missing", None, "no g++", "install g++ (apt-get install g++)")
    return _compiler("C++ compiler", path, r"(\d+\.\d+\.\d+)")


def disk(place: Path | None = None) -> Finding:
    """Free space where builds are written."""
    place = place or Path.cwd()
    free = shutil.disk_usage(place).free
    detail = f"{free / 1e9:.0f} GB free at '{place}'"
    if free < DISK_BYTES:
        return Finding(
            "disk",
            "unfit",
            None,
            detail,
            "a model of 8B parameters takes about 60 GB: free space, or choose another --store",
        )
    return Finding("disk", "ok", None, detail)


def memory() -> Finding:
    total, available = machine.main_memory()
    return Finding("memory", "ok", None, f"{available / 1e9:.0f} of {total / 1e9:.0f} GB available")


PROBES: Sequence[Callable[[], Finding]] = (
    python, gpu, cuda, cusparselt, kernels, torch, transformers, modelopt, tensorrt_llm, tensorrt, triton, nvcc, cxx,
    disk, memory,
)  # fmt: skip


def run(probe: Callable[[], Finding]) -> Finding:
    """The result of `probe`; a bug in it becomes a finding."""
    try:
        return probe()
    except Exception as error:
        reason = f"the probe failed ({type(error).__name__}: {error})"
        return Finding(probe.__name__, "broken", None, " ".join(reason.split()), "report this as a bug")


def _compiler(name: str, path: str, pattern: str) -> Finding:
    code, output = run_child([path, "--version"], SECONDS)
    match = re.search(pattern, output)
    if code != 0 or match is None:
        return Finding(name, "broken", None, f"'{path}' reports no version", "install it again")
    return Finding(name, "ok", match[1], path)
