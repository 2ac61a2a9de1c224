"""The TensorRT plugin, driven through TensorRT's own interfaces without libnvinfer, its kernels simulated on the CPU.

Runs where TENSORRT_INCLUDE names the public headers of TensorRT 10.
"""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

import native
import pytest

from plugins import build

HARNESS = build.SOURCES / "tensorrt" / "harness"
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
