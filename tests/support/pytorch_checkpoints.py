"""Checkpoints for the pytorch backend, pruned and quantized."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from builder.config import EngineConfig

ROOT = Path(__file__).parents[2]


MODEL = ROOT / "examples" / "docs-llama"


WIDE = {False: "float32", True: "float64"}  # of FP8's sums: float32's noise can carry an input to the next e4m3 number
CONFIG = EngineConfig(backend="pytorch", max_batch_size=4, max_seq_len=128)


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


FUSED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def prune(weight: torch.Tensor) -> torch.Tensor:
    """The two largest of each group of 4 inputs."""
    groups = weight.float().abs().unflatten(-1, (-1, 4))
    mask = torch.zeros_like(groups).scatter_(-1, groups.topk(2).indices, 1).flatten(-2)
    return torch.where(mask.bool(), weight, torch.zeros_like(weight))


def quantize(tensors: dict[str, torch.Tensor], block: str) -> None:
    """FP8 in place, as ModelOpt writes it; the layers that TensorRT-LLM fuses share their weight scale."""
    for group in FUSED:
        names = [f"{block}.{'self_attn' if part in LINEARS[:4] else 'mlp'}.{part}" for part in group]
        largest = max(float(tensors[f"{name}.weight"].float().abs().max()) for name in names)
        # powers of two: multiplying by 1 / scale, as we do, is then dividing by it, as TensorRT-LLM does
        scale = torch.tensor(2.0 ** math.ceil(math.log2(largest / 448)))
        for name in names:
            weight = tensors[f"{name}.weight"].float() / scale
            tensors[f"{name}.weight"] = (weight + 0.0).to(torch.float8_e4m3fn)
            tensors[f"{name}.weight_scale"] = scale.clone()
            tensors[f"{name}.input_scale"] = torch.tensor(2.0**-6)


def write_checkpoint(out: Path, fp8: bool, sparse: bool) -> Path:
    """A unified checkpoint of docs-llama in a test's own hand: dense or 2:4, bf16 or FP8."""
    out.mkdir(parents=True)
    tensors = load_file(MODEL / "model.safetensors")
    layers = sorted(name.removesuffix(".weight") for name in tensors if name.split(".")[-2] in LINEARS)
    if sparse:
        for name in layers:
            tensors[f"{name}.weight"] = prune(tensors[f"{name}.weight"])
        declared = {"pattern": "2:4", "method": "magnitude", "layers": layers}
        (out / "sparsity.json").write_text(json.dumps(declared))
    config = json.loads((MODEL / "config.json").read_text())
    if fp8:
        for block in range(config["num_hidden_layers"]):
            quantize(tensors, f"model.layers.{block}")
        config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
        section = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
        (out / "hf_quant_config.json").write_text(
            json.dumps({"producer": {"name": "modelopt"}, "quantization": section})
        )
    (out / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((MODEL / name).read_bytes())
    save_file(tensors, out / "model.safetensors")
    return out


def token_ids() -> torch.Tensor:
    return torch.randint(4096, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    kinds = ((fp8, sparse) for fp8 in (False, True) for sparse in (False, True))
    return {(fp8, sparse): write_checkpoint(root / f"{fp8}-{sparse}", fp8, sparse) for fp8, sparse in kinds}
