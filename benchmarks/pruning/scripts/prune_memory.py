"""python prune_memory.py METHOD WORK BLOCKS SAMPLES LENGTH VOCABULARY OUT: prunes WORK/model; its time and memory."""

import cProfile
import json
import pstats
import sys
import time
from pathlib import Path

import numpy as np

from calibration.config import Sparsity
from calibration.pruning.sparsify import sparsify
from plugins.sparsity.declaration import Declaration

PRODUCTS = ("nn.linear", "addmm_", "scaled_dot_product_attention", "cholesky_ex", "solve_triangular")
LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]

method, work, blocks, samples, length, vocabulary, out = sys.argv[1:]
tokens = np.random.default_rng(0).integers(int(vocabulary), size=(int(samples), int(length)))
layers = [f"model.layers.{block}.{name}" for block in range(int(blocks)) for name in LINEARS]
profile, started, directory = cProfile.Profile(), time.perf_counter(), Path(work)
profile.enable()
target, out_directory = Declaration(tuple(layers)), directory / "out"
sparsify(
    directory / "model", tokens, Sparsity(method=method), target, out_directory, directory / "work", lambda *_: None
)
profile.disable()
seconds = time.perf_counter() - started
rows = pstats.Stats(profile).stats.items()
products = sum(row[2] for (_, _, name), row in rows if any(product in name for product in PRODUCTS))
status = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
found = {"seconds": seconds, "share_in_products": products / seconds, "peak_bytes": peak}
Path(out).write_text(json.dumps(found))
