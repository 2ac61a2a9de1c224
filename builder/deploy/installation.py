"""Triton Inference Server on this machine: NVIDIA's container has one, and so has the nvidia-pytriton wheel.

The wheel's Python backend needs help to run in any virtual environment: a stub built for this Python version beside
`libtriton_python.so`, this Python's shared library, and the environment's interpreter first on PATH, from which the
embedded interpreter finds `pyvenv.cfg` and the installed packages. All of it is laid out, as links, in a directory of
ours; site-packages stays as it is.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from plugins.common.errors import UserError

CONTAINER = Path("/opt/tritonserver")
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_STUB = "triton_python_backend_stub"


@dataclass(frozen=True)
class Installation:
    """A tritonserver on this machine. `stubs` is None if its Python backend works as it is."""

    binary: Path
    caches: Path
    backends: Path
    libraries: Path | None = None
    stubs: Path | None = None


def find() -> Installation:
    """The server of NVIDIA's container, else of the nvidia-pytriton wheel. Raises UserError if there is none."""
    if (binary := CONTAINER / "bin" / "tritonserver").is_file():
        return Installation(binary, CONTAINER / "caches", CONTAINER / "backends")
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise UserError(
            "no tritonserver here", "pip install 'twofour[triton]', or run inside NVIDIA's Triton container"
        )
    wheel = Path(spec.origin).parent
    root = wheel / "tritonserver"
    stubs = root / "python_backend_stubs" / _PYTHON
    if not (stubs / _STUB).is_file():
        have = sorted(path.name for path in stubs.parent.glob("*"))
        raise UserError(f"nvidia-pytriton has no Python backend for {stubs.name}", f"use Python {', '.join(have)}")
    return Installation(
        root / "bin" / "tritonserver", root / "caches", root / "backends", wheel.parent / "nvidia_pytriton.libs", stubs
    )


def lay_out(installation: Installation, scratch: Path) -> tuple[Path, dict[str, str]]:
    """Makes the backend directory in `scratch` and returns it with the environment to start the server in."""
    environment = dict(os.environ)
    source = str(Path(__file__).parents[2])  # where `builder` was imported from, installed or not
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), source]))
    if installation.stubs is None:
        return installation.backends, environment
    libraries = scratch / "lib"
    backend = scratch / "backends" / "python"
    libraries.mkdir(parents=True)
    backend.mkdir(parents=True)
    for file in (*(installation.backends / "python").glob("*.*"), installation.stubs / _STUB):
        (backend / file.name).symlink_to(file)
    if (libpython := _libpython()) is not None:
        (libraries / libpython.name).symlink_to(libpython)
    search = [str(libraries), str(installation.libraries), environment.get("LD_LIBRARY_PATH", "")]
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, search))
    environment["PATH"] = os.pathsep.join([str(Path(sys.prefix) / "bin"), environment.get("PATH", os.defpath)])
    environment.pop("PYTHONHOME", None)
    _check_stub(backend / _STUB, environment)
    return backend.parent, environment


def _libpython() -> Path | None:
    """This Python's shared library, of the same patch version as the standard library."""
    name = f"libpython{_PYTHON}.so.1.0"
    folders = (sysconfig.get_config_var("LIBDIR") or "", os.path.join(sys.base_prefix, "lib"))
    return next((path for folder in folders if (path := Path(folder) / name).is_file()), None)


def _check_stub(stub: Path, environment: dict[str, str]) -> None:
    """Whether the loader finds the stub's libraries; without arguments the stub exits immediately."""
    tried = subprocess.run([stub], env=environment, capture_output=True, text=True, timeout=60)
    if tried.returncode == 127:
        missing = tried.stderr.strip().rpartition("libraries: ")[2]
        package = f"libpython{_PYTHON}"
        raise UserError(f"Triton's Python backend cannot start ({missing}): install {package}, or a Python that has it")
