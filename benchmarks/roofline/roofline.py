"""What a GPU's memory and tensor cores allow: limits on a GEMM, on decode and on prefill. Predicted, never measured.

A GEMM takes a kernel's launch, and then at least the longest of three times: moving its bytes at the memory's peak
rate, multiplying at the tensor cores' peak rate (Williams et al., Roofline, 2009), and one wave of blocks. Where the
wave is the longest, 2:4 saves bytes and no time. The n:8 patterns save bytes and no multiplications.
docs/predictions.md compares these limits with published figures. Imports no torch.
M tokens, N = out_features, K = in_features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Literal

import yaml

from plugins.common.config_base import Config
from plugins.common.errors import UserError
from plugins.common.formats import format_of
from plugins.common.linear_shape import LinearShape
from plugins.common.patterns import TENSOR_CORE

Bound = Literal["memory", "math", "launch"]

OUTPUT_BYTES = 2  # every kernel of ours writes 16-bit activations


class Gpu(Config):
    """One card of gpus.yaml. `dense_tflops` are 1e12 FLOP/s a format, a multiply and an add counted as two.

    `launch_us` and `wave_us` are microseconds: a kernel's launch inside a CUDA graph, and one wave of its blocks.
    """

    name: str
    aliases: tuple[str, ...] = ()
    sm: int
    memory_gb: float
    bandwidth_gb_s: float
    l2_mb: float
    dense_tflops: dict[str, float]
    sparse_multiplier: float
    launch_us: float
    wave_us: float
    source: str

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.bandwidth_gb_s * 1e9

    @property
    def least_kernel_seconds(self) -> float:
        """No kernel takes less: one launch inside a CUDA graph and one wave of blocks."""
        return (self.launch_us + self.wave_us) * 1e-6

    def peak(self, format: str, sparse: bool = False) -> float:
        """FLOP a second, counted as those of the dense product."""
        return self.dense_tflops[format] * 1e12 * (self.sparse_multiplier if sparse else 1)

    def refuses(self, layer: LinearShape) -> str | None:
        """Why the card's tensor cores cannot run the layer; None where they can."""
        if (format := layer.format) not in self.dense_tflops:
            need = {"fp8": "SM89 (Ada) or later", "bf16": "SM80 (Ampere) or later"}.get(format)
            return f"{self.name} has no {format} tensor cores" + (f": {format} needs {need}" if need else "")
        if layer.sparse and layer.pattern == TENSOR_CORE and self.sparse_multiplier <= 1:
            return f"{self.name} has no sparse tensor cores: 2:4 needs SM80 (Ampere) or later"
        return None


@dataclass(frozen=True)
class GemmTime:
    """The least time of one GEMM: `seconds`, and what bounds it; "launch": no more than a launch and one wave."""

    seconds: float
    bound: Bound
    bytes: float
    flops: float


@dataclass(frozen=True)
class Ceiling:
    """The most a whole model can reach. `seconds` is of one decode step or one prefill; None if not `supported`.

    `fits_l2`: weights and KV cache fit the L2 cache: the memory's rate is not a limit, and an engine may be faster.
    """

    gpu: str
    supported: bool
    reason: str | None
    seconds: float | None
    tokens_per_second: float | None
    bound: Bound | None
    weight_bytes: float
    kv_bytes: float
    flops: float
    fits_l2: bool = False


def on_tensor_cores(layer: LinearShape) -> LinearShape:
    """The product that runs for a layer: float32 weights are multiplied as bf16 on tensor cores."""
    return replace(layer, format="bf16") if layer.format == "fp32" else layer


def gemm_time(gpu: Gpu, tokens: int, layer: LinearShape, kernels: int = 1) -> GemmTime:
    """The roofline of Y[M, N] = X[M, K] W[N, K]^T: weight, inputs and 16-bit outputs each moved once.

    `kernels` follow each other: the torch engine has two for a layer that is sparse in part.

    The part of the weight in 2:4 multiplies at the sparse peak; the rest, and all of n:8, at the dense one.
    Raises UserError where the card cannot run the format.
    """
    if reason := gpu.refuses(layer):
        raise UserError(f"{reason}; choose another --gpu")
    format = layer.format
    moved = layer.nbytes
    moved += tokens * (layer.in_features * format_of(format).nbytes + layer.out_features * OUTPUT_BYTES)
    flops = 2.0 * tokens * layer.numel  # of the dense product; 2:4 skips half of them
    skips = layer.fraction if layer.pattern == TENSOR_CORE else 0.0
    limits: dict[Bound, float] = {
        "memory": moved / gpu.bandwidth,
        "math": flops * ((1 - skips) / gpu.peak(format) + (skips / gpu.peak(format, True) if skips else 0.0)),
        "launch": kernels * gpu.wave_us * 1e-6,
    }
    bound = max(limits, key=lambda name: limits[name])
    return GemmTime(kernels * gpu.launch_us * 1e-6 + limits[bound], bound, moved, flops)


def decode_ceiling(
    gpu: Gpu, layers: Sequence[LinearShape], batch: int, context: int, kv_bytes_per_token: float
) -> Ceiling:
    """The most tokens a second of `batch` sequences that each read a KV cache of `context` tokens a step.

    Attention's arithmetic, norms, their launches and collectives are left out: a real engine stays below. Give layers
    that an engine runs as one product (q, k and v; gate and up) as one layer.
    """
    kv_bytes = batch * context * kv_bytes_per_token
    return _ceiling(gpu, layers, [batch] * len(layers), kv_bytes, produced=batch)


def prefill_ceiling(gpu: Gpu, layers: Sequence[LinearShape], tokens: int, batch: int = 1) -> Ceiling:
    """The most prompt tokens a second over `batch` prompts of `tokens` tokens; same omissions as decode.

    `lm_head` runs on each prompt's last token only.
    """
    rows = [batch if layer.name == "lm_head" else batch * tokens for layer in layers]
    return _ceiling(gpu, layers, rows, 0.0, produced=batch * tokens)


def _ceiling(gpu: Gpu, layers: Sequence[LinearShape], rows: Sequence[int], kv_bytes: float, produced: int) -> Ceiling:
    weights = sum(layer.nbytes for layer in layers)
    flops = sum(2.0 * m * layer.numel for layer, m in zip(layers, rows, strict=True))
    reason = next((reason for layer in layers if (reason := gpu.refuses(layer))), None)
    if reason:
        return Ceiling(gpu.name, False, reason, None, None, None, weights, kv_bytes, flops)
    spent: dict[Bound, float] = {"memory": kv_bytes / gpu.bandwidth, "math": 0.0, "launch": 0.0}
    for layer, m in zip(layers, rows, strict=True):
        gemm = gemm_time(gpu, m, layer)
        spent[gemm.bound] += gemm.seconds
    seconds = sum(spent.values())
    bound = max(spent, key=lambda name: spent[name])
    fits_l2 = weights + kv_bytes <= gpu.l2_mb * 1e6
    return Ceiling(gpu.name, True, None, seconds, produced / seconds, bound, weights, kv_bytes, flops, fits_l2)


def gpu(name: str) -> Gpu:
    """The card of that name, whatever its case, spaces and hyphens, with or without `NVIDIA`. UserError if unknown."""
    wanted = _plain(name)
    for key, card in gpus().items():
        if wanted in map(_plain, (key, card.name, *card.aliases)):
            return card
    raise UserError(f"'{name}' is not a GPU of benchmarks/roofline/gpus.yaml: use one of {', '.join(gpus())}")


@cache
def gpus() -> dict[str, Gpu]:
    """Every card of gpus.yaml by its key."""
    text = resources.files("benchmarks.roofline").joinpath("gpus.yaml").read_text(encoding="utf8")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, 20 times as fast, where PyYAML has it
    table = yaml.load(text, loader)
    kernel = table.pop("kernel")
    floor = {"launch_us": kernel["launch_us"], "wave_us": kernel["wave_us"]}
    return {key: Gpu.model_validate(floor | row) for key, row in table.items()}


def _plain(name: str) -> str:
    return "".join(c for c in name.lower().replace("nvidia", "").replace("geforce", "") if c.isalnum())
