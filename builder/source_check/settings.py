"""Settings of config.json that later stages do not support: rotary scalings, activations, biases, windows, token ids.

Reads the config alone and imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from builder.planning.model_config import ROPE_TYPES, Architecture
from calibration.quantization.trtllm_config import rotary
from plugins.common.errors import UserError
from plugins.common.formats import FLOATS

TRTLLM_ROPE_TYPES = ("dynamic", "longrope")  # that TensorRT-LLM runs besides
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_python", "gelu_pytorch_tanh", "relu", "relu2")


def check_settings(
    config: Mapping[str, Any], shapes: Architecture, source: str, backend: str, evaluated: bool, max_seq_len: int
) -> list[str]:
    """Notes on the settings of `config`, read from `source`, for an engine of `backend`.

    `evaluated` is whether accuracy is measured, which takes the torch engine whatever the backend. Raises UserError for
    settings that cannot be built.
    """
    model_type, expected = config.get("model_type"), shapes.family.model_type
    if model_type != expected:
        raise UserError(
            f"'{source}': model_type is {str(model_type)[:40]!r}, and {shapes.name} has '{expected}': set it to that"
        )
    check_dtype(shapes, source)
    _check_rotary(config, source, runs_on_torch=backend == "torch" or evaluated)
    activation = config.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise UserError(f"'{source}': hidden_act '{activation}' is not supported: use one of {', '.join(ACTIVATIONS)}")
    for key in ("rms_norm_eps", "attention_dropout", "initializer_range"):
        _number(config, key, source, default=0, least=0)
    if shapes.family.trtllm.qwen_type == "qwen3" and shapes.bias_qkv and backend == "tensorrt":
        raise UserError(
            f"'{source}': TensorRT-LLM's Qwen3 has no attention biases, and attention_bias is true: "
            "use engine.backend=pytorch or torch"
        )
    notes = []
    if config.get("attention_bias") and not shapes.bias_o:
        notes.append(f"config.json sets attention_bias, which a {shapes.name} does not have: the key is ignored")
    window = shapes.sliding_window
    if window is not None and window < max_seq_len and backend != "torch":
        notes.append(
            f"sliding_window {window} is below engine.max_seq_len {max_seq_len}: TensorRT-LLM attends to all tokens "
            f"unless it is started with kv_cache_config.max_attention_window [{window}], and the accuracy here is with "
            f"the window; set engine.max_seq_len={window} to serve the measured context"
        )
    return notes


def check_dtype(shapes: Architecture, source: str) -> None:
    """Raises UserError for a dtype that no model is built in."""
    dtypes = [format.dtype for format in FLOATS]
    if shapes.dtype not in dtypes:
        raise UserError(f"'{source}': dtype is '{shapes.dtype[:40]}': use one of {', '.join(dtypes)}")


def _check_rotary(config: Mapping[str, Any], source: str, runs_on_torch: bool) -> None:
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(key), Mapping | None):
            raise UserError(f"'{source}': {key} is not a table of keys: fetch the model again")
    _number(config, "rope_theta", source, default=1)
    try:
        base, scaling = rotary(config)
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"'{source}': rope_theta is not a number ({error}): fetch the model again") from None
    if not 0 < base < float("inf"):
        raise UserError(f"'{source}': rope_theta is {base}, not a positive number: fetch the model again")
    scaling = scaling or {"type": "default"}
    kind = scaling["type"]
    if not isinstance(kind, str):
        raise UserError(f"'{source}': rope_type is {str(kind)[:40]!r}, not a name: fetch the model again")
    if kind in TRTLLM_ROPE_TYPES and not runs_on_torch:
        return
    if kind not in ROPE_TYPES:
        also = "; TensorRT-LLM's own need accuracy.data=null" if kind in TRTLLM_ROPE_TYPES else ""
        raise UserError(
            f"'{source}': rope_type '{str(kind)[:40]}' is not supported: the torch engine, which also measures "
            f"accuracy, runs {', '.join(ROPE_TYPES)}{also}"
        )
    for key in ROPE_TYPES[kind]:
        if key == "original_max_position_embeddings" and key not in scaling and key in config:
            continue
        _number(scaling, key, f"{source}: rope scaling '{kind}'")


def _number(table: Mapping[str, Any], key: str, source: str, default: float | None = None, least: float = 1e-9) -> None:
    if key not in table and default is None:
        raise UserError(f"'{source}' lacks '{key}': fetch the model again")
    value = table.get(key, default)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < 1e30:
        raise UserError(f"'{source}': {key} is {str(value)[:40]!r}, not a number above 0: fetch the model again")
