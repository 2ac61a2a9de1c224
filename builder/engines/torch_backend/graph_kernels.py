"""The kernels of a decode step: their number and times, and whether a replay of its graph computes the same."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable

import torch

TYPES = ("kernel", "memcpy", "memset", "host", "graph", "empty")  # CUgraphNodeType (cuda.h), the first of them


def count_kernels(step: Callable[[], object]) -> dict[str, int] | str:
    """The nodes of one captured call of `step`, which has run before, by type; or why they cannot be counted."""
    if not torch.cuda.is_available():
        return "not counted: there is no GPU here"
    try:
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            step()
        return _nodes(graph.raw_cuda_graph())
    except (OSError, RuntimeError, TypeError, AttributeError) as error:
        return f"not counted: {type(error).__name__}: {error}".splitlines()[0]


def replays_agree(step: Callable[[], torch.Tensor], rounds: int = 10) -> float | str:
    """Least share of `step`'s results that a replay of its graph has like an eager call; or why there is none.

    Kernels overlap in a replay, and hardly in an eager call: one that does not wait for the one before shows here.
    """
    if not torch.cuda.is_available():
        return "not compared: there is no GPU here"
    expected = step().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    shares: list[float] = []
    for _ in range(rounds):
        graph.replay()
        shares.append((out == expected).float().mean().item())
    return round(min(shares), 4)


def kernel_times(step: Callable[[], object], most: int = 16) -> dict[str, dict[str, float]] | str:
    """Of one eager call, the kernels with the longest times: calls, and microseconds of all of them together."""
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        return "not timed: there is no GPU here"
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            step()
            torch.cuda.synchronize()
        rows = [row for row in profiled.key_averages() if row.self_device_time_total > 0]
    except (RuntimeError, AttributeError, OSError) as error:
        return f"not timed: {type(error).__name__}: {error}".splitlines()[0]
    rows.sort(key=lambda row: -row.self_device_time_total)
    return {row.key[:120]: {"calls": row.count, "us": round(row.self_device_time_total, 1)} for row in rows[:most]}


def _nodes(graph: int) -> dict[str, int]:
    """Counts of a CUgraph's nodes by type."""
    driver = ctypes.CDLL("libcuda.so.1")
    count = ctypes.c_size_t()
    _check(driver.cuGraphGetNodes(ctypes.c_void_p(graph), None, ctypes.byref(count)))
    nodes = (ctypes.c_void_p * count.value)()
    _check(driver.cuGraphGetNodes(ctypes.c_void_p(graph), nodes, ctypes.byref(count)))
    counts: Counter[str] = Counter()
    for node in nodes:
        kind = ctypes.c_int()
        _check(driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)))
        counts[TYPES[kind.value] if kind.value < len(TYPES) else f"type {kind.value}"] += 1
    return dict(counts)


def _check(status: int) -> None:
    if status != 0:
        raise RuntimeError(f"the CUDA driver returned {status}")
