"""A TensorRT-LLM checkpoint directory with nothing in its weight files, for tests of what reads only config.json."""

import json
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "producer": {"name": "modelopt", "version": "0.47.0"},
    "architecture": "LlamaForCausalLM",
    "dtype": "bfloat16",
    "logits_dtype": "float16",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 256,
    "intermediate_size": 768,
    "vocab_size": 4096,
    "head_size": 64,
    "rotary_base": 500000.0,
    "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
    "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]},
}
LAYERS = [f"transformer.layers.{i}.{name}" for i in range(2) for name in ("attention.qkv", "mlp.fc", "mlp.proj")]


def write_checkpoint(directory: Path, sparse: bool = True, quant_algo: str | None = "FP8", **changes: Any) -> Path:
    """Writes it with `changes` to the config; a change to None leaves the key out."""
    config = CONFIG | {"quantization": CONFIG["quantization"] | {"quant_algo": quant_algo}} | changes
    config = {key: value for key, value in config.items() if value is not None}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    for rank in range(config["mapping"]["world_size"] if "mapping" in config else 1):
        (directory / f"rank{rank}.safetensors").write_bytes(b"\0" * 8)
    if sparse:
        declared = {"pattern": "2:4", "method": "magnitude", "layers": LAYERS}
        (directory / "sparsity.json").write_text(json.dumps(declared))
    return directory
