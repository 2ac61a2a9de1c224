"""The Triton kernels without a GPU: their numbers in Triton's interpreter, and whether they compile."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from plugins.triton_kernels import ops

ROOT = Path(__file__).parents[2]
TWO_STEPS = {"float16": 2**-9, "bfloat16": 2**-6, "float8_e4m3fn": 2**-2, "int8": 1}

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(*arguments: str, interpreted: bool) -> list[dict[str, Any]]:
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpreted else "0", "PYTHONPATH": str(ROOT)}
    script = ROOT / "tests" / "support" / "triton_kernels.py"
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@needs_triton
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_kernels_compute_what_the_reference_does(dtype: str) -> None:
    """Bit for bit, but where sums in another order round otherwise: few numbers of a norm, more of attention."""
    cases = run("run", dtype, interpreted=True)
    assert Counter(case["kernel"] for case in cases).keys() == ops.LAUNCHES.keys()
    for case in cases:
        for out in case["outputs"]:
            assert out["error"] <= TWO_STEPS.get(out["dtype"], 0), case
            assert out["differ"] <= {"silu_mul": 0, "decode_attention": 0.3}.get(case["kernel"], 0.01), case


@needs_triton
@pytest.mark.parametrize("sm", [90, 120])
def test_kernels_compile(sm: int) -> None:
    compiled = run("compile", str(sm), interpreted=False)
    names = Counter(kernel["kernel"] for kernel in compiled)
    assert set(names) == {"_rms_norm", "_silu_mul", "_rope_and_cache", "_attend", "_combine"}
    assert {kernel["target"].removesuffix("a") for kernel in compiled} == {f"sm_{sm}"}
    assert all(kernel["waits"] and kernel["reads"][1] for kernel in compiled), "for what the kernel before wrote"


@pytest.mark.slow
def test_operators_pass_the_checks_of_torch_library() -> None:
    residual, x = torch.randn(2, 8), torch.randn(2, 8)
    torch.library.opcheck(ops.rms_norm, (residual, x, torch.ones(8), 1e-5, None, torch.float32))
    torch.library.opcheck(ops.silu_mul, (residual, torch.ones(1), torch.int8))
    keys, values = torch.zeros(2, 2, 1, 4, 2)
    table = torch.ones(4, 2)
    placed = (residual, table, table, torch.tensor([0, 3]), None, None, 1e-5, keys, values, None, None, None)
    torch.library.opcheck(ops.rope_and_cache, placed)
    q = ops.rope_and_cache(*placed)
    seen = (q, keys, values, placed[3], None, 4, None, 1.0, 1.0, None, torch.float32)
    torch.library.opcheck(ops.decode_attention, seen)
