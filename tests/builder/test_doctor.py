"""The doctor against machines that lack, stub or break things: fake drivers and libraries, real child processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.doctor import checks, package_probes, probes
from builder.doctor.finding import Finding
from plugins.common import nvidia_smi as gpus


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    for cached in (gpus.gpus, package_probes._version):
        cached.cache_clear()
    yield
    for cached in (gpus.gpus, package_probes._version):
        cached.cache_clear()


def test_examines_this_machine_without_torch() -> None:
    script = "import json, sys; from builder.doctor.checks import examine; found = examine().to_dict()"
    script += "; assert not {'torch', 'transformers', 'modelopt'} & set(sys.modules); print(json.dumps(found))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert '"name": "ModelOpt", "state": "ok"' in done.stdout
    assert '"name": "torch", "able": true' in done.stdout


# GPU


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script that stands for nvidia-smi, first on the PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    script = tmp_path / "nvidia-smi"
    script.touch(mode=0o755)
    return script


def test_an_h100(nvidia_smi: Path) -> None:
    nvidia_smi.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 9.0, 81559, 81000, 580.65'\n")
    assert probes.gpu() == Finding("GPU", "ok", "SM90", "1 x NVIDIA H100 80GB HBM3, SM90, 86 GB, driver 580.65")


def test_a_gpu_without_sparse_tensor_cores(nvidia_smi: Path) -> None:
    nvidia_smi.write_text("#!/bin/sh\necho 'Tesla T4, 7.5, 15360, 15000, 580.65'\n")
    actual = probes.gpu()
    assert (actual.state, actual.version) == ("unfit", "SM75")
    assert "2:4 sparsity needs sparse tensor cores: SM80" in actual.message


@pytest.mark.parametrize("answer", ["sleep 60", "exit 9", "echo garbage", "echo 'H100, [N/A], 1, 1, 1'"])
def test_a_driver_that_is_broken(nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    nvidia_smi.write_text(f"#!/bin/sh\nexec {answer}\n" if answer.startswith("sleep") else f"#!/bin/sh\n{answer}\n")
    monkeypatch.setattr(gpus, "_TIMEOUT", 0.5)
    started = time.perf_counter()
    assert probes.gpu().state == "broken"
    assert time.perf_counter() - started < 10


# Libraries


def test_kernels_that_were_compiled_for_another_gpu(
    nvidia_smi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi.write_text("#!/bin/sh\necho 'NVIDIA B200, 10.0, 183359, 183000, 580.65'\n")
    monkeypatch.setattr(probes, "run_child", lambda command, seconds: (0, ""))  # no such GPU here to load it for
    (tmp_path / "libtwofour.so").touch()
    (tmp_path / "build.json").write_text('{"sms": ["80", "90a"], "nvcc": "13.0.88"}')
    monkeypatch.setenv("TWOFOUR_LIBRARY", str(tmp_path / "libtwofour.so"))
    actual = probes.kernels()
    assert actual.state == "unfit"
    assert actual.message.endswith("for SM 80, 90a, nvcc 13.0.88: not for this GPU")


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the probe looks first for cuSPARSELt."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to make a library")
    path = tmp_path / "libcusparseLt.so.0"
    monkeypatch.setenv("TWOFOUR_CUSPARSELT", str(path))
    return path


def compile_library(path: Path, source: str) -> None:
    subprocess.run(["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", path], input=source, text=True, check=True)


def property_source(version: tuple[int, int, int]) -> str:
    numbers = ", ".join(map(str, version))
    return f"""extern "C" int cusparseLtGetProperty(int part, int *value) {{
        static const int numbers[] = {{{numbers}}}; *value = numbers[part]; return 0; }}"""


def test_a_cusparselt_that_is_too_old(library: Path) -> None:
    compile_library(library, property_source((0, 7, 1)))
    actual = probes.cusparselt()
    assert (actual.state, actual.version) == ("unfit", "0.7.1")
    assert actual.fix == "pip install 'nvidia-cusparselt-cu13>=0.8.1'"


def test_the_cusparselt_that_is_wanted(library: Path) -> None:
    compile_library(library, property_source((0, 9, 0)))
    assert probes.cusparselt() == Finding("cuSPARSELt", "ok", "0.9.0", str(library))


def test_a_cusparselt_that_crashes_does_not_take_the_doctor_along(library: Path) -> None:
    compile_library(library, "#include <cstdlib>\nstruct Bad { Bad() { abort(); } } bad;")
    assert probes.cusparselt().state == "broken"


# Packages


def install(site: Path, name: str, version: str, *files: str) -> None:
    module = name.replace("-", "_")
    for file in ("__init__.py", *files):
        (site / module / file).parent.mkdir(parents=True, exist_ok=True)
        (site / module / file).touch()
    information = site / f"{module}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_the_stub_that_pypi_serves_for_tensorrt_llm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "tensorrt-llm", "1.2.1")
    monkeypatch.syspath_prepend(tmp_path)
    actual = package_probes.tensorrt_llm()
    assert (actual.state, actual.version, actual.message) == (
        "broken",
        "1.2.1",
        "a stub: the package holds no bindings",
    )


@pytest.mark.parametrize(
    ("version", "state", "fragment"),
    [("1.2.1", "ok", ""), ("0.20.0", "unfit", "older than 1.0"), ("1.3.0", "ok", "1.2 is the last with engines")],
)
def test_releases_of_tensorrt_llm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, state: str, fragment: str
) -> None:
    install(tmp_path, "tensorrt-llm", version, "bindings.cpython-312-x86_64-linux-gnu.so")
    monkeypatch.syspath_prepend(tmp_path)
    actual = package_probes.tensorrt_llm()
    assert actual.state == state
    assert fragment in actual.message


def test_a_tensorrt_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "tensorrt", "10.14.1")
    monkeypatch.syspath_prepend(tmp_path)
    assert package_probes.tensorrt().state == "broken"


def test_a_pyarrow_that_refuses_numpy_makes_modelopt_drop_its_plugins(tmp_path: Path) -> None:
    """As with pyarrow 22 and numpy 1.26: ModelOpt only warns, and then quantizes less than it was asked to."""
    (tmp_path / "pyarrow").mkdir()
    (tmp_path / "pyarrow" / "__init__.py").write_text("raise ImportError('pyarrow requires numpy 2')\n")
    actual = package_probes.modelopt({**os.environ, "PYTHONPATH": str(tmp_path)})
    assert actual.state == "broken"
    assert "transformers plugins did not load" in actual.message
    assert "pyarrow requires numpy 2" in actual.message
    assert "pip install 'twofour[calibrate]'" in actual.fix


def test_a_modelopt_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so: cannot open')\n")
    actual = package_probes.modelopt({**os.environ, "PYTHONPATH": str(tmp_path)})
    assert actual.state == "broken"
    assert "libtorch.so: cannot open" in actual.message


# Any probe


def test_a_probe_that_fails_is_a_finding() -> None:
    def odd() -> Finding:
        raise RuntimeError("on\nfire")

    assert probes.run(odd) == Finding(
        "odd", "broken", None, "the probe failed (RuntimeError: on fire)", "report this as a bug"
    )


def test_a_child_that_hangs_is_killed_with_what_it_started() -> None:
    started = time.perf_counter()
    assert probes.run_child(["sh", "-c", "sleep 60 & sleep 60"], 0.5) == (None, "")
    assert time.perf_counter() - started < 10


def test_every_need_names_a_probe() -> None:
    names = {"Python", "GPU", "CUDA driver", "cuSPARSELt", "libtwofour", "torch", "transformers", "ModelOpt"}
    names |= {"TensorRT-LLM", "TensorRT", "Triton", "nvcc", "C++ compiler", "disk", "memory"}
    assert len(probes.PROBES) == len(names)
    assert {need for needs in (*checks.NEEDS.values(), checks.KERNELS) for need in needs} <= names


# What follows


def findings(**states: str) -> list[Finding]:
    names = {need for needs in (*checks.NEEDS.values(), checks.KERNELS) for need in needs}
    versions = {"TensorRT-LLM": "1.2.1", "GPU": "SM90"}
    actual = {name: Finding(name, "ok", versions.get(name)) for name in names}
    for key, state in states.items():
        name = {"gpu": "GPU", "llm": "TensorRT-LLM", "trt": "TensorRT", "lt": "cuSPARSELt"}.get(key, key)
        if state[0].isdigit() or state.startswith("SM"):
            actual[name] = Finding(name, "ok", state)
        else:
            actual[name] = Finding(name, state, None, f"{name} is {state}", f"get {name}")  # type: ignore[arg-type]
    return list(actual.values())


@pytest.mark.parametrize(
    ("states", "able", "missing"),
    [
        ({}, ["tensorrt", "pytorch", "torch"], {}),
        ({"gpu": "missing", "llm": "missing", "trt": "missing"}, ["torch"],
         {"tensorrt": "GPU: GPU is missing", "pytorch": "GPU: GPU is missing"}),
        ({"llm": "broken"}, ["torch"],
         {"tensorrt": "TensorRT-LLM: TensorRT-LLM is broken", "pytorch": "TensorRT-LLM: TensorRT-LLM is broken"}),
        ({"trt": "missing"}, ["pytorch", "torch"], {"tensorrt": "TensorRT: TensorRT is missing"}),
        ({"llm": "1.3.0"}, ["pytorch", "torch"],
         {"tensorrt": "TensorRT-LLM: TensorRT-LLM 1.3.0 is newer than 1.2, the last that builds TensorRT engines"}),
        ({"torch": "missing"}, ["tensorrt", "pytorch"], {"torch": "torch: torch is missing"}),
        ({"torch": "unfit"}, ["tensorrt", "pytorch", "torch"], {}),
    ],
)  # fmt: skip
def test_which_backends_run_and_the_one_thing_that_each_other_lacks(
    states: dict[str, str], able: list[str], missing: dict[str, str]
) -> None:
    actual = checks.Examination((), checks.abilities(findings(**states))).backends
    assert [ability.name for ability in actual if ability.able] == able
    assert {ability.name: ability.missing for ability in actual if not ability.able} == missing
    assert all(ability.fix for ability in actual if not ability.able)


@pytest.mark.parametrize(
    ("sm", "backend", "fragment"),
    [
        ("SM90", "tensorrt", "2:4 layers in bf16, fp8, int8"),
        ("SM90", "pytorch", "2:4 layers in bf16, fp8; not int8: the PyTorch backend of TensorRT-LLM has no INT8 W8A8"),
        ("SM100", "tensorrt", "2:4 layers in bf16, fp8; not int8: TensorRT-LLM rejects SmoothQuant INT8 on SM100"),
        ("SM80", "tensorrt", "2:4 layers in bf16, int8; not fp8: FP8 needs FP8 tensor cores: SM89"),
    ],
)
def test_the_formats_are_those_of_the_compatibility_table(sm: str, backend: str, fragment: str) -> None:
    notes = {ability.name: ability.note for ability in checks.abilities(findings(gpu=sm))}
    assert notes[backend].startswith(fragment)


def test_the_torch_backend_reports_why_its_kernels_cannot_run() -> None:
    notes = {ability.name: ability.note for ability in checks.abilities(findings(lt="missing"))}
    reason = "cuSPARSELt: cuSPARSELt is missing"
    assert notes["torch"] == f"sparse layers run the reference numerics, without speed-up: {reason}"
    notes = {ability.name: ability.note for ability in checks.abilities(findings())}
    assert notes["torch"] == "sparse layers run on our CUDA kernels"
