"""A LoRA adapter's files as PEFT stores them.

https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


def tensor_names(layer: str) -> tuple[str, str]:
    """What a linear layer's A [rank, in_features] and B [out_features, rank] are called."""
    return f"base_model.model.{layer}.lora_A.weight", f"base_model.model.{layer}.lora_B.weight"


def write(out: Path, tensors: Mapping[str, Tensor], rank: int, layers: Sequence[str], others: Sequence[str]) -> None:
    """Writes adapter_model.safetensors and adapter_config.json into the directory `out`.

    `tensors` go by `tensor_names`; `layers` are the module names that have an adapter, `others` the model's remaining
    linear layers.
    """
    out.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, str(out / "adapter_model.safetensors"), {"format": "pt"})
    text = json.dumps(_config(rank, layers, others), indent=2, sort_keys=True)
    (out / "adapter_config.json").write_text(text + "\n")


def _config(rank: int, layers: Sequence[str], others: Sequence[str]) -> dict[str, Any]:
    # targets by the last part of their names, as servers know no others; PEFT then leaves out others of the same
    targets = sorted({_last_part(layer) for layer in layers})
    excluded = [name for name in others if _last_part(name) in targets]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "checkpoint",  # next to the adapter in a build
        "r": rank,
        "lora_alpha": rank,  # a scale of lora_alpha / r = 1
        "target_modules": targets,
        **({"exclude_modules": excluded} if excluded else {}),  # PEFT 0.14 and later
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,  # older TensorRT-LLM requires the key
        "use_dora": False,
        "use_rslora": False,
    }


def _last_part(name: str) -> str:
    return name.rsplit(".", 1)[-1]
