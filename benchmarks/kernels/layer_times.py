"""What the commands share that time a model's layers on the GPU here: the fastest of several kernels, options, a loop.

Each kernel runs the fastest of its algorithms. The rows are written after each layer, and the loop stops in time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernels import gemm
from benchmarks.kernels.model_shapes import MODELS
from plugins.autotune import timing, tuner
from plugins.autotune.bench import Bench
from plugins.common.errors import UserError
from plugins.common.json_files import write_json
from plugins.common.linear_shape import LinearShape

DENSE = ("cublaslt", "torch")

Row = dict[str, Any]
RowsOf = Callable[[LinearShape, Sequence[int], Callable[[], bool]], list[Row]]
"""The rows of a layer at these numbers of tokens, as far as measured before the time has expired."""


def fastest(bench: Bench, kernels: Sequence[str], tokens: int, timer: tuner.Timer) -> Row:
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


def sparse_kernels(pattern: str, tokens: int) -> list[str]:
    """The kernels that multiply a weight of the pattern, without those of dense weights."""
    return [kernel for kernel in tuner.kernels_of(pattern, tokens) if kernel not in DENSE]


def parser_of(
    description: str, formats: Sequence[str], tokens: Sequence[int], seconds: float
) -> argparse.ArgumentParser:
    """The options that the commands share, with a command's defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", choices=sorted(MODELS), default="llama-3.1-8b")
    parser.add_argument("--dtype", default=",".join(formats), help="number formats, with commas")
    parser.add_argument("--tokens", default=",".join(map(str, tokens)))
    parser.add_argument("--seconds", type=float, default=seconds, help="stop after about this many seconds")
    parser.add_argument("--out", type=Path, help="write the rows to this file, after each layer")
    return parser


def run(
    chosen: argparse.Namespace,
    layers: Collection[str],
    rows_of: RowsOf,
    measured: Callable[[Row], object],
    line: Callable[[Row], str],
    name: str,
    facts: Mapping[str, Any] | None = None,
) -> int:
    """Times the layers named in `layers`, prints a line for each row, and writes those `measured` with `facts`."""
    deadline = time.monotonic() + chosen.seconds
    tokens = [int(count) for count in chosen.tokens.split(",")]
    rows: list[Row] = []
    try:
        for format in chosen.dtype.split(","):
            for layer in (layer for layer in MODELS[chosen.model].layers(format) if layer.name in layers):
                new = rows_of(layer, tokens, lambda: time.monotonic() > deadline)
                rows += [{"model": chosen.model, **(facts or {}), **row} for row in new if measured(row)]
                for row in new:
                    print(line(row), flush=True)
                if chosen.out is not None:
                    write_json(chosen.out, {"device": timing.device_facts(), "rows": rows})
        if chosen.out is None:
            print(gemm.save(name, {"rows": rows}))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
