"""A GPU of the tests' own: libtwofour on stand-ins for the CUDA runtime, cuSPARSELt and cuBLASLt (stand_in_cuda/), and
torch's CPU tensors as its memory."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from builder.engines import measured_tactics
from plugins.autotune import choice, timing, tuner
from plugins.common.nvidia_smi import Gpu
from plugins.libtwofour import bindings, compiler, hybrid_ops, torch_ops
from tests.support import native

HERE = Path(__file__).parents[1] / "stand_in_cuda"
CPU = torch.device("cpu")
FACTS = {"name": "Stand-in", "sm": 90, "driver": None, "clocks": {"sm": 1980.0}}


@cache
def directory() -> Path:
    """libtwofour without its device code, and the stand-ins. Skips where a header is missing."""
    sources = [
        *sorted(HERE.iterdir()),
        *sorted((compiler.SOURCES / "src").iterdir()),
        compiler.SOURCES / "include/twofour.h",
    ]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    out = native.ROOT / "build" / f"stand-in-{digest}"
    if not (out / "libcublaslt.so").exists():
        try:
            includes = [*compiler.find_includes(), Path("/usr/local/cuda/include")]
        except bindings.UserError as error:
            pytest.skip(f"the stand-ins cannot be compiled here: {error}")
        out.mkdir(parents=True, exist_ok=True)
        search = [f"-I{compiler.SOURCES / part}" for part in ("include", "src")]
        search += [option for path in includes for option in ("-isystem", str(path))]
        common = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", *search]
        core = [*sorted((compiler.SOURCES / "src").glob("*.cpp")), HERE / "cuda.cpp"]
        for name, parts in {
            "libtwofour.so": ["-fvisibility=hidden", *core, "-ldl"],
            "libcusparselt.so": [HERE / "cusparselt.cpp"],
            "libcublaslt.so": [HERE / "cublaslt.cpp"],
        }.items():
            subprocess.run([*common, *map(str, parts), "-o", str(out / name)], check=True)
    return out


def open_gpu(monkeypatch: pytest.MonkeyPatch, sm: int = 90, **settings: str) -> bindings.Context:
    for name, value in {"STAND_IN_SM": str(sm), **settings}.items():
        set_environment(monkeypatch, name, value)
    set_environment(monkeypatch, "TWOFOUR_CUSPARSELT", str(directory() / "libcusparselt.so"))
    set_environment(monkeypatch, "TWOFOUR_CUBLASLT", str(directory() / "libcublaslt.so"))
    opened = bindings.open_library(directory() / "libtwofour.so")
    monkeypatch.setattr(bindings, "load", lambda: opened)
    return bindings.Context(0)


def set_environment(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)


def use_torch(monkeypatch: pytest.MonkeyPatch, context: bindings.Context) -> None:
    """What the operators and the tuner do on CUDA, done on torch's CPU tensors."""
    monkeypatch.setattr(bindings, "context", lambda device: context)
    monkeypatch.setattr(
        torch_ops, "prepare", lambda w, kernel: w if kernel == "cublaslt" else torch_ops.prepare_on_device(w, kernel)
    )
    monkeypatch.setattr(
        hybrid_ops, "prepare", lambda w, cut: torch_ops.prepare_on_device(w.contiguous(), cut.kernel, cut.sizes)
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: FACTS["name"])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(timing, "device_facts", lambda device: {**FACTS, "clocks": dict(FACTS["clocks"])})
    monkeypatch.setattr(tuner, "WORKSPACE", 1 << 20)


def use_times(monkeypatch: pytest.MonkeyPatch, us: Callable[[tuner.Bench, str, int], float]) -> None:
    """Has the tuner search and call every kernel, and take `us(bench, kernel, tokens)` for its time."""
    asked: list[tuple[tuner.Bench, str, int]] = []
    real = tuner.time_kernel

    def measure(call: Callable[[int], object], copies: int, rounds: int = 1, least_calls: int = 1) -> timing.Time:
        call(copies - 1)
        time = us(*asked[-1])
        return timing.Time(time, time, time)

    def time_kernel(bench: tuner.Bench, kernel: str, tokens: int) -> choice.Timing:
        asked.append((bench, kernel, tokens))
        return real(bench, kernel, tokens)

    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(tuner, "time_kernel", time_kernel)
    device = torch.device
    monkeypatch.setattr(torch, "device", lambda *given: CPU if given[0] == "cuda" else device(*given))


def use_machine(monkeypatch: pytest.MonkeyPatch, sm: int = 90) -> None:
    """Has the builder see a machine with that GPU."""
    monkeypatch.setattr(measured_tactics, "gpus", lambda: (Gpu("Stand-in", sm, 80 << 30, 79 << 30, "580.1"),))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def by_kernel(times: Mapping[str, float]) -> Callable[[tuner.Bench, str, int], float]:
    """Times that depend on the kernel alone."""
    return lambda bench, kernel, tokens: times[kernel]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> bindings.Context:
    """A context on the stand-in GPU: an H100 unless STAND_IN_SM is set."""
    return open_gpu(monkeypatch)
