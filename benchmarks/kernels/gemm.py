"""The kernel table: each layer shape of a model, dense against 2:4, with the limits of the GPU.

    python -m benchmarks.kernels.gemm --model llama-3.1-8b --dtype fp8 --tokens 1,8,16,64,512,4096

For each shape and number of tokens: the best dense time (cuBLASLt by our search, or torch), the best 2:4 time
(cuSPARSELt, the skinny kernel), their ratio, TFLOP/s and GB/s of the 2:4 kernel, its share of ceilings measured on this
GPU, and both kernels' errors against float64. torch's own 2:4 products follow each line
(benchmarks/kernels/torch_sparse.py). Weights are cold (plugins/autotune/timing.py).

TFLOP/s count the multiplications of the dense product; a 2:4 kernel skips half of them, so its ceiling is twice dense.
Requires only torch: no pydantic, no yaml.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.kernels.gpu_machine import read_rate
from benchmarks.kernels.gpu_suite import RESULTS, results_file
from benchmarks.kernels.model_shapes import MODELS
from benchmarks.kernels.torch_sparse import PEERS
from plugins.autotune import choice, reuse, timing, tuner
from plugins.autotune.bench import Bench
from plugins.common.defaults import MAX_SKINNY_TOKENS
from plugins.common.errors import UserError
from plugins.common.json_files import write_json
from plugins.common.linear_shape import LinearShape
from plugins.libtwofour import bindings, structures, torch_ops

TOKENS = (1, 8, 16, 64, 512, 4096)
ERROR_TOKENS = 64  # rows that are compared with float64
ERROR_FEATURES = 1024


@dataclass(frozen=True)
class Ceilings:
    """The GPU's measured peaks: bytes a second read from memory, and dense FLOP a second of each format."""

    bandwidth: float
    flops: dict[str, float]


def measure_ceilings(formats: Iterable[str], device: int = 0) -> Ceilings:
    """A large read, and a large square product of each format by the best dense kernel."""
    l2 = bindings.context(device).info().l2_bytes
    where = torch.device("cuda", device)
    bandwidth = read_rate(where)
    flops = {}
    for format in formats:
        bench = Bench(LinearShape(8192, 8192, format), where, 8192, l2)
        times = []
        for kernel in ("cublaslt", "torch"):
            with contextlib.suppress(UserError, RuntimeError):  # a kernel that refuses this product sets no limit
                times.append(tuner.time_kernel(bench, kernel, 8192).us)
        if times:
            flops[format] = 2 * 8192**3 / (min(times) * 1e-6)
        del bench
        torch.cuda.empty_cache()
    return Ceilings(bandwidth, flops)


def row(bench: Bench, tokens: int, ceilings: Ceilings, peers: bool, timer: tuner.Timer) -> dict[str, Any]:
    """One line of the table: every kernel's time in microseconds, and what follows from them."""
    times, left_out = {}, {}
    for kernel in ("cublaslt", "torch", "cusparselt", "skinny"):
        if kernel == "skinny" and tokens > MAX_SKINNY_TOKENS:
            continue
        try:
            times[kernel] = tuner.time_padded(bench, kernel, tokens, timer)
        except (UserError, RuntimeError) as error:
            left_out[kernel] = next(iter(str(error).splitlines()), type(error).__name__)
    bucket = choice.choose(tokens, times.values())
    best = {side: _fastest(times, side == "dense") for side in ("dense", "sparse")}
    cell: dict[str, Any] = {
        "kernels_us": {kernel: round(t.us, 3) for kernel, t in times.items()},
        "left_out": left_out,
    }
    cell["notes"] = {kernel: list(t.notes) for kernel, t in times.items() if t.notes}
    cell["algorithms"] = {kernel: t.algorithm for kernel, t in times.items() if t.algorithm is not None}
    cell |= {"dense": best["dense"], "sparse": best["sparse"], "kept": bucket["kernel"], "ratio": bucket["ratio"]}
    if best["sparse"] is not None:
        cell |= speeds(bench.shape, tokens, times[best["sparse"]].us * 1e-6, ceilings)
    cell["error"] = {side: None if kernel is None else error_of(bench, kernel, tokens) for side, kernel in best.items()}
    if peers:
        cell["peers_us"] = {name: peer(bench, tokens) for name, peer in PEERS.items()}
    return cell


def speeds(shape: LinearShape, tokens: int, seconds: float, ceilings: Ceilings) -> dict[str, Any]:
    """TFLOP/s, GB/s and share of the nearer ceiling of a 2:4 product that took `seconds`."""
    n, k = shape.out_features, shape.in_features
    width = 2 if shape.format in ("fp16", "bf16") else 1
    moved = n * k * (width / 2 + 1 / 8) + tokens * (k * width + 2 * n)
    flops = 2.0 * tokens * n * k
    of_memory = moved / seconds / ceilings.bandwidth
    of_math = flops / seconds / (2 * ceilings.flops.get(shape.format, math.inf))
    return {
        "tflops": round(flops / seconds / 1e12, 2),
        "gb_s": round(moved / seconds / 1e9, 1),
        "limit": "memory" if of_memory >= of_math else "math",
        "share": round(max(of_memory, of_math), 4),
    }


def error_of(bench: Bench, kernel: str, tokens: int) -> float:
    """The kernel's relative error (root mean square) against float64, on the first rows and a sample of features."""
    x_MK, n = bench.x[:tokens], bench.shape.out_features
    if kernel == "torch":
        y_MN = tuner.torch_dense(bench, x_MK)(bench.dense)
    else:
        operator: Callable[..., torch.Tensor] = {
            "cublaslt": torch_ops.dense_linear,
            "cusparselt": torch_ops.cusparselt_linear,
            "skinny": torch_ops.skinny_linear,
        }[kernel]
        y_MN = operator(x_MK, bench.copies(kernel)[0], bench.scale, bench.channel_scales, None, n, bench.out_dtype)
    rows = min(tokens, ERROR_TOKENS)
    features = torch.linspace(0, n - 1, min(n, ERROR_FEATURES), device=bench.device).long()
    exact = x_MK[:rows].double() @ _take(bench.dense, features).double().T * bench.scale
    difference = y_MN[:rows].index_select(1, features).double() - exact
    return float(difference.norm() / exact.norm())


def table(
    model: str,
    formats: Sequence[str],
    tokens: Sequence[int],
    *,
    peers: bool = False,
    device: int = 0,
    report: Callable[[str], None] = print,
    expired: Callable[[], bool] = lambda: False,
    keep: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """The table of one model, the largest layers first. Stops early, with a note, once `expired()`.

    `keep` gets the rows so far after each one: a kernel that ends the process takes only its own with it. Raises
    UserError where there is no GPU.
    """
    ceilings = measure_ceilings(formats, device)
    l2 = bindings.context(device).info().l2_bytes
    rows: list[dict[str, Any]] = []
    report(HEADER)
    for format in formats:
        for shape in sorted(MODELS[model].layers(format), key=lambda shape: -shape.numel):
            bench = Bench(shape, torch.device("cuda", device), max(*tokens, *tuner.PADDED), l2)
            for count in tokens:
                if expired():
                    report(f"out of time before {format} {shape.name} at {count} tokens")
                    return rows
                sizes = {"out_features": shape.out_features, "in_features": shape.in_features}
                facts = {"model": model, "layer": shape.name, **sizes, "format": format}
                rows.append({**facts, "tokens": count, **row(bench, count, ceilings, peers, tuner.time_kernel)})
                keep(rows)
                report(line(rows[-1]))
            del bench
            torch.cuda.empty_cache()
    return rows


HEADER = (
    f"{'model':14}{'layer':14}{'type':5}{'tokens':>7}{'dense us':>10}{'':11}{'2:4 us':>9}{'':11}{'ratio':>7}"
    f"{'TFLOP/s':>9}{'GB/s':>7}{'share':>7}{'error':>10}{'vs dense':>9}"
)


def line(row: dict[str, Any]) -> str:
    """A row as text, under HEADER."""
    text = _ours(row)
    for name, us in row.get("peers_us", {}).items():
        text += f"\n{'':26}{name}: " + (f"{us:.2f} us" if isinstance(us, float) else us)
    return text


def _ours(row: dict[str, Any]) -> str:
    us, dense, sparse = row["kernels_us"], row["dense"], row["sparse"]
    errors = row["error"]
    text = f"{row['model']:14}{row['layer']:14}{row['format']:5}{row['tokens']:>7}"
    text += f"{us[dense]:>10.2f} {dense:10}" if dense else f"{'-':>10} {'':10}"
    if sparse is None:
        return text + f"{'-':>9} {'no 2:4 kernel':10}"
    text += f"{us[sparse]:>9.2f} {sparse:10}" + (f"{row['ratio']:>6.2f}x" if row["ratio"] else f"{'-':>7}")
    text += f"{row['tflops']:>9.1f}{row['gb_s']:>7.0f}{row['share']:>7.0%}{errors['sparse']:>10.2e}"
    return text + (f"{errors['sparse'] / errors['dense']:>9.3f}" if errors["dense"] else "")


def save(kind: str, content: dict[str, Any], device: int = 0) -> Path:
    """Writes `content` with the machine and the versions to results/, named by kind, GPU and date. Returns the file.

    Also without the library: a failure is a result.
    """
    facts = timing.device_facts(device)
    file = results_file(RESULTS, facts["name"], kind)
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        versions = reuse.versions(bindings.context(device).info())
    except UserError as error:
        versions = {"libtwofour": str(error), "torch": torch.__version__, "cuda": torch.version.cuda}
    whole = {"kind": kind, "device": facts, "versions": versions, "environment": environment.describe(), **content}
    write_json(file, whole)
    return file


def _fastest(times: dict[str, choice.Timing], dense: bool) -> str | None:
    side = [kernel for kernel in times if (kernel in choice.NAMES) == dense]
    return min(side, key=lambda kernel: times[kernel].us, default=None)


def _take(weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of a weight; float8 by its bytes, as it has few operators."""
    if weight.dtype == torch.float8_e4m3fn:
        return weight.view(torch.int8).index_select(0, rows).view(torch.float8_e4m3fn)
    return weight.index_select(0, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=sorted(MODELS), default="llama-3.1-8b")
    parser.add_argument("--dtype", default="fp8", help="bf16, fp16, int8, fp8; more with commas")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after about this many seconds")
    parser.add_argument("--out", type=Path, help="write the rows to this file, after each one")
    parser.add_argument("--no-peers", action="store_true", help="skip torch's own 2:4 products")
    chosen = parser.parse_args(arguments)
    formats = chosen.dtype.split(",")
    try:
        for format in formats:
            if format not in structures.FORMATS:
                raise UserError(
                    f"'{format}' is not a number format of the kernels: use one of {', '.join(structures.FORMATS)}"
                )
        tokens = [int(count) for count in chosen.tokens.split(",")]
        deadline = time.monotonic() + chosen.seconds
        rows = table(
            chosen.model,
            formats,
            tokens,
            peers=not chosen.no_peers,
            expired=lambda: time.monotonic() > deadline,
            keep=lambda rows: None if chosen.out is None else write_json(chosen.out, {"rows": rows}),
        )
        if chosen.out is None:
            print(save("gemm", {"rows": rows}))
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
