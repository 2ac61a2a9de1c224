"""Times of GPU work, taken as a decoder meets it: weights cold, launches replayed from a CUDA graph.

A kernel that runs again and again on one weight finds it in the L2 cache, and looks up to three times as fast as it is.
So each call of a timed round reads another copy, enough of them to fill the cache twice.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from plugins.common.nvidia_smi import query
from plugins.common.patterns import TENSOR_CORE, keep_and_group

ROUNDS = 11
CALLS = 16  # at least, in one graph
CACHES = 2.0  # how many times the copies fill the L2 cache


@dataclass(frozen=True)
class Time:
    """Microseconds of one call: the median over rounds, and their lowest and highest."""

    us: float
    low: float
    high: float


def copies_to_fill(bytes_each: int, l2_bytes: int) -> int:
    """How many copies of a weight of `bytes_each` defeat a cache of `l2_bytes`; at least 2."""
    return max(2, -(-int(CACHES * l2_bytes) // max(1, bytes_each)) + 1)


def measure(call: Callable[[int], object], copies: int, rounds: int = ROUNDS, least_calls: int = CALLS) -> Time:
    """Times `call(i)`, which works on copy i of its weight, in a graph of at least `least_calls` calls.

    Needs CUDA; `call` must be safe to capture.
    """
    calls = -(-least_calls // copies) * copies
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # it still makes the operands, in memory it shares
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for i in range(min(copies, 2)):  # warm-up: plans, lazy loading
            call(i)
        stream.synchronize()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for i in range(calls):
                call(i % copies)
        finally:
            graph.capture_end()
    times = [_replay(graph) / calls for _ in range(rounds + 2)][2:]  # the first two warm the clocks
    return Time(statistics.median(times), min(times), max(times))


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return 1000 * float(begin.elapsed_time(end))


def random_sparse(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device, seed: int = 0, pattern: str = TENSOR_CORE
) -> torch.Tensor:
    """A weight [rows, columns] with exactly n nonzeros in each group of m inputs."""
    generator = torch.Generator(device).manual_seed(seed)
    keep, group = keep_and_group(pattern)
    masks = torch.tensor([[i in kept for i in range(group)] for kept in combinations(range(group), keep)])
    chosen = torch.randint(len(masks), (rows, columns // group), generator=generator, device=device)
    mask = masks.to(device)[chosen].view(rows, columns)
    return _random(rows, columns, dtype, generator).masked_fill_(~mask, 0).to(dtype)


def random_operand(rows: int, columns: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Activations or a dense weight [rows, columns] as quantization leaves them."""
    return _random(rows, columns, dtype, torch.Generator(device).manual_seed(seed + 1)).to(dtype)


def _random(rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Numbers that stay nonzero in `dtype`; masked before they become float8, which few operators take."""
    if dtype == torch.int8:
        numbers = torch.randint(1, 255, (rows, columns), generator=generator, device=generator.device)
        return torch.where(numbers < 128, numbers, numbers - 255).to(torch.int8)  # -127 to 127 without 0
    values = torch.randn(rows, columns, generator=generator, device=generator.device, dtype=torch.float32)
    floor = 2.0**-6  # e4m3's smallest normal number
    return torch.where(values >= 0, values.clamp(min=floor), values.clamp(max=-floor))


def device_facts(device: int = 0) -> dict[str, Any]:
    """Name, SM, driver and clocks (MHz, as now) of a CUDA device: tactics.json's `device`."""
    properties = torch.cuda.get_device_properties(device)
    uuid = getattr(properties, "uuid", None)  # nvidia-smi does not know of CUDA_VISIBLE_DEVICES
    driver, *clocks = _smi(
        str(device) if uuid is None else f"GPU-{uuid}", ("driver_version", "clocks.sm", "clocks.mem")
    )
    names = ("sm", "memory")
    return {
        "name": properties.name,
        "sm": 10 * properties.major + properties.minor,
        "driver": driver,
        "clocks": {n: float(c) for n, c in zip(names, clocks, strict=True) if c is not None},
    }


def _smi(device: str, fields: Sequence[str]) -> list[str | None]:
    """nvidia-smi's values of `fields`; None for each that it does not know."""
    values = [value.strip() for value in query(",".join(fields), device).strip().split(",")]
    if len(values) != len(fields):
        return [None] * len(fields)
    return [value if value and not value.startswith("[") else None for value in values]
