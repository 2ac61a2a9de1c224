"""Which kernel a layer would take at each number of tokens, predicted for a named GPU where none can be measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.roofline import roofline
from builder.hardware import machine
from plugins.common.defaults import LEAST_GAIN, MAX_SKINNY_TOKENS
from plugins.common.patterns import TENSOR_CORE, skinny_kernel

BUCKETS = (1, 8, 64, 512, 4096)  # tokens


def predict_tactics(checkpoint: Path, gpu: str) -> dict[str, Any]:
    """tactics.json of a checkpoint for `gpu`, every figure marked as predicted."""
    from builder import checkpoint as checkpoints

    card = roofline.gpu(gpu)
    layers = {}
    for layer in checkpoints.read(checkpoint).layers():
        buckets = [predict_bucket(card, tokens, layer) for tokens in BUCKETS]
        layers[layer.name] = {
            "out_features": layer.out_features,
            "in_features": layer.in_features,
            "format": layer.format,
            "sparse": layer.sparse,
            "fraction": layer.fraction,
            "pattern": layer.pattern,
            "reason": reason(card, layer.sparse, buckets, layer.pattern),
            "buckets": buckets,
        }
    return {
        "device": None,
        "source": "predicted",
        "gpu": card.name,
        "versions": machine.versions("torch", "twofour"),
        "layers": layers,
    }


def predict_bucket(card: roofline.Gpu, tokens: int, layer: Any) -> dict[str, Any]:
    """The roofline's times of one layer at one number of tokens, dense and sparse, in microseconds."""
    number_format = roofline.tensor_core_format(layer.format)
    shape = (card, tokens, layer.out_features, layer.in_features, number_format)
    if card.refuses(number_format, layer.sparse, layer.pattern):
        return {
            "tokens": tokens,
            "kernel": "none",
            "dense_us": None,
            "sparse_us": None,
            "ratio": None,
            "measured": False,
        }
    dense = roofline.gemm_time(*shape, sparse=False).seconds * 1e6
    kernels = 2 if 0 < layer.fraction < 1 else 1
    share = layer.fraction or 1.0
    sparse = roofline.gemm_time(*shape, sparse=share, kernels=kernels, pattern=layer.pattern).seconds * 1e6
    ratio = dense / sparse
    few, has_kernel = tokens <= MAX_SKINNY_TOKENS, layer.sparse and _has_kernel(layer.pattern, tokens)
    pays = has_kernel and ratio >= LEAST_GAIN
    kernel = (skinny_kernel(layer.pattern) if few else "cusparselt") if pays else "dense-cublaslt"
    return {
        "tokens": tokens,
        "kernel": kernel,
        "dense_us": round(dense, 3),
        "sparse_us": round(sparse, 3) if has_kernel else None,
        "ratio": round(ratio, 3) if has_kernel else None,
        "measured": False,
    }


def _has_kernel(pattern: str, tokens: int) -> bool:
    """Whether a kernel multiplies the packed weight by so many tokens: for n:8 there is only the skinny one."""
    return pattern == TENSOR_CORE or tokens <= MAX_SKINNY_TOKENS


def reason(card: roofline.Gpu, sparse: bool, buckets: list[dict[str, Any]], pattern: str = TENSOR_CORE) -> str:
    """Why the layer runs dense or sparse."""
    if any(bucket["kernel"] == "none" for bucket in buckets):
        return f"{card.name} cannot run this format"
    if not sparse:
        return f"dense: the weight is not {pattern}"
    ratios = [bucket["ratio"] for bucket in buckets if bucket["ratio"] is not None]
    if max(ratios) >= LEAST_GAIN:
        limits = "(roofline limits, not measured)"
        dense = "" if pattern == TENSOR_CORE else f"; dense above {MAX_SKINNY_TOKENS} tokens"
        return f"{pattern} pays: predicted {min(ratios):.2f}x to {max(ratios):.2f}x on {card.name} {limits}{dense}"
    least = card.least_kernel_seconds * 1e6
    bound = [bucket["tokens"] for bucket in buckets if bucket["dense_us"] <= round(least, 3)]
    if bound:
        shortest = f"a kernel takes at least {least:.2f} us on {card.name}"
        return f"stays dense: {shortest}, and the dense product takes no more up to {max(bound)} tokens"
    return f"stays dense: no sparse kernel is predicted to gain on {card.name}"


def read_tactics(engine: Path) -> dict[str, Any] | None:
    """tactics.json of an engine directory, or None where there is none. Raises UserError for a damaged one."""
    from plugins.autotune import tactics

    if not (engine / "tactics.json").is_file():
        return None
    table: dict[str, Any] = tactics.read(engine).model_dump(mode="json")
    return table
