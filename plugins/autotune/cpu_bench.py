"""The operands and the clock of tuner.py on a CPU: libtwofour_cpu's dense and sparse kernels, and torch's own product.

Weights are cold, as a decoder meets them: each call of a round reads another copy, enough of them to fill the last
level of cache twice. Inputs are activations, so an 8-bit layer's time holds their rounding.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from ctypes import byref
from dataclasses import dataclass, field
from typing import Any

import torch

from plugins.autotune import timing
from plugins.common.linear_shape import LinearShape
from plugins.common.patterns import cpu_kernel
from plugins.common.processor import last_level_cache_bytes, processor
from plugins.libtwofour import cpu
from plugins.linear.cpu_linear import DENSE, TYPES, CpuLinear, join_parts
from plugins.linear.torch_linear import DenseLinear, Int8Linear, Scales
from plugins.sparsity.segments import Axis
from plugins.sparsity.torch_packing import pack

BUCKETS = (1, 4, 16, 64, 256)  # more tokens change no choice: a product is then bounded by its arithmetic
SECONDS = 0.04  # of rounds for one kernel at one number of tokens
LEAST_ROUNDS = 3
DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass
class CpuBench:
    """Operands of one shape, made once for all buckets."""

    shape: LinearShape
    most_tokens: int
    layers: dict[str, torch.nn.Module] = field(default_factory=dict)
    copies: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows, columns, dtype = self.shape.out_features, self.shape.in_features, DTYPES[self.shape.format]
        self.dense = timing.random_sparse(rows, columns, dtype, torch.device("cpu"), pattern=self.shape.pattern)
        self.x = torch.randn(self.most_tokens, columns).to(torch.bfloat16)
        count = rows if self.shape.format == "int8" else 1
        self.scales = None if dtype == torch.bfloat16 else Scales(torch.full((count,), 0.01), torch.tensor([0.05]))

    def kernels(self) -> Sequence[str]:
        sparse = cpu_kernel(self.shape.pattern)
        return (DENSE, sparse) if self.shape.format == "fp8" else (DENSE, "torch", sparse)

    def microseconds(self, kernel: str, tokens: int) -> float:
        """The least time of one call over rounds: what else runs on this machine only adds."""
        layer, copies = self.prepared(kernel)
        x_MK = self.x[:tokens]
        if kernel == "torch":
            return _least_time(_call_torch(layer, copies, x_MK), len(copies))
        return _least_time(_call_ours(_problems(layer, copies), x_MK, self.shape.out_features), len(copies))

    def prepared(self, kernel: str) -> tuple[Any, list[torch.Tensor]]:
        """The layer, and copies of its weight that fill the cache twice."""
        if kernel not in self.layers:
            if kernel == "torch":
                layer: Any = (
                    DenseLinear(self.dense, None, torch.bfloat16)
                    if self.scales is None
                    else Int8Linear(self.dense, self.scales, None, torch.bfloat16)
                )
            else:
                kept = self.dense if kernel == DENSE else pack(self.dense, self.shape.pattern)
                layer = CpuLinear(kept, self.scales, None, torch.bfloat16, ((1, kernel),))
            weight = layer.weight if kernel == "torch" else layer.weights[kernel]
            count = timing.copies_to_fill(weight.nbytes, last_level_cache_bytes())
            self.layers[kernel] = layer
            self.copies[kernel] = [weight, *(weight.clone() for _ in range(count - 1))]
        return self.layers[kernel], self.copies[kernel]


def microseconds_of_both(sparse: CpuBench, rest: CpuBench, axis: Axis, kernel: str, tokens: int) -> float:
    """The least time of one call for both parts of a hybrid layer; `kernel` multiplies the sparse part."""
    first, other = (_problems(*bench.prepared(name)) for bench, name in ((sparse, kernel), (rest, DENSE)))
    count = max(len(first), len(other))
    problems = [join_parts(first[i % len(first)], other[i % len(other)], axis) for i in range(count)]
    if axis == "rows":
        x_MK, out_features = sparse.x[:tokens], sparse.shape.out_features + rest.shape.out_features
    else:
        x_MK, out_features = torch.cat((sparse.x[:tokens], rest.x[:tokens]), 1), sparse.shape.out_features
    return _least_time(_call_ours(problems, x_MK, out_features), count)


def _least_time(call: Callable[[int], object], copies: int) -> float:
    """Microseconds of one call: the least over rounds, because what else runs on this machine only adds."""
    call(0)
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    position = 0
    while len(times) < LEAST_ROUNDS or time.perf_counter() < end:
        begin = time.perf_counter()
        calls = min(copies, 8)
        for _ in range(calls):
            call(position % copies)
            position += 1
        times.append((time.perf_counter() - begin) / calls)
    return 1e6 * min(times)


def _problems(layer: CpuLinear, copies: Sequence[torch.Tensor]) -> list[cpu.Linear]:
    """The layer as the library takes it, once for each copy of its weight."""
    problems = []
    for weight in copies:
        problem = cpu.Linear()
        ctypes.memmove(byref(problem), byref(layer.problem(1)), ctypes.sizeof(problem))
        problem.weight = weight.data_ptr()
        problems.append(problem)
    return problems


def _call_ours(problems: Sequence[cpu.Linear], x_MK: torch.Tensor, out_features: int) -> Callable[[int], object]:
    y_MN = x_MK.new_empty(x_MK.shape[0], out_features)
    apply, kind = cpu.load().twofour_cpu_apply, TYPES[x_MK.dtype]

    def call(i: int) -> object:
        return apply(byref(problems[i]), x_MK.shape[0], kind, x_MK.data_ptr(), y_MN.data_ptr())

    return call


def _call_torch(layer: Any, copies: Sequence[torch.Tensor], x_MK: torch.Tensor) -> Callable[[int], object]:
    def call(i: int) -> object:
        layer.weight = copies[i]
        return layer(x_MK)

    return call


def device_facts() -> dict[str, Any]:
    """tactics.json's `device`."""
    return {"name": processor(), "sm": None}


def versions() -> dict[str, Any]:
    """What the times depend on besides the processor."""
    return {
        "libtwofour_cpu": cpu.library_file().name,
        "isa": cpu.isa(),
        "threads": cpu.set_threads(torch.get_num_threads()),
        "torch": torch.__version__,
    }
