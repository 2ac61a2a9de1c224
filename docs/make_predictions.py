"""Renders docs/predictions.md: published figures with the predictions for their conditions."""

from collections.abc import Iterator
from typing import Any

from result_files import File, device_name, newest

from benchmarks.kernels import targets
from benchmarks.roofline import published, roofline
from benchmarks.roofline.published import Comparison, Kernel

INTRODUCTION = """# Predictions against published figures

Made by `make docs` from `benchmarks/roofline/published.yaml`; do not edit.

`twofour plan`, and `twofour explain` without a GPU, predict the time of a matrix product from a roofline: {launch} us
for the kernel's launch inside a CUDA graph, plus the longest of three times: moving the bytes at the memory's rate,
multiplying at the tensor cores' rate, and one wave of blocks, {wave} us (source: `benchmarks/roofline/gpus.yaml`). So
no kernel takes less than {least:.2f} us, and a layer whose dense product takes no longer gains nothing from 2:4: a
256 x 256 weight is predicted at 1.00x. These are **limits**: no real kernel reaches the full rates.

This page compares the limits with every published figure known to us that gives its conditions. The error is
predicted / published - 1. For a speed-up, an error above zero means that the prediction exceeds the measurement. For a
time, an error below zero means that the kernel was slower than its limit.

| figures | number | median absolute error | median error |
|---|---|---|---|
"""

FAR_OFF = """
The largest errors: sparse kernels of 2021 (CUDALibrarySamples#57) and Ampere's kernels on Hopper (cutlass#1335);
B200 at 64 tokens, where no 2:4 kernel was measured below 8.28 us; and prefill, where whole models spend time in kernels
that the prediction excludes (attention, norms, quantization).
"""
COLUMNS = """
| source | GPU | conditions | predicted | published | error |
|---|---|---|---|---|---|
"""


def page() -> str:
    rows = published.comparisons()
    kinds = list(dict.fromkeys(row.kind for row in rows))
    card = roofline.gpu("H100")
    parts = [
        INTRODUCTION.format(least=card.least_kernel_seconds * 1e6, launch=card.launch_us, wave=card.wave_us),
        "".join(_summary(kind, [row for row in rows if row.kind == kind]) for kind in kinds),
        _summary("all", rows),
        FAR_OFF,
    ]
    for kind in kinds:
        parts.append(_section(kind, [row for row in rows if row.kind == kind]))
    parts += map(_own, newest("gpu", device_name).values())
    parts.append(_sources())
    parts.append("\n## Figures left out\n\n| figure | missing or unsuitable |\n|---|---|\n")
    parts += [f"| {each.what} | {each.missing} |\n" for each in published.published().left_out]
    return "".join(parts)


def _summary(kind: str, rows: list[Comparison]) -> str:
    size, signed = published.median_error(rows), published.median_error(rows, signed=True)
    return f"| {kind} | {len(rows)} | {size:.0%} | {signed:+.0%} |\n"


def _section(kind: str, rows: list[Comparison]) -> str:
    unit = " us" if kind == "kernel time" else "x"
    head = f"\n## {kind.capitalize()}\n{COLUMNS}"
    lines = (
        f"| {row.source} | {row.gpu} | {row.conditions} | {row.predicted:.2f}{unit} | {row.published:.2f}{unit} "
        f"| {row.error:+.0%} |\n"
        for row in rows
    )
    return head + "".join(lines)


def _own(file: File) -> str:
    """Our own measurements on one GPU, with the predictions for the same conditions."""
    result, path = file
    gpu = device_name(result)
    rows = [*_own_kernels(result, gpu), *_own_engine(result["steps"], gpu)]
    if not rows:
        return ""
    size, signed = published.median_error(rows), published.median_error(rows, signed=True)
    head = (
        f"\n## Measured by this project: {gpu}\n\nSpeed-ups of the best 2:4 kernel over the best dense kernel, weights "
        f"cold, and of the torch engine's decode\n([values](../{path})). Median absolute error "
        f"{size:.0%}, median error {signed:+.0%}.\n\n| conditions | predicted | measured | error |\n|---|---|---|---|\n"
    )
    lines = (f"| {row.conditions} | {row.predicted:.2f}x | {row.published:.2f}x | {row.error:+.0%} |\n" for row in rows)
    return head + "".join(lines)


def _own_kernels(result: dict[str, Any], gpu: str) -> Iterator[Comparison]:
    for row in targets.judged(result):
        times = row["kernels_us"]
        if row["dense"] in times and row["sparse"] in times:
            ratio, shape = times[row["dense"]] / times[row["sparse"]], (row["out_features"], row["in_features"])
            kernel = Kernel(
                source=gpu, gpu=gpu, format=row["format"], tokens=(row["tokens"],), shape=shape, ratio=ratio
            )
            yield from published.compare_kernel(kernel)


def _own_engine(steps: dict[str, Any], gpu: str) -> Iterator[Comparison]:
    result = steps.get("engine", {}).get("result") or {}
    sides = result.get("results", {})
    for batch, built_us in sides.get("fp8-2of4", {}).get("decode_us", {}).items():
        for base in ("fp8", "bf16"):
            if base_us := sides.get(base, {}).get("decode_us", {}).get(batch):
                load = {"model": result["model"], "batch": int(batch), "input": result["context"]}
                yield published.compare_decode(gpu, base, base_us / built_us, **load)


def _sources() -> str:
    head = "\n## Sources\n\n| name | where | how it was measured |\n|---|---|---|\n"
    sources = published.published().sources.items()
    return head + "".join(f"| {name} | <{source.url}> | {source.note} |\n" for name, source in sources)
