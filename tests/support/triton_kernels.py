"""Runs the Triton kernels without a GPU, in a process of its own:

    python triton_kernels.py run DTYPE    with TRITON_INTERPRET=1: each kernel's numbers beside its reference's
    python triton_kernels.py compile SM   each kernel compiled for that SM

One JSON line a case. The interpreter computes in numpy, which has neither bfloat16 nor float8: their conversions are
torch's here, to nearest, ties to even, as on a GPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from plugins.triton_kernels import decode_attention, overlap, reference, rms_norm, rope, silu

KERNELS = {
    "rms_norm": rms_norm.rms_norm,
    "silu_mul": silu.silu_mul,
    "rope_and_cache": rope.rope_and_cache,
    "decode_attention": decode_attention.decode_attention,
}
TORCH_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp8e4nv": "float8_e4m3fn"}
EIGHT_BIT = (torch.int8, torch.float8_e4m3fn)
Case = tuple[str, list[Any]]


def block_cases(dtype: torch.dtype, out: torch.dtype, rows: int, width: int) -> Iterator[Case]:
    """rms_norm and silu_mul; `out` is what they round to."""
    x, residual = torch.randn(rows, width, dtype=dtype), torch.randn(rows, width, dtype=dtype)
    weight = torch.rand(width, dtype=dtype) + 0.5
    multipliers = [torch.tensor([25.0]), torch.linspace(10, 40, width)] if out in EIGHT_BIT else [None]
    for multiplier, added in product(multipliers, (x, None)):
        yield "rms_norm", [residual.clone(), added, weight, 1e-5, multiplier, out]
    for multiplier, first in product(multipliers, ((0, 0), (width // 4, width // 2), (0, width))):
        yield "silu_mul", [torch.randn(rows, 2 * width, dtype=dtype), multiplier, out, *first]


def cache_cases(
    dtype: torch.dtype, stored: torch.dtype, out: torch.dtype, paged: bool, sizes: tuple[int, int, int, int]
) -> Iterator[Case]:
    """rope_and_cache and decode_attention of 4 requests; `sizes`: kv heads, queries each, head_dim, positions."""
    kv_heads, group, head_dim, length = sizes
    page = 16 if paged else length
    pages = 4 * -(-length // page)
    table = torch.randperm(pages).view(4, -1).int() if paged else None
    positions = torch.tensor([0, length - 1, 5, length // 2])
    cos, sin = torch.randn(2, length, head_dim, dtype=dtype)
    scale = 1 / 30 if stored in EIGHT_BIT else 1.0
    multiplier = torch.tensor([1 / scale]) if stored in EIGHT_BIT else None
    keys, values = ((torch.randn(pages, kv_heads, page, head_dim) / scale).to(stored) for _ in "kv")
    norms = (None, torch.rand(head_dim, dtype=dtype) + 0.5)
    for norm, first in product(norms, ((0, 0, 0), (group, 1, kv_heads), (0, kv_heads, 1))):
        qkv = torch.randn(4, (group + 2) * kv_heads * head_dim, dtype=dtype)
        caches = (keys.clone(), values.clone())
        yield (
            "rope_and_cache",
            [qkv, cos, sin, positions, norm, norm, 1e-5, *caches, multiplier, multiplier, table, *first],
        )
    q = torch.randn(4, kv_heads * group, head_dim, dtype=dtype)
    rounding = torch.linspace(20, 60, kv_heads * group * head_dim) if out in EIGHT_BIT else None
    for window in (None, 7):
        places = [q, keys, values, positions, table, length, window]
        yield "decode_attention", [*places, scale * head_dim**-0.5, scale, rounding, out]


def cases(dtype: torch.dtype, sizes: tuple[int, int, int, int], rows: int, width: int) -> Iterator[Case]:
    for out, stored in zip((dtype, *EIGHT_BIT), (*EIGHT_BIT, dtype), strict=True):
        yield from block_cases(dtype, out, rows, width)
        for paged in (False, True):
            yield from cache_cases(dtype, stored, out, paged, sizes)


def convert_as_torch(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    """Numbers of one float type in another; both in numpy arrays of bits."""
    bits = torch.from_numpy(np.ascontiguousarray(data))
    numbers = bits.view(getattr(torch, TORCH_NAMES[source.name])).to(getattr(torch, TORCH_NAMES[target.name]))
    whole = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}[numbers.element_size()]
    return numbers.view(whole).numpy()


def multiply_as_floats(builder: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
    """tl.dot of operands that numpy has no products of."""
    a, b = (builder.cast_impl(x, tl.float32).data if x.dtype.scalar == tl.bfloat16 else x.data for x in (a, b))
    return interpreter.TensorHandle(np.matmul(a, b, dtype=d.data.dtype) + d.data, d.dtype.scalar)


def integers_as_floats(builder: Any, source: Any, target: Any) -> Any:
    """Integers in a float type, bfloat16 included."""
    wide = interpreter.TensorHandle(source.data.astype(np.float32), tl.float32)
    return (
        builder.create_fp_to_fp(wide, target, None)
        if target.scalar == tl.bfloat16
        else builder.cast_impl(source, target)
    )


def run(dtype: str) -> None:
    interpreter.InterpreterBuilder.create_si_to_fp = integers_as_floats
    interpreter._convert_float = convert_as_torch
    interpreter.InterpreterBuilder.create_dot = multiply_as_floats
    torch.manual_seed(0)
    short = (case for case in cases(getattr(torch, dtype), (2, 3, 24, 40), rows=1, width=8) if "attention" in case[0])
    for name, arguments in (*cases(getattr(torch, dtype), (2, 3, 24, 90), rows=3, width=96), *short):
        copies = [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]
        out, expected = KERNELS[name](*copies), getattr(reference, name)(*arguments)
        pairs = [(out, expected)] + [
            pair for pair in zip(copies, arguments, strict=True) if isinstance(pair[0], torch.Tensor)
        ]
        print(json.dumps({"kernel": name, "outputs": [compare(*pair) for pair in pairs]}))


def compare(out: torch.Tensor, expected: torch.Tensor) -> dict[str, Any]:
    """How much differs, as a share of the numbers, and the largest error, as a share of the number (from 1 up)."""
    dtype, out, expected = str(out.dtype).removeprefix("torch."), out.double(), expected.double()
    error = (out - expected).abs() / expected.abs().clamp(min=1)
    return {"dtype": dtype, "differ": (out != expected).double().mean().item(), "error": error.max().item()}


def compile_for(sm: int) -> None:
    """Triton needs no GPU to compile: a driver that names the target is enough, and nothing is launched."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", sm, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    triton.runtime.driver.set_active(Driver())
    overlap.options = lambda tensor: {"OVERLAP": True, "launch_pdl": True}
    launch, compiled = JITFunction.run, {}

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        binary = launch(kernel, *arguments, grid=grid, warmup=True, **options)
        compiled[binary.hash] = (kernel.__name__, binary.asm["ptx"])

    JITFunction.run = compile_only
    short = (case for case in cases(torch.bfloat16, (8, 4, 128, 64), rows=1, width=1024) if "attention" in case[0])
    for name, arguments in (*cases(torch.bfloat16, (8, 4, 128, 512), rows=1, width=4096), *short):
        KERNELS[name](*arguments)
    for name, ptx in compiled.values():
        before, waits, after = ptx.partition("griddepcontrol.wait")
        reads = [part.count("ld.global") for part in (before, after)]
        target = ptx.split(".target ")[1].split()[0]
        print(json.dumps({"kernel": name, "target": target, "waits": bool(waits), "reads": reads}))


if __name__ == "__main__":
    compile_for(int(sys.argv[2])) if sys.argv[1] == "compile" else run(sys.argv[2])
