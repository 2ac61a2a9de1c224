"""Times of few tokens by pattern: dense, 2:4, 4:8, 5:8 and 6:8 on the MLP layers of a model, on the GPU here.

    python -m benchmarks.kernels.pattern_times --seconds 60 --out FILE

Weights are cold and launches come from a CUDA graph (plugins/autotune/timing.py); each kernel runs the fastest of its
algorithms. Writes the rows after each one, and stops in time. Requires only torch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import gemm
from benchmarks.kernels.model_shapes import MODELS
from plugins.autotune import timing, tuner
from plugins.autotune.bench import Bench
from plugins.common.errors import UserError
from plugins.common.json_files import write_json
from plugins.common.linear_shape import LinearShape
from plugins.common.patterns import PATTERNS, bytes_per_weight
from plugins.libtwofour import bindings

MLP = ("gate_up_proj", "down_proj")
TOKENS = (1, 8, 16)
FORMATS = ("fp8", "int8", "bf16")
DENSE = ("cublaslt", "torch")


def fastest(bench: Bench, kernels: Sequence[str], tokens: int, timer: tuner.Timer) -> dict[str, Any]:
    """The fastest of `kernels` with its microseconds and algorithm, and why others were left out."""
    times, left_out = [], {}
    for kernel in kernels:
        try:
            times.append(tuner.time_padded(bench, kernel, tokens, timer))
        except (UserError, RuntimeError) as error:
            left_out[kernel] = next(iter(str(error).splitlines()), type(error).__name__)
    best = min(times, key=lambda t: t.us, default=None)
    fastest_one = {} if best is None else {"kernel": best.kernel, "us": round(best.us, 3), "algorithm": best.algorithm}
    return {**fastest_one, "left_out": left_out}


def rows_of(
    layer: LinearShape,
    tokens: Sequence[int],
    expired: Callable[[], bool],
    timer: tuner.Timer = tuner.time_kernel,
    device: torch.device | None = None,
) -> list[dict[str, Any]]:
    """A row for each number of tokens: the dense time, and each pattern's with its ratio to it and its GB/s."""
    l2, place = bindings.context(0).info().l2_bytes, device or torch.device("cuda", 0)
    sizes = {"out_features": layer.out_features, "in_features": layer.in_features}
    facts = {"format": layer.format, "layer": layer.name, **sizes}
    rows: list[dict[str, Any]] = [{**facts, "tokens": count, "patterns": {}} for count in tokens]
    for pattern in PATTERNS:
        bench = Bench(replace(layer, pattern=pattern), place, max(*tokens, *tuner.PADDED), l2)
        for row in rows:
            if expired():
                return rows
            if "dense" not in row:
                row["dense"] = fastest(bench, DENSE, row["tokens"], timer)
            sparse = [k for k in tuner.kernels_of(pattern, row["tokens"]) if k not in DENSE]
            cell = fastest(bench, sparse, row["tokens"], timer)
            if "us" in cell:
                width = 2 if layer.format in ("bf16", "fp16") else 1
                cell["gb_s"] = round(layer.numel * bytes_per_weight(pattern, width) / cell["us"] / 1e3, 1)
                cell["ratio"] = round(row["dense"]["us"] / cell["us"], 4) if "us" in row["dense"] else None
            row["patterns"][pattern] = cell
        del bench
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return rows


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    cells = [
        f"{pattern} {cell['us']:.2f} ({cell['ratio']:.2f}x)"
        for pattern, cell in row["patterns"].items()
        if "us" in cell
    ]
    dense = f"dense {row['dense']['us']:.2f}" if "us" in row.get("dense", {}) else "no dense kernel"
    return f"{row['format']:5}{row['layer']:14}{row['tokens']:>4} tokens, us: {dense}, {', '.join(cells)}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=sorted(MODELS), default="llama-3.1-8b")
    parser.add_argument("--dtype", default=",".join(FORMATS), help="number formats, with commas")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--seconds", type=float, default=60.0, help="stop after about this many seconds")
    parser.add_argument("--out", type=Path, help="write the rows to this file, after each layer")
    chosen = parser.parse_args(arguments)
    deadline = time.monotonic() + chosen.seconds
    tokens = [int(count) for count in chosen.tokens.split(",")]
    rows: list[dict[str, Any]] = []
    try:
        for format in chosen.dtype.split(","):
            for layer in (layer for layer in MODELS[chosen.model].layers(format) if layer.name in MLP):
                new = rows_of(layer, tokens, lambda: time.monotonic() > deadline)
                rows += [{"model": chosen.model, **row} for row in new if row["patterns"]]
                for row in new:
                    print(line(row), flush=True)
                if chosen.out is not None:
                    write_json(chosen.out, {"device": timing.device_facts(), "rows": rows})
        if chosen.out is None:
            print(gemm.save("patterns", {"rows": rows}))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
