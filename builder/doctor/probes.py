"""One probe for each thing that a build may need. Each is bounded in time and always returns a Finding.

What could hang or crash (a driver, a library, the import of a large package) runs in a child process.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.specifiers import SpecifierSet

from builder.planning.compatibility import MODELOPT, check, check_release
from plugins.common.errors import UserError
from plugins.common.nvidia_smi import gpus
from plugins.libtwofour.bindings import OLDEST_CUSPARSELT

State = Literal["ok", "missing", "broken", "unfit"]  # unfit: present, in a version that does not work here
TRANSFORMERS = SpecifierSet(">=4.57,<5.15")
DISK_BYTES = 20 << 30
SECONDS = 20  # a driver or a library
IMPORT_SECONDS = 120  # the import of torch and ModelOpt, on a slow disk


@dataclass(frozen=True)
class Finding:
    """The state of one thing. `words` is one line; `fix` is the next step if the state is not "ok"."""

    name: str
    state: State
    version: str | None = None
    words: str = ""
    fix: str = ""

    @property
    def ok(self) -> bool:
        return self.state == "ok"


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
    code, output = _child([sys.executable, "-c", script], SECONDS)
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
    code, output = _child([sys.executable, "-c", script, *named, *wheels, "libcusparseLt.so.0"], SECONDS)
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
    code, _ = _child(
        [sys.executable, "-c", "import plugins.libtwofour.bindings; plugins.libtwofour.bindings.load()"], SECONDS
    )
    if code != 0:
        return Finding("libtwofour", "broken", None, f"'{path}' cannot be loaded", "twofour plugins build")
    try:
        built = json.loads((path.parent / "build.json").read_text())
        sms, detail = built["sms"], f"{path}, for SM {', '.join(built['sms'])}, nvcc {built['nvcc']}"
    except (OSError, ValueError, KeyError, TypeError):  # a library that this command did not build has no record
        return Finding("libtwofour", "ok", None, str(path))
    if gpus() and not any(sm.rstrip("af") == str(gpus()[0].sm) for sm in sms):
        return Finding("libtwofour", "unfit", None, f"{detail}: not for this GPU", "twofour plugins build")
    return Finding("libtwofour", "ok", None, detail)


def tensorrt() -> Finding:
    """TensorRT. PyPI's `tensorrt` may be a stub without the library."""
    version = _version("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
    fix = "use the container nvcr.io/nvidia/tensorrt-llm/release:1.2.1"
    if version is None:
        return Finding("TensorRT", "missing", None, "the package tensorrt is not installed", fix)
    if not _holds("tensorrt", "tensorrt*.so") and not _holds("tensorrt_bindings", "tensorrt*.so"):
        return Finding("TensorRT", "broken", version, "a stub: the package holds no library", fix)
    return Finding("TensorRT", "ok", version)


def tensorrt_llm() -> Finding:
    """TensorRT-LLM. PyPI has a stub that installs and contains nothing."""
    version = _version("tensorrt-llm")
    fix = "use the container nvcr.io/nvidia/tensorrt-llm/release:1.2.1"
    if version is None:
        return Finding("TensorRT-LLM", "missing", None, "the package tensorrt-llm is not installed", fix)
    if not _holds("tensorrt_llm", "bindings*.so") and not _holds("tensorrt_llm", "libs/*.so"):
        return Finding("TensorRT-LLM", "broken", version, "a stub: the package holds no bindings", fix)
    verdict = check_release("pytorch", version)
    if not verdict.ok:
        return Finding("TensorRT-LLM", "unfit", version, verdict.reason, verdict.instead)
    engines = check_release("tensorrt", version)
    return Finding(
        "TensorRT-LLM", "ok", version, "" if engines.ok else "PyTorch backend only: 1.2 is the last with engines"
    )


def torch() -> Finding:
    """torch, and which CUDA it was built for, from its files."""
    version = _version("torch")
    if version is None:
        return Finding("torch", "missing", None, "the package torch is not installed", "pip install twofour")
    spec = importlib.util.find_spec("torch")
    text = Path(spec.origin).with_name("version.py").read_text() if spec and spec.origin else ""
    built = re.search(r"^cuda\b[^=]*=\s*'([\d.]+)'", text, re.MULTILINE)
    if built is None and gpus():
        fix = "pip install torch from NVIDIA's or PyTorch's CUDA wheels"
        return Finding("torch", "unfit", version, "built for the CPU, and this machine has a GPU", fix)
    return Finding("torch", "ok", version, f"built for CUDA {built[1]}" if built else "built for the CPU")


def transformers() -> Finding:
    version = _version("transformers")
    fix = "pip install 'transformers>=4.57,<5.15'"
    if version is None:
        return Finding("transformers", "missing", None, "the package transformers is not installed", fix)
    if not TRANSFORMERS.contains(version, prereleases=True):
        return Finding("transformers", "unfit", version, "not one that ModelOpt works with", fix)
    return Finding("transformers", "ok", version)


def modelopt(environment: dict[str, str] | None = None) -> Finding:
    """ModelOpt, and whether its transformers plugins load.

    With a pyarrow that refuses this numpy ModelOpt drops them, warns, and quantizes fewer layers than configured.
    `environment` is that of the child process that imports it; None: this process's.
    """
    version = _version("nvidia-modelopt")
    fix = "pip install 'twofour[calibrate]'"
    if version is None:
        return Finding("ModelOpt", "missing", None, "the package nvidia-modelopt is not installed", fix)
    code, output = _child([sys.executable, "-c", _IMPORT_MODELOPT], IMPORT_SECONDS, environment)
    if code is None:
        return Finding("ModelOpt", "broken", version, f"its import takes longer than {IMPORT_SECONDS} s", fix)
    if code != 0:
        reason_line = output.splitlines()[-1] if output else "no reason given"
        return Finding("ModelOpt", "broken", version, f"it cannot be imported ({reason_line[:160]})", fix)
    dropped = json.loads(output.splitlines()[-1])
    if dropped:
        reason = re.search(r"due to: (.*?)\. You may ignore", dropped[0])
        reason_line = f"its transformers plugins did not load ({reason[1] if reason else dropped[0][:160]})"
        return Finding("ModelOpt", "broken", version, reason_line, f"{fix} (it pins a pyarrow that accepts this numpy)")
    if not version.startswith(MODELOPT):
        return Finding("ModelOpt", "unfit", version, f"{MODELOPT} is the tested version", fix)
    return Finding("ModelOpt", "ok", version, "transformers plugins loaded")


_IMPORT_MODELOPT = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import modelopt.torch.quantization
said = [" ".join(str(warning.message).split()) for warning in caught]
failed = [words for words in said if words.startswith("Failed to import modelopt")]
print(json.dumps([words for words in failed if "transformers" in words or "huggingface" in words]))
"""


def triton() -> Finding:
    """A tritonserver: NVIDIA's container's, or that of the nvidia-pytriton wheel."""
    from builder.deploy.installation import find

    try:
        installation = find()
    except UserError as error:
        return Finding("Triton", "missing", None, error.message, error.hint)
    kind = f"nvidia-pytriton {_version('nvidia-pytriton')}" if installation.stubs else "NVIDIA's container"
    return Finding("Triton", "ok", _version("nvidia-pytriton") if installation.stubs else None, kind)


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
            "a model of 8B parameters takes about 60 GB: free some, or name another --store",
        )
    return Finding("disk", "ok", None, detail)


def memory() -> Finding:
    values = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE))
    total, available = int(values["MemTotal"]) * 1024, int(values["MemAvailable"]) * 1024
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


def _child(command: Sequence[str], seconds: float, environment: dict[str, str] | None = None) -> tuple[int | None, str]:
    """(exit status, output, or stderr after a failure); no status after a timeout."""
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        return 127, str(error)
    with child:
        try:
            out, err = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # the whole group: its children may hold the pipes open
            return None, ""
    return child.returncode, (out if child.returncode == 0 else err).strip()


def _compiler(name: str, path: str, pattern: str) -> Finding:
    code, output = _child([path, "--version"], SECONDS)
    match = re.search(pattern, output)
    if code != 0 or match is None:
        return Finding(name, "broken", None, f"'{path}' reports no version", "install it again")
    return Finding(name, "ok", match[1], path)


@functools.cache
def _version(*distributions: str) -> str | None:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _holds(package: str, pattern: str) -> bool:
    """Whether an importable package has a file like `pattern`; the package is not imported."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    folders = list(spec.submodule_search_locations or []) if spec else []
    return any(any(Path(folder).glob(pattern)) for folder in folders)
