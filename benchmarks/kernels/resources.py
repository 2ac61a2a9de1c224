"""Registers, spills, instructions and bytes in flight of the skinny kernels, from what the compiler made of them.

    python -m benchmarks.kernels.resources --sm 90a

Needs nvcc, and cuobjdump (of the CUDA toolkit, or of triton's wheel) for the instructions. No GPU.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plugins.common.errors import UserError
from plugins.libtwofour import compiler

FORMATS = ("fp16", "bf16", "int8", "fp8")
PATTERNS = {2: "2:4", 4: "4:8", 5: "5:8", 6: "6:8"}  # by the values that a group keeps
SHARED_BYTES, RESERVED_BYTES, REGISTERS = 228 << 10, 1 << 10, 64 << 10  # of a multiprocessor of SM 9.0
INPUTS = 4096  # for the shared memory that x takes in the streamed kernel


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel; `arguments` of its C++ template: type, tiles of 8 tokens, tiles of 16 rows, of a staged one
    stages, and the values that a group keeps."""

    name: str
    arguments: tuple[int, ...]
    registers: int
    spills: int
    loop: Counter[str]  # instructions of the innermost loop that multiplies

    @property
    def format(self) -> str:
        return FORMATS[self.arguments[0]]

    @property
    def pattern(self) -> str:
        return PATTERNS[self.arguments[-1]]

    @property
    def tokens(self) -> int:
        return 8 * self.arguments[1]

    @property
    def blocks_in_loop(self) -> int:
        """Packed blocks of 16 x 256 that a warp multiplies in one turn of the loop."""
        return self.arguments[2]

    def in_flight(self) -> int:
        """Bytes of the weight on their way to a multiprocessor of SM 9.0, its shared memory full."""
        _, token_tiles, tiles, *stages, keep = self.arguments
        element = 2 if self.format in ("fp16", "bf16") else 1
        block = ((4 if keep == 2 else keep) * element + 1) * 512  # 16 rows x 256 inputs, layout.h
        padding = 16 if keep == 2 else 32 if self.format == "fp8" else 64  # kRowPadding
        if self.name == "staged":  # SkinnyConfig: 4 warps, stages of weight and x
            weight = 4 * tiles * block
            shared = stages[0] * (weight + self.tokens * (256 * element + padding))
            resident = min((SHARED_BYTES) // (shared + RESERVED_BYTES), REGISTERS // (128 * self.registers))
            return resident * (stages[0] - 1) * weight
        sums = 8 * tiles * token_tiles * 512  # StreamedConfig: 8 warps, a ring each
        rest = sums + self.tokens * (INPUTS * element + padding) + INPUTS // 256 * 8
        for share in (2, 1):
            depth = (min(SHARED_BYTES // share - RESERVED_BYTES, 227 << 10) - rest) // (8 * block + 64)
            if depth * 8 * block >= 48 << 10:
                break
        return max(0, depth) * 8 * block


def compile_kernels(sm: str, work: Path) -> list[Kernel]:
    """Compiles both kernels of all patterns for `sm` ("90a").

    Raises UserError where the compiler is missing or fails.
    """
    kernels = []
    sources = ("skinny.cu", "skinny_of8.cu", "streamed.cu", *(f"streamed_{n}of8.cu" for n in (4, 5, 6)))
    for source in sources:
        name = "staged" if source.startswith("skinny") else "streamed"
        target = work / f"{source}.cubin"
        command = [compiler.find_nvcc(), "-std=c++17", "-O3", "-cubin", "-Xptxas", "-v", f"-arch=sm_{sm}"]
        command += [f"-I{compiler.SOURCES / part}" for part in ("include", "src")]
        command += [str(compiler.SOURCES / "src" / source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise UserError(f"compiling {source} failed: {(done.stderr.splitlines() or ['?'])[0]}")
        kernels += parse(name, done.stderr, loops(target))
    return sorted(kernels, key=lambda k: (k.arguments[-1], k.name, k.arguments))


def parse(name: str, report: str, instructions: dict[tuple[int, ...], Counter[str]]) -> list[Kernel]:
    """The kernels in a report of `ptxas -v`."""
    pattern = (
        r"Compiling entry function '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    kernels = []
    for symbol, stores, reads, registers in re.findall(pattern, report, re.DOTALL):
        arguments = template_arguments(symbol)
        loop = instructions.get(arguments, Counter())
        kernels.append(Kernel(name, arguments, int(registers), int(stores) + int(reads), loop))
    return kernels


def template_arguments(symbol: str) -> tuple[int, ...]:
    """The numbers in a mangled name's Config<...>."""
    return tuple(int(n) for n in re.findall(r"Li(\d+)E", symbol.split("Config", 1)[1]))


def loops(cubin: Path) -> dict[tuple[int, ...], Counter[str]]:
    """Instructions by name of each kernel's shortest loop with a matrix product; empty without cuobjdump."""
    tool = find_cuobjdump()
    if tool is None:
        return {}
    text = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=False).stdout
    result = {}
    for function in re.split(r"\n\s*Function : ", text)[1:]:
        code = [(int(at, 16), line) for at, line in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", function)]
        bodies = []
        for at, line in code:
            jump = re.search(r"BRA\S*\s+.*?0x([0-9a-f]+)", line)
            if jump and int(jump[1], 16) < at:
                body = [text for place, text in code if int(jump[1], 16) <= place <= at]
                if any("MMA" in text for text in body):
                    bodies.append(body)
        if bodies:
            names = (re.sub(r"^@!?U?P\w+ ", "", text).split()[0].split(".")[0] for text in min(bodies, key=len))
            result[template_arguments(function.split("\n", 1)[0])] = Counter(names)
    return result


def find_cuobjdump() -> str | None:
    """cuobjdump from nvcc's folder, the PATH, or triton's wheel."""
    wheels = (Path(path) / "triton/backends/nvidia/bin/cuobjdump" for path in sys.path)
    beside = Path(compiler.find_nvcc()).with_name("cuobjdump")
    return next((str(p) for p in (beside, *wheels) if p.exists()), shutil.which("cuobjdump"))


def table(kernels: Sequence[Kernel]) -> str:
    """A Markdown table. Instructions are those in the code of one packed block, slow paths included; "-" for bytes in
    flight: x of INPUTS and a ring do not both fit, and the inputs are split."""
    lines = [
        "| pattern | kernel | type | tokens | registers | spilled | instructions a block | of these conversions "
        "| KB in flight |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for k in kernels:
        total, conversions = sum(k.loop.values()), k.loop["F2FP"]
        counts = [f"{n / k.blocks_in_loop:.0f}" if total else "" for n in (total, conversions)]
        cells = (
            k.pattern,
            k.name,
            k.format,
            k.tokens,
            k.registers,
            k.spills,
            *counts,
            f"{k.in_flight() / 1000:.0f}" if k.in_flight() else "-",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table of the skinny kernels' resources."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--sm", default="90a", help="architecture to compile for (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="twofour-resources-") as work:
            print(table(compile_kernels(compiler.parse_sm(chosen.sm), Path(work))))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
