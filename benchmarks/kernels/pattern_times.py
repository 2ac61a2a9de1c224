"""Times of few tokens by pattern: dense, 2:4, 4:8, 5:8 and 6:8 on the MLP layers of a model, on the GPU here.

    python -m benchmarks.kernels.pattern_times --seconds 60 --out FILE

Weights are cold and launches come from a CUDA graph (plugins/autotune/timing.py); each kernel runs the fastest of its
algorithms. Writes the rows after each one, and stops in time. Requires only torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.kernels.layer_times import DENSE, fastest, parser_of, run, sparse_kernels
from plugins.autotune import tuner
from plugins.autotune.bench import Bench
from plugins.common.linear_shape import LinearShape
from plugins.common.patterns import PATTERNS, bytes_per_weight
from plugins.libtwofour import bindings

MLP = ("gate_up_proj", "down_proj")
TOKENS = (1, 8, 16)
FORMATS = ("fp8", "int8", "bf16")


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
            cell = fastest(bench, sparse_kernels(pattern, row["tokens"]), row["tokens"], timer)
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
    chosen = parser_of((__doc__ or "").splitlines()[0], FORMATS, TOKENS, 60.0).parse_args(arguments)
    return run(chosen, MLP, rows_of, lambda row: row["patterns"], line, "patterns")


if __name__ == "__main__":
    sys.exit(main())
