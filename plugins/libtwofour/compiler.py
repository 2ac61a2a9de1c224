"""Builds libtwofour, and its TensorRT plugin where TensorRT's headers are given, with nvcc. Imports no torch.

cuSPARSELt, cuSPARSE and cuBLAS are needed as headers only: the library finds them when it runs. They come from the
PyPI wheels (nvidia-cusparselt-cu13, nvidia-cusparse, nvidia-cublas) or the system. CMake runs the build by
plugins/csrc/CMakeLists.txt.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from plugins.common.errors import UserError
from plugins.common.json_files import write_json
from plugins.common.nvidia_smi import gpus

SOURCES = Path(__file__).parents[1] / "csrc"
OUT = Path(__file__).parents[1] / "lib"
SMS = ("80", "86", "89", "90a", "100a", "120a")
HEADERS = {
    "cusparseLt.h": "nvidia-cusparselt-cu13",
    "cusparse.h": "nvidia-cusparse",
    "cublasLt.h": "nvidia-cublas",
}

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Build:
    """What a build left: paths of the libraries, the SMs they hold code for, the compiler."""

    library: str
    plugin: str | None
    sms: tuple[str, ...]
    nvcc: str


def build(
    sms: Sequence[str] | None = None,
    out: Path | None = None,
    tensorrt_include: Path | None = None,
    progress: Progress = lambda line: None,
) -> Build:
    """Compiles for `sms` ("90a", "sm_90", "9.0"; None: the GPU here, else all of SMS) into the directory `out` (OUT).

    `tensorrt_include` (or the environment variable TENSORRT_INCLUDE) names TensorRT 10's headers and adds
    libtwofour_tensorrt.so. Raises UserError where the compiler or a header is missing, or the compilation fails.
    """
    nvcc, out = find_nvcc(), out or OUT
    if shutil.which("cmake") is None or shutil.which("make") is None:
        raise UserError("no CMake and make found", "pip install cmake, and install make")
    chosen = tuple(dict.fromkeys(parse_sm(sm) for sm in sms)) if sms else gpu_sms() or SMS
    includes = find_includes()
    if tensorrt_include is None and os.environ.get("TENSORRT_INCLUDE"):
        tensorrt_include = Path(os.environ["TENSORRT_INCLUDE"])
    if tensorrt_include is not None and not (tensorrt_include / "NvInfer.h").exists():
        raise UserError(f"no NvInfer.h in '{tensorrt_include}': give the include directory of TensorRT 10")
    progress(f"compiling {SOURCES} for sm_{', sm_'.join(chosen)} with {nvcc}")
    with tempfile.TemporaryDirectory(prefix="twofour-build-") as work:
        compiled = _compile(nvcc, chosen, includes, tensorrt_include, Path(work), progress)
        out.mkdir(parents=True, exist_ok=True)
        for file in compiled:
            shutil.copy2(file, out / (file.name + ".new"))
            os.replace(out / (file.name + ".new"), out / file.name)  # a process that has the old one open keeps it
    plugin = out / "libtwofour_tensorrt.so"
    result = Build(str(out / "libtwofour.so"), str(plugin) if tensorrt_include else None, chosen, _version(nvcc))
    write_json(out / "build.json", asdict(result), 2)
    return result


def parse_sm(text: str) -> str:
    """nvcc's name of an architecture written like sm_90a, 90 or 9.0: "90a". Raises UserError."""
    match = re.fullmatch(r"(?:sm_?|compute_?)?(\d+)\.?(\d)([af]?)", text.strip().lower())
    if match is None:
        raise UserError(f"'{text}' is not a GPU architecture: write one like sm_90a or 9.0")
    number = int(match[1]) * 10 + int(match[2])
    if number < 80:
        raise UserError(f"'{text}' has no sparse tensor cores: the first is sm_80 (A100)")
    return f"{number}{match[3] or ('a' if number in (90, 100, 120) else '')}"


def gpu_sms() -> tuple[str, ...]:
    """The architectures of this machine's GPUs; empty where there is none."""
    return tuple(dict.fromkeys(parse_sm(f"{gpu.sm // 10}.{gpu.sm % 10}") for gpu in gpus()))


def find_nvcc() -> str:
    """The compiler's path: CUDA_HOME/bin, then the PATH, then /usr/local/cuda. Raises UserError."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for candidate in [*(f"{home}/bin/nvcc" for home in homes), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]:
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    raise UserError("no nvcc found", "install the CUDA toolkit 12.8 or newer, or set CUDA_HOME")


def has_nvcc() -> bool:
    """Whether there is a compiler for CUDA."""
    try:
        find_nvcc()
    except UserError:
        return False
    return True


def find_includes() -> list[Path]:
    """The directories of cusparseLt.h, cusparse.h and cublasLt.h. Raises UserError naming the wheel that has it."""
    directories = []
    for header, wheel in HEADERS.items():
        directory = next((d for d in _include_candidates() if (d / header).exists()), None)
        if directory is None:
            raise UserError(f"no {header} found: pip install {wheel}")
        directories.append(directory)
    return list(dict.fromkeys(directories))


def _include_candidates() -> list[Path]:
    wheels = [path for entry in sys.path if entry for path in sorted(Path(entry).glob("nvidia/*/include"))]
    homes = [
        Path(os.environ[name]) / "include"
        for name in ("CUSPARSELT_HOME", "CUDA_HOME", "CUDA_PATH")
        if os.environ.get(name)
    ]
    system = [
        Path("/usr/local/cuda/include"),
        Path("/usr/include"),
        *sorted(Path("/usr/include/libcusparseLt").glob("*")),
    ]
    return [*homes, *wheels, *system]


def _compile(
    nvcc: str, sms: Sequence[str], includes: list[Path], tensorrt: Path | None, work: Path, progress: Progress
) -> list[Path]:
    options = {
        "CMAKE_CUDA_COMPILER": nvcc,
        "CMAKE_CUDA_ARCHITECTURES": ";".join(f"{sm}-real" for sm in sms),
        "TWOFOUR_INCLUDES": ";".join(map(str, includes)),
        "TENSORRT_INCLUDE": str(tensorrt or ""),
    }
    _run(["cmake", "-S", str(SOURCES), "-B", str(work), *(f"-D{k}={v}" for k, v in options.items())], progress)
    _run(["cmake", "--build", str(work), "--parallel", str(_jobs())], progress)
    return [work / "libtwofour.so", *([work / "tensorrt" / "libtwofour_tensorrt.so"] if tensorrt else [])]


def _run(command: list[str], progress: Progress) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    for line in done.stdout.splitlines():
        progress(line)
    if done.returncode != 0:
        wrong = [line for line in done.stdout.splitlines() if "error" in line.lower()] or done.stdout.splitlines()[-1:]
        raise UserError(
            f"compiling libtwofour failed: {wrong[0].strip() if wrong else command[0]}; {' '.join(command)}"
        )


def _version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"release ([\d.]+), V([\d.]+)", text)
    return match[2] if match else "unknown"


def _jobs() -> int:
    return max(1, min(8, os.cpu_count() or 1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds the libraries for this machine's GPU and writes the result to `--out`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args(arguments)
    try:
        result = build()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_json(chosen.out, asdict(result))
    print(f"built {result.library} for sm_{', sm_'.join(result.sms)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
