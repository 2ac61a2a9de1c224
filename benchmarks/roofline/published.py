"""Compares predictions with published figures: speed-ups of kernels, times of kernels, speed-ups of whole models.

`published.yaml` holds each figure with its source and conditions. A prediction is a limit, so its error is mostly above
zero against a published speed-up, and mostly below zero against a published time. Imports no torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import chain
from typing import Any, Literal

import yaml
from pydantic import Field

from benchmarks.kernels.model_shapes import MODELS
from benchmarks.roofline import roofline
from benchmarks.roofline.roofline import Gpu
from plugins.common.config_base import Config
from plugins.common.linear_shape import LinearShape

Kind = Literal["kernel speed-up", "kernel time", "end to end"]


class Source(Config):
    """Where figures are from, and how they were measured."""

    url: str
    note: str


class Kernel(Config):
    """A GEMM of `shape` [out_features, in_features], or the four GEMMs of each model's block, summed.

    `ratio` is dense time over 2:4 time, geometric mean over models and token counts; `us` are microseconds by side.
    """

    source: str
    gpu: str
    format: str
    tokens: tuple[int, ...]
    shape: tuple[int, int] | None = None
    models: tuple[str, ...] = ()
    ratio: float | None = None
    us: dict[Literal["dense", "sparse"], float] = Field(default_factory=dict)


class EndToEnd(Config):
    """A model's speed-up: formats of both sides' blocks, the share of `built`'s block weights in 2:4, and the load."""

    source: str
    gpu: str
    model: str
    phase: Literal["decode", "prefill", "generate"]
    base: str
    built: str
    sparse: float
    batch: int
    input: int
    output: int
    ratio: float
    note: str = ""


class LeftOut(Config):
    """A published figure that cannot be predicted, and what is missing."""

    what: str
    missing: str


class Published(Config):
    """published.yaml."""

    sources: dict[str, Source]
    kernels: tuple[Kernel, ...]
    models: tuple[EndToEnd, ...]
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True)
class Comparison:
    """One published figure with its prediction; microseconds for times, dense over built for speed-ups."""

    kind: Kind
    source: str
    gpu: str
    conditions: str
    predicted: float
    published: float

    @property
    def error(self) -> float:
        """Relative to the published figure."""
        return self.predicted / self.published - 1


@cache
def published() -> Published:
    """The checked content of published.yaml."""
    text = resources.files("benchmarks.roofline").joinpath("published.yaml").read_text(encoding="utf8")
    return Published.model_validate(yaml.safe_load(text))


def comparisons() -> list[Comparison]:
    """Every published figure with its prediction, in the file's order."""
    rows = published()
    kernels = [each for kernel in rows.kernels for each in compare_kernel(kernel)]
    return kernels + [compare_model(model) for model in rows.models]


def median_error(rows: Sequence[Comparison], signed: bool = False) -> float:
    """Median of the errors, or of their absolute values unless `signed`."""
    return statistics.median(row.error if signed else abs(row.error) for row in rows)


def compare_kernel(row: Kernel) -> Iterator[Comparison]:
    """The figures of one row, each with its prediction."""
    card = roofline.gpu(row.gpu)
    sides = {
        side: [[_microseconds(card, m, block) for m in row.tokens] for block in _blocks(row, fraction)]
        for side, fraction in (("dense", 0.0), ("sparse", 1.0))
    }
    what = "{} x {}".format(*row.shape) if row.shape else " and ".join(row.models)
    conditions = f"{row.format}, {what}, {_span(row.tokens)} tokens"
    for side, microseconds in row.us.items():
        name = "2:4" if side == "sparse" else "dense"
        yield Comparison("kernel time", row.source, card.name, f"{name} {conditions}", sides[side][0][0], microseconds)
    ratio = row.ratio or (row.us["dense"] / row.us["sparse"] if len(row.us) == 2 else None)
    if ratio:
        pairs = zip(chain(*sides["dense"]), chain(*sides["sparse"]), strict=True)
        predicted = statistics.geometric_mean(dense / sparse for dense, sparse in pairs)
        yield Comparison("kernel speed-up", row.source, card.name, conditions, predicted, ratio)


def _blocks(row: Kernel, fraction: float) -> list[list[LinearShape]]:
    """The GEMMs that are summed: the row's one, or those of a block of each model."""
    if row.shape:
        return [[LinearShape(*row.shape, row.format, fraction)]]
    return [MODELS[name].layers(row.format, fraction) for name in row.models]


def _microseconds(card: Gpu, tokens: int, layers: list[LinearShape]) -> float:
    return math.fsum(roofline.gemm_time(card, tokens, layer).seconds for layer in layers) * 1e6


def compare_model(row: EndToEnd) -> Comparison:
    """A model's published speed-up with its prediction."""
    card = roofline.gpu(row.gpu)
    base, built = _model_seconds(card, row, row.base), _model_seconds(card, row, row.built)
    if row.sparse:  # a hybrid's two segments share the time by their weights
        built = row.sparse * _model_seconds(card, row, row.built, fraction=1.0) + (1 - row.sparse) * built
    sides = f"{row.built} against {row.base}" if row.built != row.base else row.built
    pattern = f", {row.sparse:.0%} of the weights 2:4" if 0 < row.sparse < 1 else ", 2:4" if row.sparse else ", dense"
    load = f"batch {row.batch}, {row.input} + {row.output} tokens"
    note = f" ({row.note})" if row.note else ""
    conditions = f"{row.phase} {row.model}, {sides}{pattern}, {load}{note}"
    return Comparison("end to end", row.source, card.name, conditions, base / built, row.ratio)


def compare_decode(gpu: str, base: str, ratio: float, **load: Any) -> Comparison:
    """A decode step of our own in FP8 and 2:4 against one in `base`; `load`: the model, batch and input."""
    row = {"phase": "decode", "built": "fp8", "sparse": 1, "output": 0, **load}
    return compare_model(EndToEnd(source=gpu, gpu=gpu, base=base, ratio=ratio, **row))


def _model_seconds(card: Gpu, row: EndToEnd, number_format: str, fraction: float = 0.0) -> float:
    """Of one decode step, of the prefill, or of a whole request; KV cache and lm_head in 16 bit."""
    model = MODELS[row.model]
    layers = model.layers(number_format, fraction) * model.num_hidden_layers
    layers.append(LinearShape(model.vocab_size, model.hidden_size, "bf16", name="lm_head"))
    kv_bytes = 2.0 * 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim
    decode = roofline.decode_ceiling(card, layers, row.batch, row.input + row.output // 2, kv_bytes).seconds
    prefill = roofline.prefill_ceiling(card, layers, row.input, row.batch).seconds
    assert decode is not None
    assert prefill is not None
    return {"decode": decode, "prefill": prefill, "generate": prefill + row.output * decode}[row.phase]


def _span(values: tuple[int, ...]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"
