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
from plugins.libtwofour import cpu, weight_memory
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
            call = _call_torch(layer, copies, x_MK)
        else:
            call = _call_ours(_problems(layer, copies), x_MK, self.shape.out_features)
        return _least_times([(call, len(copies))])[0]

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
            copy = torch.clone if kernel == "torch" else weight_memory.clone
            self.copies[kernel] = [weight, *(copy(weight) for _ in range(count - 1))]
        return self.layers[kernel], self.copies[kernel]


def times_of_hybrid(
    sparse: CpuBench, rest: CpuBench, whole: CpuBench, axis: Axis, kernel: str, tokens: int
) -> tuple[float, float]:
    """Microseconds of one call for both parts of a hybrid layer, and of one dense product of the layer.

    `kernel` multiplies the sparse part. Rounds of both calls alternate, because the speed of memory drifts.
    """
    first, other = (_problems(*bench.prepared(name)) for bench, name in ((sparse, kernel), (rest, DENSE)))
    count = max(len(first), len(other))
    joined = [join_parts(first[i % len(first)], other[i % len(other)], axis) for i in range(count)]
    dense, x_MK, out_features = _problems(*whole.prepared(DENSE)), whole.x[:tokens], whole.shape.out_features
    both, alone = _least_times(
        [(_call_ours(problems, x_MK, out_features), len(problems)) for problems in (joined, dense)]
    )
    return both, alone


def _least_times(calls: Sequence[tuple[Callable[[int], object], int]]) -> list[float]:
    """Microseconds of each call, which takes the number of a copy: the least over rounds, in which the calls alternate.

    What else runs on this machine only adds.
    """
    times: list[list[float]] = [[] for _ in calls]
    positions = [0] * len(calls)
    end = time.perf_counter() + SECONDS * len(calls)
    for call, _ in calls:
        call(0)
    while len(times[0]) < LEAST_ROUNDS or time.perf_counter() < end:
        for which, (call, copies) in enumerate(calls):
            repeats = min(copies, 8)
            begin = time.perf_counter()
            for _ in range(repeats):
                call(positions[which] % copies)
                positions[which] += 1
            times[which].append((time.perf_counter() - begin) / repeats)
    return [1e6 * min(each) for each in times]


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
