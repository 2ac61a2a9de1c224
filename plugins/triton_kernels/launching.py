"""Waits before a kernel reads the output of another (overlap.py)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def begin_kernel(OVERLAP: tl.constexpr):
    """Waits for what the kernel before wrote, then lets the next one start."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
