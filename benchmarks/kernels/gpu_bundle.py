"""Packs the files that a GPU machine without network needs, in parts for small transfers, with the commands to run:

    python -m benchmarks.kernels.gpu_bundle --out bundle

A prebuilt libtwofour.so; the cuSPARSELt wheel, unmodified, cut into parts; commands.txt. PyTorch 2.11 pins cuSPARSELt
0.8.0, which is slow on H100 (NVIDIA's release notes of 0.8.1), so run the suite with a newer one.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from plugins.common.errors import UserError
from plugins.libtwofour import compiler

WHEEL = "nvidia-cusparselt-cu13==0.8.1"
LIBRARY_IN_WHEEL = "nvidia/cusparselt/lib/libcusparseLt.so.0"
PART_MIB = 44
SM = "90a"
THERE = "/tmp/twofour"  # where the parts meet on the GPU machine

PART_COMMAND = "mkdir -p {there} && cp {out}/parts/{index}/* {there}/"
LAST_COMMAND = """\
cat {there}/wheel.part* > {there}/wheel.whl && echo '{sha256}  {there}/wheel.whl' | sha256sum -c && \
python3 -m zipfile -e {there}/wheel.whl {there} && cp {out}/lib/libtwofour.so {there}/"""
SUITE_COMMAND = """\
TWOFOUR_CUSPARSELT={there}/{library} TWOFOUR_LIBRARY={there}/libtwofour.so \
python3 -m benchmarks.kernels.gpu_suite{options} --out $OUT"""


def make(out: Path, wheel: Path, part_mib: int = PART_MIB, sm: str = SM) -> list[str]:
    """Writes the bundle into `out`; returns the commands in order. Raises UserError."""
    out.mkdir(parents=True, exist_ok=True)
    compiler.build([sm], out / "lib")
    content = wheel.read_bytes()
    size = part_mib << 20
    count = -(-len(content) // size)
    for index in range(count):
        part = out / "parts" / str(index)
        part.mkdir(parents=True, exist_ok=True)
        (part / f"wheel.part{index:02}").write_bytes(content[index * size : (index + 1) * size])
    facts = {"there": THERE, "out": out, "library": LIBRARY_IN_WHEEL, "sha256": hashlib.sha256(content).hexdigest()}
    commands = [
        *(PART_COMMAND.format(index=index, **facts) for index in range(count)),
        LAST_COMMAND.format(**facts),
        SUITE_COMMAND.format(options=" --smoke", **facts),
        SUITE_COMMAND.format(options="", **facts),
    ]
    (out / "commands.txt").write_text("\n".join(commands) + "\n", encoding="utf8")
    return commands


def download(wheel: str, directory: Path) -> Path:
    """The wheel's file, by pip. Raises UserError where it cannot be had."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), wheel]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    files = list(directory.glob("*.whl"))
    if done.returncode != 0 or not files:
        lines = done.stderr.strip().splitlines()
        raise UserError(f"pip cannot download '{wheel}' ({lines[-1] if lines else 'no file'}): give --wheel FILE")
    return files[0]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="directory of the bundle")
    parser.add_argument("--wheel", type=Path, help=f"a wheel of cuSPARSELt; without it, pip downloads {WHEEL}")
    parser.add_argument("--part-mib", type=int, default=PART_MIB, help="size of a part")
    parser.add_argument("--sm", default=SM, help="architecture of the prebuilt library")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.wheel is not None and not chosen.wheel.is_file():
            raise UserError(f"no file '{chosen.wheel}': give a wheel of {WHEEL}")
        if chosen.part_mib < 1:
            raise UserError(f"--part-mib {chosen.part_mib} is not a size: give 1 or more")
        with tempfile.TemporaryDirectory() as directory:
            wheel = chosen.wheel or download(WHEEL, Path(directory))
            commands = make(chosen.out, wheel, chosen.part_mib, chosen.sm)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(["Copy a part and run its command, in this order:", *commands]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
