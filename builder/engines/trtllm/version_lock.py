"""Records the versions that built an engine, and refuses to run it with others.

A TensorRT engine runs only under the TensorRT that built it, on a GPU of the same SM, with the same plugin library:
another one fails late, or runs wrong. The lock names the container that has the right versions.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from builder.engines.trtllm.launch import PLUGIN_LIBRARY
from plugins.common.errors import UserError
from plugins.common.json_files import read_json, write_json
from plugins.common.nvidia_smi import gpus
from plugins.tensorrt_llm import releases

FILE = "lock.json"
CUDA_TOOLKIT = Path("/usr/local/cuda/version.json")  # where NVIDIA's images have CUDA, and no wheel of it

# Facts that must match when the engine runs. The PyTorch backend compiles nothing for one GPU and reads plain weights.
BINDING = {
    "tensorrt": ("tensorrt_llm", "tensorrt", "cuda", "sm", "plugin_sha256"),
    "pytorch": ("tensorrt_llm", "plugin_sha256"),
    "torch": (),
}
NAMES = {
    "tensorrt_llm": "TensorRT-LLM",
    "tensorrt": "TensorRT",
    "cuda": "CUDA",
    "sm": "SM",
    "plugin_sha256": "plugin library",
}


@dataclass(frozen=True)
class Lock:
    """Versions, None where the machine does not have the thing. `container` is where all of them are."""

    backend: str
    tensorrt_llm: str | None = None
    tensorrt: str | None = None
    cuda: str | None = None
    sm: int | None = None
    gpu: str | None = None
    driver: str | None = None
    plugin_sha256: str | None = None
    container: str = releases.CONTAINER


def current(backend: str, plugin: Path | None = None) -> Lock:
    """This machine's versions, and the hash of our plugin library where there is one."""
    tensorrt_llm = installed("tensorrt_llm")
    device = gpus()[0] if gpus() else None
    return Lock(
        backend=backend,
        tensorrt_llm=tensorrt_llm,
        tensorrt=installed("tensorrt") or installed("tensorrt_cu13") or installed("tensorrt_cu12"),
        cuda=installed("nvidia_cuda_runtime") or installed("nvidia_cuda_runtime_cu12") or _toolkit(),
        sm=device.sm if device else None,
        gpu=device.name if device else None,
        driver=device.driver if device else None,
        plugin_sha256=hashlib.sha256(plugin.read_bytes()).hexdigest() if plugin else None,
        container=f"{releases.IMAGE}:{tensorrt_llm.partition('+')[0]}" if tensorrt_llm else releases.CONTAINER,
    )


@functools.cache
def installed(distribution: str) -> str | None:
    """The version of an installed distribution, without importing it; None where it is missing."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _toolkit() -> str | None:
    """The version of CUDA's toolkit; None where there is none, or it does not print one."""
    try:
        return str(read_json(CUDA_TOOLKIT)["cuda"]["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(engine: Path, lock: Lock) -> None:
    """Writes `lock.json` into an engine directory."""
    write_json(engine / FILE, asdict(lock))


def read(engine: Path) -> Lock | None:
    """The engine's lock; None for an engine that has none. Raises UserError for a file that is not a lock."""
    path = engine / FILE
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = read_json(path)
        lock = Lock(**{field.name: content[field.name] for field in fields(Lock)})
        if lock.backend not in BINDING:
            raise ValueError(f"backend '{lock.backend}'")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' is not a version lock ({error}): build the engine again") from None
    return lock


def mismatches(lock: Lock, here: Lock) -> dict[str, str]:
    """By field of the lock, what differs on this machine, of what binds. Empty: the engine may run."""
    different = {}
    for name in BINDING[lock.backend]:
        wanted, have = getattr(lock, name), getattr(here, name)
        if wanted is None or _same(name, wanted, have):
            continue
        shown = ("missing" if have is None else "another one") if name == "plugin_sha256" else (have or "none")
        built = "it was built with" if name == "plugin_sha256" else wanted
        different[name] = f"{NAMES[name]} {built} (here: {shown})"
    return different


def incompatibility(engine: Path) -> str | None:
    """Why the engine may not run on this machine, with the container to use; None where it may.

    Raises UserError for a lock that cannot be read.
    """
    lock = read(engine)
    if lock is None:
        return None
    differences = mismatches(lock, current(lock.backend, plugin_of(engine)))
    if not differences:
        return None
    gpu = f" on a GPU with SM {lock.sm}, such as the {lock.gpu}" if lock.sm and "sm" in differences else ""
    return f"'{engine}' needs {', '.join(differences.values())}: use the container {lock.container}{gpu}"


def require(engine: Path) -> None:
    """Raises UserError where the engine was built for other versions or another GPU; it names the container to use."""
    if (reason := incompatibility(engine)) is not None:
        raise UserError(reason)


def plugin_of(engine: Path) -> Path | None:
    """The plugin library that the engine's launch files would load: $TWOFOUR_PLUGIN_LIBRARY, else the engine's copy."""
    library = Path(os.environ.get("TWOFOUR_PLUGIN_LIBRARY") or engine / PLUGIN_LIBRARY)
    return library if library.is_file() else None


def _same(name: str, wanted: object, have: object) -> bool:
    """Exactly the same; of CUDA the major version, of TensorRT-LLM and TensorRT the release without a local label."""
    if have is None:
        return False
    if name == "cuda":
        return str(wanted).split(".")[0] == str(have).split(".")[0]
    return re.sub(r"\+.*", "", str(wanted)) == re.sub(r"\+.*", "", str(have))
