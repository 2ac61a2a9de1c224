"""Compares a result file of the GPU suite with the targets of docs/kernels.md, as a Markdown table:

    python -m benchmarks.kernels.targets benchmarks/results/gpu-*.json

Imports no torch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plugins.common.errors import UserError
from plugins.common.json_files import read_json

MLP = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Target:
    """A ratio that every row of a kind has to reach."""

    name: str
    least: float
    ratios: Callable[[dict[str, Any]], list[float]]


def rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of all kernel tables of a results file."""
    tables = (step.get("result", {}) for name, step in results["steps"].items() if name.startswith("table"))
    return [row for table in tables for row in table.get("rows", [])]


def judged(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with a fair baseline: where cuBLASLt could not run, the dense time is not a best time."""
    return [row for row in rows(results) if "cublaslt" not in row.get("left_out", {})]


def kernel_ratios(format: str, accepts: Callable[[dict[str, Any]], bool]) -> Callable[[dict[str, Any]], list[float]]:
    """Dense time over 2:4 time of the rows of `format` that `accepts` takes."""
    return lambda results: [r["ratio"] for r in judged(results) if r["format"] == format and r["ratio"] and accepts(r)]


def against_fp8(results: dict[str, Any]) -> list[float]:
    """Dense FP8 time over INT8 2:4 time where both were measured, from 1024 tokens up."""
    dense = {_key(r): r["kernels_us"][r["dense"]] for r in judged(results) if r["format"] == "fp8" and r["dense"]}
    sparse = {_key(r): r["kernels_us"][r["sparse"]] for r in rows(results) if r["format"] == "int8" and r["sparse"]}
    return [dense[key] / us for key, us in sparse.items() if key in dense and key[-1] >= 1024]


def engine_ratio(baseline: str, batch: str = "8") -> Callable[[dict[str, Any]], list[float]]:
    """The engine's decode speed-up over a dense model."""

    def ratios(results: dict[str, Any]) -> list[float]:
        speedup = results["steps"].get("engine", {}).get("result", {}).get("speedup", {})
        ratio = speedup.get(f"decode_us over {baseline}", {}).get(batch)
        return [] if ratio is None else [ratio]

    return ratios


def _key(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["model"], row["layer"], row["tokens"]


def _few(row: dict[str, Any]) -> bool:
    return row["tokens"] <= 16 and row["layer"] in MLP


def _many(row: dict[str, Any]) -> bool:
    return bool(row["tokens"] >= 1024)


TARGETS = (
    Target("FP8 2:4 over dense FP8, 1 to 16 tokens, MLP layers", 1.45, kernel_ratios("fp8", _few)),
    Target("INT8 2:4 over dense INT8, 1 to 16 tokens, MLP layers", 1.45, kernel_ratios("int8", _few)),
    Target("FP8 2:4 over dense FP8, from 1024 tokens", 1.6, kernel_ratios("fp8", _many)),
    Target("INT8 2:4 over dense INT8, from 1024 tokens", 1.6, kernel_ratios("int8", _many)),
    Target("INT8 2:4 over dense FP8, from 1024 tokens", 1.6, against_fp8),
    Target("engine, decode of 8 requests, over dense FP8", 1.35, engine_ratio("fp8")),
    Target("engine, decode of 8 requests, over bf16", 2.4, engine_ratio("bf16")),
)


def table(results: dict[str, Any]) -> Iterator[str]:
    """Lines of the table: target, how many rows, their least, geometric mean and most, and how many reach it."""
    yield "| target | at least | rows | least | mean | most | reached by |"
    yield "|---|---|---|---|---|---|---|"
    for target in TARGETS:
        ratios = target.ratios(results)
        if not ratios:
            yield f"| {target.name} | {target.least}x | 0 | | | | not measured |"
            continue
        mean = statistics.geometric_mean(ratios)
        reached = sum(ratio >= target.least for ratio in ratios)
        numbers = " | ".join(f"{number:.2f}x" for number in (min(ratios), mean, max(ratios)))
        yield f"| {target.name} | {target.least}x | {len(ratios)} | {numbers} | {reached} of {len(ratios)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file", type=Path, help="a result file of the GPU suite")
    chosen = parser.parse_args(arguments)
    try:
        try:
            results = read_json(chosen.file)
            lines = list(table(results))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"'{chosen.file}' is not a result file of the GPU suite ({error}): give one") from error
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
