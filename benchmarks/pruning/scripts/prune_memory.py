"""python -m benchmarks.pruning.scripts.prune_memory METHOD WORK SAMPLES LENGTH VOCABULARY OUT

Prunes WORK/model and writes its time and peak memory to OUT.
"""

import cProfile
import json
import pstats
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.pruning.accuracy import linear_layers
from benchmarks.pruning.scripts.meter import status_bytes
from calibration.config import Sparsity
from calibration.pruning.sparsify import sparsify
from plugins.common.progress import silent
from plugins.sparsity.declaration import Declaration

PRODUCTS = ("nn.linear", "addmm_", "scaled_dot_product_attention", "cholesky_ex", "solve_triangular")


def main(method: str, work: str, samples: str, length: str, vocabulary: str, out: str) -> None:
    tokens = np.random.default_rng(0).integers(int(vocabulary), size=(int(samples), int(length)))
    config, directory = Sparsity.model_validate({"method": method}), Path(work)
    target = Declaration(tuple(linear_layers(directory / "model")))
    profile, started = cProfile.Profile(), time.perf_counter()
    profile.enable()
    sparsify(directory / "model", tokens, config, target, directory / "out", directory / "work", silent)
    profile.disable()
    seconds = time.perf_counter() - started
    rows = pstats.Stats(profile).stats.items()  # type: ignore[attr-defined]
    products = sum(row[2] for (_, _, name), row in rows if any(product in name for product in PRODUCTS))
    peak = status_bytes("VmHWM")
    Path(out).write_text(json.dumps({"seconds": seconds, "share_in_products": products / seconds, "peak_bytes": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
