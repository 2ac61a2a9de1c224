"""Which kernel a layer would take at each number of tokens, predicted for a named GPU where none can be measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.roofline import roofline
from builder.hardware import machine
from plugins.common.defaults import LEAST_GAIN, MAX_SKINNY_TOKENS
from plugins.common.linear_shape import LinearShape
from plugins.common.patterns import TENSOR_CORE, skinny_kernel

BUCKETS = (1, 8, 64, 512, 4096)  # tokens


def predict_tactics(checkpoint: Path, gpu: str) -> dict[str, Any]:
    """tactics.json of a checkpoint for `gpu`, every figure marked as predicted."""
    from builder import checkpoint as checkpoints

    card = roofline.gpu(gpu)
    layers = {}
    for layer in checkpoints.read(checkpoint).shapes():
        buckets = [predict_bucket(card, tokens, layer) for tokens in BUCKETS]
        sparsity = {"fraction": layer.fraction, "pattern": layer.pattern}
        layers[layer.name] = {**layer.facts, **sparsity, "reason": reason(card, layer, buckets), "buckets": buckets}
    return {
        "device": None,
        "source": "predicted",
        "gpu": card.name,
        "versions": machine.versions("torch", "twofour"),
        "layers": layers,
    }


def predict_bucket(card: roofline.Gpu, tokens: int, layer: LinearShape) -> dict[str, Any]:
    """The roofline's times of one layer at one number of tokens, dense and sparse, in microseconds."""
    product = roofline.on_tensor_cores(layer)
    bucket: dict[str, Any] = {"tokens": tokens, "kernel": "none", "dense_us": None, "sparse_us": None, "ratio": None}
    bucket["measured"] = False
    if card.refuses(product):
        return bucket
    dense = roofline.gemm_time(card, tokens, replace(product, fraction=0.0)).seconds * 1e6
    bucket |= {"kernel": "dense-cublaslt", "dense_us": round(dense, 3)}
    few = tokens <= MAX_SKINNY_TOKENS
    if layer.sparse and (few or layer.pattern == TENSOR_CORE):  # n:8 has the skinny kernel alone
        sparse = roofline.gemm_time(card, tokens, product, kernels=2 if layer.fraction < 1 else 1).seconds * 1e6
        ratio = dense / sparse
        bucket |= {"sparse_us": round(sparse, 3), "ratio": round(ratio, 3)}
        if ratio >= LEAST_GAIN:
            bucket["kernel"] = skinny_kernel(layer.pattern) if few else "cusparselt"
    return bucket


def reason(card: roofline.Gpu, layer: LinearShape, buckets: list[dict[str, Any]]) -> str:
    """Why the layer runs dense or sparse."""
    pattern = layer.pattern
    if any(bucket["kernel"] == "none" for bucket in buckets):
        return f"{card.name} cannot run this format"
    if not layer.sparse:
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
