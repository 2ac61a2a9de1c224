"""One probe for each Python package that a build may need."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import sys
from importlib import metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet

from builder.doctor.finding import Finding, run_child
from builder.planning.compatibility import MODELOPT, check_release
from plugins.common.errors import UserError
from plugins.common.nvidia_smi import gpus

TRANSFORMERS = SpecifierSet(">=4.57,<5.15")
IMPORT_SECONDS = 120  # the import of torch and ModelOpt, on a slow disk


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
    code, output = run_child([sys.executable, "-c", _IMPORT_MODELOPT], IMPORT_SECONDS, environment)
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
messages = [" ".join(str(warning.message).split()) for warning in caught]
failed = [line for line in messages if line.startswith("Failed to import modelopt")]
print(json.dumps([line for line in failed if "transformers" in line or "huggingface" in line]))
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
