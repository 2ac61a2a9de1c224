"""A TensorRT-LLM checkpoint's `config.json`, refused here where TensorRT-LLM would refuse it late, or never.

A TensorRT-LLM checkpoint is `config.json` and one `rank{N}.safetensors` a rank, and our `sparsity.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builder.checkpoint import Description, describe
from builder.planning import compatibility
from plugins.common.errors import UserError
from plugins.common.formats import KERNEL_OUTPUTS, OF_ALGORITHM, OF_KV_ALGORITHM
from plugins.common.json_files import read_json

DTYPES = {format.dtype: format.value for format in KERNEL_OUTPUTS}  # config.json's name -> ours
# The keys that TensorRT-LLM's QuantConfig takes: a newer release of it refuses any other.
QUANTIZATION_KEYS = frozenset(
    [
        "quant_algo",
        "kv_cache_quant_algo",
        "group_size",
        "smoothquant_val",
        "clamp_val",
        "use_meta_recipe",
        "has_zero_point",
        "pre_quant_scale",
        "exclude_modules",
    ]
)
REQUIRED = ("architecture", "dtype", "hidden_size", "num_hidden_layers", "num_attention_heads", "mapping")


def read(directory: Path) -> Description:
    """Describes `directory`. Raises UserError for what no TensorRT-LLM release from 1.0 to 1.2 would build."""
    config = _read_json(directory / "config.json", directory)
    where = directory / "config.json"
    for key in REQUIRED:
        if key not in config:
            what = "a Hugging Face checkpoint" if "architectures" in config else f"without '{key}'"
            raise UserError(f"'{where}' is {what}: give the TensorRT-LLM checkpoint directory (checkpoint-trtllm)")
    compatibility.check_architecture(str(config["architecture"]), "tensorrt").require()
    if config["dtype"] not in DTYPES:
        raise UserError(f"'{where}' has dtype '{config['dtype']}': export it as {' or '.join(DTYPES)}")
    _check_quantization(config, where)
    if "rotary_base" not in config:
        raise UserError(
            f"'{where}' has no rotary_base, and TensorRT-LLM would silently use 10000: add the model's rope_theta "
            "under that name, or export it again with twofour"
        )
    checkpoint = describe(directory)
    for rank in range(checkpoint.ranks):
        if not (directory / f"rank{rank}.safetensors").is_file():
            raise UserError(f"'{directory}' lacks rank{rank}.safetensors of {checkpoint.ranks} ranks: export it again")
    return checkpoint


def _check_quantization(config: dict[str, Any], where: Path) -> None:
    """Names settings that a newer ModelOpt may write and TensorRT-LLM does not support."""
    quantization = config.get("quantization") or {}
    producer = config.get("producer") or {}
    writer = f"{producer.get('name', 'an unknown tool')} {producer.get('version', '')}".strip()
    again = f"it was written by {writer}, export it again with nvidia-modelopt {compatibility.MODELOPT}"
    for key in quantization:
        if key not in QUANTIZATION_KEYS:
            raise UserError(
                f"'{where}' has the quantization key '{key}', which TensorRT-LLM 1.0 to 1.2 rejects: {again}"
            )
    for key, known in (("quant_algo", OF_ALGORITHM), ("kv_cache_quant_algo", OF_KV_ALGORITHM)):
        if quantization.get(key) not in known:
            names = ", ".join(str(name) for name in known if name)
            raise UserError(f"'{where}' has {key} '{quantization[key]}', not one of {names}: {again}")


def _read_json(path: Path, directory: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = read_json(path)
    except FileNotFoundError:
        raise UserError(f"'{directory}' contains no {path.name}: give a TensorRT-LLM checkpoint directory") from None
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read ({error}): export the checkpoint again") from None
    return content
