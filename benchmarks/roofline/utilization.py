"""How near a measured point came to what its device allows. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.roofline import roofline
from benchmarks.roofline.roofline import Gpu
from plugins.common.linear_shape import LinearShape


@dataclass(frozen=True)
class ModelCost:
    """What one side moves and multiplies: its linear layers and the bytes of KV cache that a token adds."""

    layers: Sequence[LinearShape]
    kv_bytes_per_token: float


def add_limits(points: Sequence[dict[str, Any]], costs: Mapping[str, ModelCost], gpu: Gpu | None) -> None:
    """Fills `limit` of the report's `performance` points in place, from their mean inter_token_latency.

    For each side: bytes and floating-point operations of one decode step, the GB/s and TFLOP/s that the measured time
    makes of them, and the share of `gpu`'s ceiling. `gpu` None means that no limit is known for the device, as for a
    CPU: no share is computed. A step is taken to hold `concurrency` sequences, half of their output done,
    which only a closed loop keeps up: other arrivals get no limit.
    """
    for point in points:
        measured = {side: point[side].get("inter_token_latency") for side in costs if side in point}
        if not all(measured.values()) or point["workload"]["arrival"] != "closed":
            continue
        sides = {side: _side(point, costs[side], gpu, block["mean"] / 1e3) for side, block in measured.items()}
        point["limit"] = {"gpu": gpu.name if gpu else None, **sides, "message": _message(point, sides, gpu)}


def _side(point: Mapping[str, Any], cost: ModelCost, gpu: Gpu | None, seconds: float) -> dict[str, Any]:
    batch, workload = point["concurrency"], point["workload"]
    context = workload["input_tokens"] + workload["output_tokens"] // 2
    moved = sum(layer.nbytes for layer in cost.layers) + batch * context * cost.kv_bytes_per_token
    flops = sum(2.0 * batch * layer.numel for layer in cost.layers)
    side: dict[str, Any] = {
        "bytes_per_step": moved,
        "flops_per_step": flops,
        "seconds_per_step": seconds,
        "gigabytes_per_second": moved / seconds / 1e9,
        "teraflops": flops / seconds / 1e12,
        "share": None,
    }
    if gpu is not None:
        ceiling = roofline.decode_ceiling(gpu, cost.layers, batch, context, cost.kv_bytes_per_token)
        if ceiling.seconds is not None:
            side |= {"limit_seconds": ceiling.seconds, "bound": ceiling.bound, "share": ceiling.seconds / seconds}
    return side


def _message(point: Mapping[str, Any], sides: Mapping[str, dict[str, Any]], gpu: Gpu | None) -> str:
    parts = []
    for name, side in sides.items():
        share = "" if side["share"] is None else f" ({side['share']:.0%} of the {gpu.name if gpu else ''} limit)"
        parts.append(f"{name} {side['gigabytes_per_second']:.3g} GB/s and {side['teraflops']:.3g} TFLOP/s{share}")
    ending = "" if gpu else "; no limit is known for this device"
    if any(side["share"] is not None and side["share"] > 1 for side in sides.values()):
        ending = "; above the limit, so that a figure or the comparison is wrong"
    return f"Decode at concurrency {point['concurrency']}: {', '.join(parts)}{ending}."
