"""Renders docs/predictions.md: published figures beside the predictions for their conditions."""

from benchmarks.roofline import published, roofline
from benchmarks.roofline.published import Comparison

INTRODUCTION = """# Predictions against published figures

Made by `make docs` from `benchmarks/roofline/published.yaml`; do not edit.

`twofour plan`, and `twofour explain` without a GPU, predict times from a roofline: the longest of moving the bytes at
the memory's rate, multiplying at the tensor cores' rate, and a kernel's least time, {least:.2f} us: {launch} us for
a launch inside a CUDA graph and {wave} us for one wave of blocks (`benchmarks/roofline/gpus.yaml` gives the source).
These are **limits**. A layer whose dense product takes no longer than a kernel's least time gains nothing from 2:4: a
weight of 256 x 256 is predicted at 1.00x.

This page compares the limits with every published figure known to us that gives its conditions. An error is
predicted / published - 1. For a speed-up, an error above zero means that the prediction promises more than was
measured. For a time, an error below zero means that the kernel was slower than its limit.

| figures | number | median error, sign ignored | median error |
|---|---|---|---|
"""

FAR_OFF = """
Where the limits are far off: sparse kernels of 2021 (CUDALibrarySamples#57) and Ampere's kernels on Hopper
(cutlass#1335); B200 at 64 tokens, where no 2:4 kernel was measured below 8.28 us; and prefill, where whole models
spend time in kernels that the prediction leaves out (attention, norms, quantization).
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
    parts.append(_sources())
    parts.append("\n## Left out\n\n| figure | missing |\n|---|---|\n")
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


def _sources() -> str:
    head = "\n## Sources\n\n| name | where | how it was measured |\n|---|---|---|\n"
    sources = published.published().sources.items()
    return head + "".join(f"| {name} | <{source.url}> | {source.note} |\n" for name, source in sources)
