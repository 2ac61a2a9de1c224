"""Libraries and compilers that are missing, old or broken: one line, with the next step."""

from __future__ import annotations

import ctypes.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from plugins.common.errors import UserError
from plugins.libtwofour import bindings, compiler
from tests.support import native


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    native.use_library()


def test_a_missing_gpu_is_reported() -> None:
    if ctypes.util.find_library("cuda"):
        pytest.skip("there is a CUDA driver here")
    with pytest.raises(bindings.LibraryError, match=r"no CUDA GPU here .* engine.backend=torch") as caught:
        bindings.Context(0)
    assert caught.value.status == "no GPU"


def version_or_error(kernel: str, **environment: str) -> str:
    """A library's version in a new process, or the error."""
    code = (
        "from plugins.common import errors\nfrom plugins.libtwofour import bindings\n"
        f"try: print(bindings.version('{kernel}'))\n"
        "except errors.UserError as error: print(error)"
    )
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_libraries_of_the_wheels_are_found() -> None:
    assert bindings.version("cusparselt") >= 801
    assert bindings.version("cublaslt") >= 120000
    assert bindings.version("skinny") == 1


def test_missing_library_names_the_wheel() -> None:
    fragment = version_or_error("cusparselt", TWOFOUR_CUSPARSELT="/nowhere.so")
    assert "/nowhere.so" in fragment
    assert fragment.endswith("pip install nvidia-cusparselt-cu13, or set TWOFOUR_CUSPARSELT")


def test_cusparselt_0_8_0_is_refused(tmp_path: Path) -> None:
    """0.8.0 regressed on H100 and L4. A stand-in library reports that version."""
    names = re.findall(r"F\((cusparseLt\w+)\)", (compiler.SOURCES / "src" / "cusparselt_library.h").read_text())
    stubs = "".join(f"int {name}() {{ return 0; }}\n" for name in names if name != "cusparseLtGetProperty")
    stubs += "int cusparseLtGetProperty(int which, int *value) { *value = which == 1 ? 8 : 0; return 0; }\n"
    (tmp_path / "old.c").write_text(stubs)
    subprocess.run(["gcc", "-shared", "-fPIC", "old.c", "-o", "old.so"], cwd=tmp_path, check=True)
    fragment = version_or_error("cusparselt", TWOFOUR_CUSPARSELT=str(tmp_path / "old.so"))
    assert fragment.startswith("cuSPARSELt 0.8.0 is too old: 0.8.0 is slow on H100 and L4; pip install")
    (tmp_path / "empty.c").write_text("int nothing;\n")
    subprocess.run(["gcc", "-shared", "-fPIC", "empty.c", "-o", "empty.so"], cwd=tmp_path, check=True)
    fragment = version_or_error("cusparselt", TWOFOUR_CUSPARSELT=str(tmp_path / "empty.so"))
    assert "undefined symbol: cusparseLtInit: install a newer version" in fragment


def test_a_missing_library_error_names_the_build_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TWOFOUR_LIBRARY", f"{tmp_path}/libtwofour.so")
    with pytest.raises(UserError, match=r"no '.*libtwofour.so': run `twofour plugins build`"):
        bindings.path()
    monkeypatch.setenv("TWOFOUR_PLUGIN_LIBRARY", f"{tmp_path}/libtwofour_tensorrt.so")
    with pytest.raises(UserError, match=r"libtwofour_tensorrt.so', which this engine's sparse layers need.*LD_PRELOAD"):
        bindings.tensorrt_plugin_path()


@pytest.mark.parametrize(
    ("text", "sm"), [("sm_90a", "90a"), ("90", "90a"), ("9.0", "90a"), ("sm_86", "86"), ("8.9", "89"), ("120", "120a")]
)
def test_architecture_names(text: str, sm: str) -> None:
    assert compiler.parse_sm(text) == sm


@pytest.mark.parametrize(
    ("text", "fragment"), [("75", "'75' has no sparse tensor cores"), ("hopper", "is not a GPU arch")]
)
def test_architecture_that_cannot_be(text: str, fragment: str) -> None:
    with pytest.raises(UserError, match=fragment):
        compiler.parse_sm(text)


def test_compiler_or_headers_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiler, "_include_candidates", list)
    with pytest.raises(UserError, match=r"no cusparseLt\.h found: pip install nvidia-cusparselt-cu13"):
        compiler.find_includes()
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"no NvInfer.h in .*include directory of TensorRT 10"):
        compiler.build(["90"], tensorrt_include=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("sms", [("80", "89"), ("86", "100a", "120a")], ids="-".join)
def test_compiles_without_a_warning(sms: tuple[str, ...]) -> None:
    """Warnings are errors in CMakeLists.txt, for the host and the device compiler."""
    native.compile_library(sms)
