"""Times of hybrid layers at few tokens on the GPU here: one launch for both parts, two products, a dense one, all 2:4.

    python -m benchmarks.kernels.hybrid_times --seconds 120 --out FILE

Each kernel runs the fastest of its algorithms, as in pattern_times.py. Writes the rows after each layer, and stops in
time. Requires only torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.kernels.layer_times import DENSE, fastest, parser_of, run, sparse_kernels
from plugins.autotune import tuner
from plugins.autotune.bench import Bench, HybridBench
from plugins.autotune.choice import Hybrid
from plugins.common.linear_shape import LinearShape
from plugins.libtwofour import bindings, hybrid_ops
from plugins.sparsity.segments import ALIGNMENT, Axis

AXES: dict[str, Axis] = {"qkv_proj": "rows", "o_proj": "inputs", "gate_up_proj": "rows", "down_proj": "inputs"}
TOKENS = (1, 8, 16, 64)
FORMATS = ("fp8", "int8")


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
            own = sparse_kernels(shape.pattern, row["tokens"])
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
    parser = parser_of((__doc__ or "").splitlines()[0], FORMATS, TOKENS, 120.0)
    parser.add_argument("--share", type=float, default=0.5, help="of the rows or inputs that are 2:4")
    chosen = parser.parse_args(arguments)

    def rows(layer: LinearShape, tokens: Sequence[int], expired: Callable[[], bool]) -> list[dict[str, Any]]:
        return rows_of(layer, chosen.share, tokens, expired)

    return run(chosen, AXES, rows, lambda row: "dense" in row, line, "hybrid", {"share": chosen.share})


if __name__ == "__main__":
    sys.exit(main())
