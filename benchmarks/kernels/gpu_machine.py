"""The GPU, its libraries' versions, and limits measured on it: launch time in a graph, read rate.

python -m benchmarks.kernels.gpu_machine --out machine.json
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from plugins.autotune import timing
from plugins.common.errors import UserError
from plugins.common.json_files import write_json
from plugins.libtwofour import bindings

NODES = 256  # kernels in one graph
TOOLS = ("nvcc", "cmake", "ninja", "make", "g++", "ncu", "compute-sanitizer")


def describe(device: int = 0) -> dict[str, Any]:
    """Device, versions and tools. Raises UserError where torch sees no GPU."""
    if not torch.cuda.is_available():
        raise UserError(f"torch {torch.__version__} finds no GPU: install a torch that was built for CUDA")
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": timing.device_facts(device),
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "versions": {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            **_libraries(device),
            "oldest_cusparselt": os.environ.get("TWOFOUR_CUSPARSELT_OLDEST"),
        },
        "tools": {tool: shutil.which(tool) is not None for tool in TOOLS},
    }


def _libraries(device: int) -> dict[str, Any]:
    """Versions that libtwofour runs on, or why it cannot be loaded, and the one that torch's products use."""
    own = torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else None
    try:
        info = bindings.context(device).info()
    except UserError as error:
        return {"torch_cusparselt": own, "libtwofour": str(error)}
    return {"torch_cusparselt": own, "cusparselt": info.cusparselt_version, "cublaslt": info.cublaslt_version}


def measure_limits(device: int = 0) -> dict[str, float]:
    """Microseconds of the smallest kernels in a graph, and bytes a second of large reads."""
    where = torch.device("cuda", device)
    small = torch.zeros(1, device=where)
    blocks = torch.zeros(132 * 4 * 1024, device=where)
    return {
        "launch_us": round(timing.measure(lambda i: small.add_(1), NODES).us, 3),
        "wave_us": round(timing.measure(lambda i: blocks.add_(1), NODES).us, 3),
        "read_bytes_per_s": read_rate(where),
    }


def read_rate(device: torch.device, size: int = 2 << 30) -> float:
    """Bytes a second that a sum over a large buffer reads: the bound of a product of few tokens."""
    buffers = torch.zeros(2, size // 8, dtype=torch.int64, device=device)
    return size / (timing.measure(lambda i: buffers[i].sum(), copies=2).us * 1e-6)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args(arguments)
    try:
        facts = describe()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_json(chosen.out, facts)
    facts["limits"] = measure_limits()
    write_json(chosen.out, facts)
    print(facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
