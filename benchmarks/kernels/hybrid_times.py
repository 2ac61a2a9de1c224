"""Times of hybrid layers at few tokens on the GPU here: one launch for both parts, two products, a dense one, all 2:4.

    python -m benchmarks.kernels.hybrid_times --seconds 120 --out FILE

Each kernel runs the fastest of its algorithms, as in pattern_times.py. Writes the rows after each layer, and stops in
time. Requires only torch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import gemm
from benchmarks.kernels.model_shapes import MODELS
from benchmarks.kernels.pattern_times import DENSE, fastest
from plugins.autotune import timing, tuner
from plugins.autotune.bench import Bench, HybridBench
from plugins.autotune.choice import Hybrid
from plugins.common.errors import UserError
from plugins.common.json_files import write_json
from plugins.common.linear_shape import LinearShape
from plugins.libtwofour import bindings, hybrid_ops
from plugins.sparsity.segments import ALIGNMENT, Axis

AXES: dict[str, Axis] = {"qkv_proj": "rows", "o_proj": "inputs", "gate_up_proj": "rows", "down_proj": "inputs"}
TOKENS = (1, 8, 16, 64)


def rows_of(
    layer: LinearShape,
    share: float,
    tokens: Sequence[int],
    expired: Callable[[], bool],
    timer: tuner.Timer = tuner.time_kernel,
    device: torch.device | None = None,
) -> list[dict[str, Any]]:
    """A row for each number of tokens, with the fastest kernel of each way to multiply; without those out of time."""
    axis = AXES[layer.name]
    side = layer.out_features if axis == "rows" else layer.in_features
    size = round(side * share / ALIGNMENT) * ALIGNMENT
    shapes, l2, most = Hybrid.of(layer, axis, size), bindings.context(0).info().l2_bytes, max(*tokens, *tuner.PADDED)
    place, cut = device or torch.device("cuda", 0), hybrid_ops.Cut(layer.pattern, axis, size)
    sizes = {"out_features": layer.out_features, "in_features": layer.in_features, axis: size}
    rows: list[dict[str, Any]] = [{"format": layer.format, "layer": layer.name, **sizes, "tokens": n} for n in tokens]
    ways: tuple[tuple[str, LinearShape, bool], ...] = (
        ("dense", layer, False),
        ("one", layer, False),
        ("sparse", shapes.sparse, True),
        ("rest", shapes.rest, False),
        ("whole", layer, True),
    )
    for way, shape, sparse in ways:
        kind = HybridBench(shape, place, most, l2, cut=cut) if way == "one" else Bench(shape, place, most, l2)
        for row in rows:
            if expired():
                return rows
            own = [kernel for kernel in tuner.kernels_of(shape.pattern, row["tokens"]) if kernel not in DENSE]
            kernels = [cut.kernel] if way == "one" else own if sparse else DENSE
            row[way] = fastest(kind, kernels, row["tokens"], timer)
        del kind
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return rows


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    us = {way: row.get(way, {}).get("us") for way in ("dense", "one", "sparse", "rest", "whole")}
    two = None if us["sparse"] is None or us["rest"] is None else us["sparse"] + us["rest"]
    named = {"dense": us["dense"], "one launch": us["one"], "two products": two, "sparse in all": us["whole"]}
    cells = ", ".join(f"{name} {'-' if value is None else f'{value:.2f}'}" for name, value in named.items())
    return f"{row['format']:5}{row['layer']:14}{row['tokens']:>4} tokens, us: {cells}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=sorted(MODELS), default="llama-3.1-8b")
    parser.add_argument("--dtype", default="fp8,int8", help="number formats, with commas")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--share", type=float, default=0.5, help="of the rows or inputs that are 2:4")
    parser.add_argument("--seconds", type=float, default=120.0, help="stop after about this many seconds")
    parser.add_argument("--out", type=Path, help="write the rows to this file, after each layer")
    chosen = parser.parse_args(arguments)
    deadline = time.monotonic() + chosen.seconds
    tokens = [int(count) for count in chosen.tokens.split(",")]
    rows: list[dict[str, Any]] = []
    try:
        for format in chosen.dtype.split(","):
            for layer in (layer for layer in MODELS[chosen.model].layers(format) if layer.name in AXES):
                new = rows_of(layer, chosen.share, tokens, lambda: time.monotonic() > deadline)
                rows += [{"model": chosen.model, "share": chosen.share, **row} for row in new if "dense" in row]
                for row in new:
                    print(line(row), flush=True)
                if chosen.out is not None:
                    write_json(chosen.out, {"device": timing.device_facts(), "rows": rows})
        if chosen.out is None:
            print(gemm.save("hybrid", {"rows": rows}))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
