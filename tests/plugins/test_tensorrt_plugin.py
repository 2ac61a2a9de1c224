"""The TensorRT plugin, driven through TensorRT's own interfaces without libnvinfer, its kernels simulated on the CPU.

Runs where TENSORRT_INCLUDE names the public headers of TensorRT 10.
"""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

import pytest

from plugins.libtwofour import compiler
from tests.support import native, stand_in_gpu

HARNESS = Path(__file__).parents[1] / "tensorrt_harness"
INCLUDE = os.environ.get("TENSORRT_INCLUDE", "")

pytestmark = pytest.mark.skipif(not INCLUDE, reason="TENSORRT_INCLUDE does not name TensorRT's headers")


@cache
def directory() -> Path:
    """The compiled plugin, the harness, and stand-ins for libnvinfer and for a library that is linked to it."""
    out = native.compile_library(("90a",), INCLUDE)
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    common = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-deprecated-declarations"]
    search = ["-isystem", INCLUDE, "-isystem", str(cuda)]
    for source, name, *options in (
        ("harness.cpp", "harness", "-ldl"),
        ("nvinfer.cpp", "libnvinfer.so.10", "-shared", "-fPIC", "-Wl,-soname,libnvinfer.so.10"),
        ("binding.cpp", "binding.so", "-shared", "-fPIC", str(out / "libnvinfer.so.10"), "-Wl,-rpath,$ORIGIN"),
    ):
        subprocess.run([*common, *search, str(HARNESS / source), "-o", str(out / name), *options], check=True)
    return out


def run(*arguments: object, **environment: str) -> str:
    done = subprocess.run(
        [str(directory() / "harness"), *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_call_that_tensorrt_makes() -> None:
    """Shapes, formats, tactics, serialising, clones, contexts, enqueue against plain arithmetic, and bad fields."""
    plugin = directory() / "libtwofour_tensorrt.so"
    assert run(plugin, TWOFOUR_PLUGIN_DEVICE="host") == "all checks passed"


def test_every_tactic_on_a_stand_in_gpu() -> None:
    """The same checks with a CUDA runtime, cuSPARSELt and cuBLASLt of the tests' own behind the plugin."""
    libraries = stand_in_gpu.directory()
    plugin = libraries / "libtwofour_tensorrt.so"
    sources = [*(compiler.SOURCES / "src").glob("*.cpp"), *(compiler.SOURCES / "tensorrt").glob("*.cpp")]
    search = [f"-I{compiler.SOURCES / part}" for part in ("include", "src")]
    search += [
        word for path in (INCLUDE, *compiler.find_includes(), "/usr/local/cuda/include") for word in ("-isystem", path)
    ]
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", *search, *sources]
    subprocess.run([*map(str, command), str(stand_in_gpu.HERE / "cuda.cpp"), "-o", str(plugin), "-ldl"], check=True)
    names = {"TWOFOUR_CUSPARSELT": "libcusparselt.so", "TWOFOUR_CUBLASLT": "libcublaslt.so"}
    assert run(plugin, **{name: str(libraries / file) for name, file in names.items()}) == "all checks passed"


def test_preloaded_it_registers_when_tensorrt_arrives_later() -> None:
    binding = directory() / "binding.so"
    assert run("--open", binding) == "0"
    assert run("--open", binding, LD_PRELOAD=str(directory() / "libtwofour_tensorrt.so")) == "1"


def test_preloaded_into_any_other_program_it_is_silent() -> None:
    done = subprocess.run(
        ["true"], env={**os.environ, "LD_PRELOAD": str(directory() / "libtwofour_tensorrt.so")}, capture_output=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_exports_its_entry_points_only() -> None:
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", str(directory() / "libtwofour_tensorrt.so")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert {line.split()[-1] for line in listed.splitlines()} == {
        "getCreators",
        "setLoggerFinder",
        "initTwofourPlugins",
        "createInferRuntime_INTERNAL",
        "createInferBuilder_INTERNAL",
    }
