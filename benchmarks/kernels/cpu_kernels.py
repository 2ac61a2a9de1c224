"""Speed of libtwofour_cpu's products: their share of this machine's read bandwidth, and sparse against dense.

    python -m benchmarks.kernels.cpu_kernels --threads 1,2 --out benchmarks/results/cpu-kernels.json

All linear layers of a model's blocks are multiplied one after another, each block with its own weights, so that the
weights come from memory as in a decode step. The read bandwidth is measured in the same run: the sum of a buffer larger
than any cache, read by the same threads. Times are the least of the rounds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_void_p, pointer
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.kernels.model_shapes import Model
from plugins.autotune.timing import random_sparse
from plugins.common.errors import UserError
from plugins.common.json_files import write_json
from plugins.common.patterns import PATTERNS, TENSOR_CORE, Pattern, cpu_kernel
from plugins.libtwofour import cpu, weight_memory
from plugins.linear.cpu_linear import DENSE, TYPES, CpuLinear
from plugins.linear.torch_linear import Scales
from plugins.sparsity.torch_packing import pack

MODELS = {
    "smollm2-135m": Model(576, 1536, 9, 3, 30, 49152, head_dim=64),
    "llama-3.2-1b": Model(2048, 8192, 32, 8, 16, 128256, head_dim=64),
}
KINDS: dict[str, tuple[torch.dtype, Pattern | None]] = {  # what is measured: the weight's dtype and pattern
    **{f"int8 {pattern}": (torch.int8, pattern) for pattern in PATTERNS},
    "int8": (torch.int8, None),
    **{f"bf16 {pattern}": (torch.bfloat16, pattern) for pattern in PATTERNS},
    "bf16": (torch.bfloat16, None),
}
HEADINGS = ("kernel", "isa", "threads", "tokens", "ms", "GB/s", "of read", "x int8", "x bf16")
WIDTH = 9
BUFFER = 512 << 20
ROUNDS = 15


def least_seconds(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def read_bandwidth() -> float:
    """Bytes a second that the threads in use read together."""
    buffer = weight_memory.allocate(BUFFER).fill_(1)  # on the pages that weights are on
    return BUFFER / least_seconds(lambda: cpu.load().twofour_cpu_read(buffer.data_ptr(), BUFFER), 7)


def layers_of(model: str, kind: str) -> list[CpuLinear]:
    """The model's linear layers, with random weights."""
    dtype, pattern = KINDS[kind]
    choices = ((1, cpu_kernel(pattern) if pattern else DENSE),)
    layers = []
    for shape in MODELS[model].layers():
        rows = shape.out_features
        w_NK = random_sparse(rows, shape.in_features, dtype, torch.device("cpu"), pattern=pattern or TENSOR_CORE)
        scales = Scales(torch.full((rows,), 0.01), torch.tensor([0.05])) if dtype == torch.int8 else None
        kept = pack(w_NK, pattern) if pattern else w_NK
        for _ in range(MODELS[model].num_hidden_layers):
            layers.append(CpuLinear(kept, scales, None, torch.bfloat16, choices))
    return layers


def measure(layers: Sequence[CpuLinear], tokens: int) -> float:
    """Seconds of one pass over all layers. Those of one input are one call: Python's time is not the kernels'."""
    sizes = {layer.in_features for layer in layers}
    calls = [_call([layer for layer in layers if layer.in_features == k], torch.randn(tokens, k)) for k in sizes]
    return least_seconds(lambda: [call() for call in calls])


def _call(layers: Sequence[CpuLinear], x_MK: torch.Tensor) -> Callable[[], None]:
    """The layers' products of bfloat16 inputs."""
    tokens, count, x_MK = len(x_MK), len(layers), x_MK.bfloat16()
    outputs = [x_MK.new_empty(tokens, layer.out_features) for layer in layers]
    problems = (POINTER(cpu.Linear) * count)(*(pointer(layer.problem(tokens)) for layer in layers))
    addresses = (c_void_p * count)(*(y_MN.data_ptr() for y_MN in outputs))
    kept = (x_MK, outputs)  # alive while their addresses are used

    def run() -> None:
        x = kept[0]
        cpu.check(cpu.load().twofour_cpu_apply_all(problems, count, tokens, TYPES[x.dtype], x.data_ptr(), addresses))

    return run


def run(
    model: str, threads: Sequence[int], tokens: Sequence[int], isas: Sequence[str], kinds: Sequence[str] = tuple(KINDS)
) -> dict[str, Any]:
    """The table, printed as it is measured."""
    rows: list[dict[str, Any]] = []
    best = cpu.isa()
    usable = [name for name in isas if cpu.ISAS.index(name) <= cpu.ISAS.index(best)]
    bandwidth = {}
    for count in threads:
        if cpu.set_threads(count) != count:
            raise UserError(
                f"--threads {count} exceeds this process's processors", f"use {cpu.set_threads(count)} or fewer"
            )
        bandwidth[count] = read_bandwidth()
        print(f"{count} threads read {bandwidth[count] / 1e9:.1f} GB/s")
    print(" ".join(f"{name:>{WIDTH}}" for name in HEADINGS))
    for kind in kinds:
        layers = layers_of(model, kind)
        held = sum(weight.nbytes for layer in layers for weight in layer.weights.values())
        for isa in usable:
            if isa == "avx2" and kind.startswith("bf16 "):
                continue  # no separate kernel there
            cpu.use_isa(isa)
            for count in threads:
                cpu.set_threads(count)
                for m in tokens:
                    seconds = measure(layers, m)
                    share = held / seconds / bandwidth[count] if m == 1 else None
                    rows.append(
                        {
                            "kernel": kind,
                            "isa": isa,
                            "threads": count,
                            "tokens": m,
                            "ms": round(seconds * 1e3, 3),
                            "weight_bytes": held,
                            "gb_per_s": round(held / seconds / 1e9, 2),
                            "share_of_read_bandwidth": None if share is None else round(share, 3),
                        }
                    )
        cpu.use_isa(best)
    for row in rows:
        for dense in ("int8", "bf16"):
            other = next((r for r in rows if r["kernel"] == dense and _same(r, row)), None)
            row[f"speedup_over_{dense}"] = None if other is None else round(other["ms"] / row["ms"], 3)
        share = row["share_of_read_bandwidth"]
        cells = (
            *(row[name] for name in ("kernel", "isa", "threads", "tokens")),
            f"{row['ms']:.2f}",
            f"{row['gb_per_s']:.1f}",
            "" if share is None else f"{share:.0%}",
            *(f"{row[f'speedup_over_{dense}'] or 0:.2f}" for dense in ("int8", "bf16")),
        )
        print(" ".join(f"{cell:>{WIDTH}}" for cell in cells))
    return {
        "environment": environment.describe(),
        "model": model,
        "read_gb_per_s": {str(count): round(value / 1e9, 2) for count, value in bandwidth.items()},
        "rows": rows,
    }


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(a[key] == b[key] for key in ("isa", "threads", "tokens"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=sorted(MODELS), default="smollm2-135m")
    parser.add_argument("--threads", default="1,2", metavar="N,N,...")
    parser.add_argument("--kinds", default=",".join(KINDS), metavar="KIND,KIND,...")
    parser.add_argument("--tokens", default="1,4,16,128", metavar="M,M,...")
    parser.add_argument("--isas", default="avx512,avx2", metavar="ISA,ISA,...")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args(arguments)
    try:
        numbers = [[int(text) for text in value.split(",")] for value in (chosen.threads, chosen.tokens)]
        if unknown := set(chosen.kinds.split(",")) - KINDS.keys():
            raise UserError(f"--kinds '{unknown.pop()}' is not measured", f"use some of {', '.join(KINDS)}")
        table = run(chosen.model, numbers[0], numbers[1], chosen.isas.split(","), chosen.kinds.split(","))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if chosen.out:
        write_json(chosen.out, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
