"""python -m benchmarks.pruning_memory: SparseGPT's walk through a model of Llama-3.2-1B's shapes in little memory.

The model is random, 4.9 GB of float32 on disk, made a block at a time. It is pruned in a process of its own, whose peak
of resident memory is read from the kernel. States the time, and the share of it that goes into matrix products (the
calls of linear layers, products, attention, factoring and triangular solves, by Python's profiler).
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.accuracy_peers import RESULTS, write_result
from benchmarks.environment import describe

SHAPE = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip
PRODUCTS = ("nn.linear", "addmm_", "scaled_dot_product_attention", "cholesky_ex", "solve_triangular")
LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def make_model(directory: Path, blocks: int) -> int:
    """A random Llama of `SHAPE`, float32, one shard a block; returns its bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**SHAPE, num_hidden_layers=blocks)  # type: ignore[arg-type]
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in AutoModelForCausalLM.from_config(config).named_parameters()}
    parts: dict[str, list[str]] = {}
    for name in shapes:
        parts.setdefault(name.split(".")[2] if name.startswith("model.layers.") else "other", []).append(name)
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    for number, names in enumerate(parts.values(), 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {
            name: torch.ones(shapes[name]) if "norm" in name else torch.randn(shapes[name], generator=generator) * 0.02
            for name in names
        }
        save_file(tensors, str(directory / file), {"format": "pt"})
        index |= dict.fromkeys(names, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sum(4 * shape.numel() for shape in shapes.values())


def prune(directory: Path, blocks: int, samples: int, length: int, method: str) -> dict[str, Any]:
    """Runs in the measured process: seconds, the share of products, and the peak of resident memory, bytes."""
    import numpy as np

    from calibration.config import Sparsity
    from calibration.sparsify import sparsify

    tokens = np.random.default_rng(0).integers(SHAPE["vocab_size"], size=(samples, length))
    layers = [f"model.layers.{block}.{name}" for block in range(blocks) for name in LINEARS]
    profile, started = cProfile.Profile(), time.perf_counter()
    profile.enable()
    sparsify(
        directory / "model", tokens, Sparsity(method=method), layers, directory / "out", directory / "work",  # type: ignore[arg-type]
        lambda stage, done, total: print(f"{stage} {done}/{total}", file=sys.stderr, flush=True),
    )  # fmt: skip
    profile.disable()
    rows = pstats.Stats(profile).stats.items()  # type: ignore[attr-defined]
    products = sum(row[2] for (_, _, name), row in rows if any(product in name for product in PRODUCTS))
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "share_in_products": products / seconds, "peak_bytes": peak}


def main() -> None:
    """Makes the model, prunes it in a process, prints and writes the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning_memory", description=__doc__)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--prune", type=Path, help=argparse.SUPPRESS)  # the measured process
    arguments = parser.parse_args()
    size = (arguments.blocks, arguments.samples, arguments.sequence_length, arguments.method)
    if arguments.prune:
        print(json.dumps(prune(arguments.prune, *size)))
        return
    with tempfile.TemporaryDirectory() as work:
        stored = make_model(Path(work) / "model", arguments.blocks)
        command = [sys.executable, "-m", "benchmarks.pruning_memory", *sys.argv[1:], "--prune", work]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    settings = {**SHAPE, "blocks": arguments.blocks, "samples": arguments.samples, "method": arguments.method}
    settings["sequence_length"] = arguments.sequence_length
    found = {"environment": describe(), "settings": settings, "model_bytes": stored, **json.loads(done.stdout)}
    peak, share = found["peak_bytes"] / 2**30, found["share_in_products"]
    print(
        f"{stored / 2**30:.2f} GiB of weights: peak {peak:.2f} GiB, {found['seconds']:.0f} s, {share:.0%} in products"
    )
    print(write_result("pruning_memory", found, arguments.out))


if __name__ == "__main__":
    main()
