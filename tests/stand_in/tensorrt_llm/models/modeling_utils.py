"""STAND-IN: a model's config, and QuantConfig, where unknown keys are refused, as in the later releases."""

import fnmatch
import json
from dataclasses import dataclass
from pathlib import Path

from tensorrt_llm.mapping import Mapping
from tensorrt_llm.quantization import QuantAlgo, QuantMode


@dataclass
class QuantConfig:
    quant_algo: QuantAlgo | None = None
    kv_cache_quant_algo: QuantAlgo | None = None
    group_size: int = 128
    smoothquant_val: float = 0.5
    clamp_val: list | None = None
    use_meta_recipe: bool = False
    has_zero_point: bool = False
    pre_quant_scale: bool = False
    exclude_modules: list | None = None

    def __post_init__(self):
        self.quant_algo = QuantAlgo(self.quant_algo) if self.quant_algo else None
        self.kv_cache_quant_algo = QuantAlgo(self.kv_cache_quant_algo) if self.kv_cache_quant_algo else None

    @property
    def quant_mode(self):
        return QuantMode(self.quant_algo)

    @property
    def layer_quant_mode(self):
        return QuantMode(self.quant_algo)

    def is_module_excluded_from_quantization(self, name):
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.exclude_modules or ())

    @classmethod
    def from_dict(cls, values):
        return cls(**values)


class PretrainedConfig:
    def __init__(self, **values):
        self.__dict__.update(values)
        self.mapping = Mapping.from_dict(values["mapping"])
        self.quantization = QuantConfig.from_dict(values["quantization"])

    @classmethod
    def from_json_file(cls, path):
        return cls(**json.loads(Path(path).read_text()))

    def set_rank(self, rank):
        self.mapping.rank = rank
