"""Builds libtwofour_cpu with g++: the products and the decode step on a CPU. Imports no torch.

The file's name carries a hash of the sources, so that a library of other sources is never loaded.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from plugins.common.errors import UserError

SOURCES = Path(__file__).parents[1] / "csrc" / "cpu"
PACKAGE = Path(__file__).parents[1] / "lib"
# Products keep their roundings: no fused multiply-add where the source has none.
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-psabi",
)  # fmt: skip


def built() -> Path | None:
    """The library of these sources, where it was built before."""
    return next((place / _name() for place in _places() if (place / _name()).is_file()), None)


def build(out: Path | None = None, progress: Callable[[str], None] = lambda line: None) -> Path:
    """Compiles into `out`, else beside the package or, where that cannot be written, into the user's cache.

    Raises UserError where there is no compiler, or it fails.
    """
    compiler = find_compiler()
    target = next(place for place in ([out] if out else _places()) if _writable(place)) / _name()
    progress(f"compiling {SOURCES} with {compiler}")
    with tempfile.TemporaryDirectory(prefix="twofour-build-") as work:

        def compile_one(source: Path) -> str:
            object_file = f"{work}/{source.stem}.o"
            _run([compiler, *FLAGS, "-c", str(source), "-o", object_file], progress)
            return object_file

        with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
            objects = list(pool.map(compile_one, sorted(SOURCES.glob("*.cpp"))))
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        _run([compiler, *FLAGS, "-shared", *objects, "-o", str(partial)], progress)
    os.replace(partial, target)  # a process that has an old one open keeps it
    for old in target.parent.glob("libtwofour_cpu.*.so"):
        if old != target:
            old.unlink(missing_ok=True)
    return target


def find_compiler() -> str:
    """$CXX, else g++. Raises UserError."""
    name = os.environ.get("CXX", "g++")
    path = shutil.which(name)
    if path is None:
        raise UserError(f"no C++ compiler '{name}'", "install g++ (apt-get install g++), or set CXX")
    return path


def _places() -> list[Path]:
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [PACKAGE, cache_home / "twofour" / "lib"]


def _writable(place: Path) -> bool:
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(place, os.W_OK)


@cache
def _name() -> str:
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return f"libtwofour_cpu.{digest.hexdigest()[:12]}.so"


def _run(command: list[str], progress: Callable[[str], None]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    for line in done.stdout.splitlines():
        progress(line)
    if done.returncode != 0:
        wrong = [line for line in done.stdout.splitlines() if "error" in line] or done.stdout.splitlines()[-1:]
        reason = wrong[0].strip() if wrong else f"exit status {done.returncode}"
        raise UserError(f"compiling libtwofour_cpu failed: {reason}", f"run {' '.join(command)}")
