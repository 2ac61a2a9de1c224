"""Renders the marked blocks of docs/kernels.md: kernels and engines on a CPU, from files in benchmarks/results/."""

from typing import Any

from make_readme import fill
from result_files import ROOT, newest

PAGE = ROOT / "docs" / "kernels.md"
KERNELS = """
Read bandwidth of this machine: {bandwidth}. One token through all linear layers of SmolLM2-135M's blocks, each block's
weights from memory ([values](../{path})):

| weights | instructions | threads | ms | GB/s | of the read bandwidth | over dense INT8 | over dense bf16 |
|---|---|---|---|---|---|---|---|
{rows}"""
BUSY = """
One request while another process keeps one of {cores} cores busy ([one thread](../{one}), [two](../{two})), ms:

| | each later token: 1 thread | 2 threads | a prompt of {prompt}: 1 thread | 2 threads |
|---|---|---|---|---|
{rows}"""


def page() -> str:
    return fill(PAGE, {"cpu kernels": _kernels, "busy core": _busy})


def _kernels() -> str:
    ((result, path),) = newest("cpu_kernels", lambda result: result["model"]).values()
    rows = [
        f"| {row['kernel']} | {row['isa']} | {row['threads']} | {row['ms']:.2f} | {row['gb_per_s']:.1f} "
        f"| {row['share_of_read_bandwidth']:.0%} | {_ratio(row, 'int8')} | {_ratio(row, 'bf16')} |\n"
        for row in result["rows"]
        if row["tokens"] == 1
    ]
    bandwidth = ", ".join(
        f"{value:.1f} GB/s with {count} thread(s)" for count, value in result["read_gb_per_s"].items()
    )
    return KERNELS.format(bandwidth=bandwidth, path=path, rows="".join(rows))


def _ratio(row: dict[str, Any], dense: str) -> str:
    ratio = row[f"speedup_over_{dense}"]
    return "" if ratio is None or row["kernel"] == dense else f"{ratio:.2f}x"


def _busy() -> str:
    files = newest("llama_cpp_busy", lambda result: str(result["settings"]["threads"]))
    (one, one_path), (two, two_path) = files["1"], files["2"]
    rows = [
        f"| {name} | "
        + " | ".join(
            f"{result['contenders'][name][key]:.1f}" for key in ("decode_ms", "prefill_ms") for result in (one, two)
        )
        + " |\n"
        for name in one["contenders"]
    ]
    return BUSY.format(
        cores=one["environment"]["cores"],
        prompt=one["settings"]["prompt"],
        rows="".join(rows),
        one=one_path,
        two=two_path,
    )
