"""Programmatic dependent launch, on SM 90 and newer: a kernel's blocks start while the last ones before it end.

Each kernel waits for all that the one before it wrote, and then lets the next one start: a 2:4 product that follows
reads its weight meanwhile (plugins/csrc/src/streamed.cuh). Before it waits, a kernel reads only what no kernel of the
step writes: weights, multipliers, rotary tables and positions. TWOFOUR_PDL=0 turns it off, as it does there.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch

enabled = os.environ.get("TWOFOUR_PDL", "1")[:1] != "0"


def options(tensor: torch.Tensor) -> dict[str, Any]:
    """What a launch on the tensor's device is given: the kernel's constant OVERLAP, and the launch attribute."""
    if enabled and tensor.is_cuda and _sm(tensor.device) >= (9, 0):
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}


@cache
def _sm(device: torch.device) -> tuple[int, int]:
    major, minor = torch.cuda.get_device_capability(device)
    return major, minor
