"""python -m benchmarks.pruning.memory: peak memory of SparseGPT on a model with Llama-3.2-1B's shapes.

The model is random, 4.9 GB of float32 on disk, created block by block. It is pruned in its own process, whose peak
resident memory is read from the kernel. Prints the time and its share in matrix products (the calls of linear layers,
products, attention, factoring and triangular solves, by Python's profiler).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.environment import describe
from benchmarks.pruning.accuracy import RESULTS, run_script, write_result
from plugins.common.json_files import read_json, write_json

SHAPE = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip


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
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    return sum(4 * shape.numel() for shape in shapes.values())


def main() -> None:
    """Makes the model, prunes it in a process, prints and writes the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning.memory", description=__doc__)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        stored = make_model(Path(work) / "model", arguments.blocks)
        size = (str(arguments.samples), str(arguments.sequence_length), str(SHAPE["vocab_size"]))
        run_script(sys.executable, "prune_memory", arguments.method, work, *size, f"{work}/measured.json")
        measured = read_json(Path(work) / "measured.json")
    settings = {**SHAPE, "blocks": arguments.blocks, "samples": arguments.samples, "method": arguments.method}
    settings["sequence_length"] = arguments.sequence_length
    result = {"environment": describe(), "settings": settings, "model_bytes": stored, **measured}
    peak, share = result["peak_bytes"] / 2**30, result["share_in_products"]
    print(
        f"{stored / 2**30:.2f} GiB of weights: peak {peak:.2f} GiB, {result['seconds']:.0f} s, {share:.0%} in products"
    )
    print(write_result("pruning_memory", result, arguments.out))


if __name__ == "__main__":
    main()
