"""STAND-IN: what a model is built from: the Hugging Face config, what ModelOpt declared, the mapping."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch

from tensorrt_llm.mapping import Mapping
from tensorrt_llm.models.modeling_utils import QuantConfig


@dataclass
class ModelConfig:
    pretrained_config: SimpleNamespace
    quant_config: QuantConfig | None = None
    quant_config_dict: dict | None = None
    mapping: Mapping = field(default_factory=Mapping)
    force_dynamic_quantization: bool = False

    @classmethod
    def from_pretrained(cls, directory, mapping=None, dtype=None, **options):
        """Reads config.json and, in ModelOpt's checkpoints, hf_quant_config.json. `dtype` overrides the model's own."""
        config = json.loads((Path(directory) / "config.json").read_text())
        config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
        config["torch_dtype"] = dtype or getattr(torch, config.get("dtype") or config["torch_dtype"])
        rope = config.get("rope_parameters") or {}
        config["rope_theta"] = rope.get("rope_theta") or config.get("rope_theta", 10000.0)
        declared = Path(directory) / "hf_quant_config.json"
        quant = None
        if declared.is_file():
            section = json.loads(declared.read_text())["quantization"]
            if section["quant_algo"] not in (None, "FP8"):
                raise ValueError(f"unsupported quant mode: {section['quant_algo']}")
            known = ("quant_algo", "kv_cache_quant_algo", "exclude_modules")
            quant = QuantConfig(**{key: section[key] for key in known if key in section})
        return cls(SimpleNamespace(**config), quant, None, mapping or Mapping(), **options)
