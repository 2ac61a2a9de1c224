"""Completes the `config.json` that ModelOpt writes for TensorRT-LLM with what it loses under transformers 5.

ModelOpt 0.47 copies `rope_theta` and `rope_scaling` out of the model config's attributes. transformers 5 keeps both in
one dict, `rope_parameters`, so ModelOpt finds neither and writes no `rotary_base` and no `rotary_scaling`. TensorRT-LLM
then takes base 10000 and no scaling without a word, which is wrong for Llama 3, Qwen and most others. Where
TensorRT-LLM is not installed, as where one calibrates, ModelOpt also leaves out which layers have a bias and which
Qwen it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plugins.common.errors import UserError
from plugins.common.families import FAMILIES, family_of

DEFAULT_BASE = 10000.0
QWEN_LOGN_LENGTH = 8192  # TensorRT-LLM's default of seq_length: read, though only log-n attention uses it
TRTLLM_NAMES = {  # Hugging Face's name in a block -> TensorRT-LLM's
    "self_attn.q_proj": "attention.qkv",
    "self_attn.k_proj": "attention.qkv",
    "self_attn.v_proj": "attention.qkv",
    "self_attn.o_proj": "attention.dense",
    "mlp.gate_proj": "mlp.fc",
    "mlp.up_proj": "mlp.gate",
    "mlp.down_proj": "mlp.proj",
}


def trtllm_name(layer: str) -> str:
    """What TensorRT-LLM's TensorRT models call a linear layer of Hugging Face's; q, k and v are one there."""
    _, _, rest = layer.partition(".layers.")
    block, _, inner = rest.partition(".")
    return f"transformer.layers.{block}.{TRTLLM_NAMES[inner]}" if inner in TRTLLM_NAMES else layer


def complete_config(hf_config: Mapping[str, Any], trtllm_config: Mapping[str, Any]) -> dict[str, Any]:
    """`trtllm_config` with the Hugging Face config's settings of the rotary embedding, the biases and the kind of Qwen.

    `hf_config` is the `config.json` of the source model, written by transformers 4 or 5. Raises UserError for rotary
    settings by layer, which TensorRT-LLM's config lacks, and where `trtllm_config` has other rotary settings.
    """
    base, scaling = rotary(hf_config)
    family = family_of(trtllm_config["architecture"], "config.json of the TensorRT-LLM checkpoint")
    source = FAMILIES.get((hf_config.get("architectures") or [""])[0], family)  # Mistral is exported as Llama
    values: dict[str, Any] = {"rotary_base": base, "rotary_scaling": scaling}
    if family.trtllm.qwen_type:
        values |= {"qwen_type": family.trtllm.qwen_type, "seq_length": QWEN_LOGN_LENGTH}
        values["attn_bias"] = family.bias_qkv
    else:
        values["attn_bias"] = source.attention_bias and bool(hf_config.get("attention_bias", False))
    values["mlp_bias"] = source.mlp_bias and bool(hf_config.get("mlp_bias", False))
    for key in ("rotary_base", "rotary_scaling"):
        if trtllm_config.get(key) not in (None, values[key]):
            raise UserError(
                f"the exported config.json has {key} {trtllm_config[key]} and the model {values[key]}: export it again"
            )
    return {**trtllm_config, **values}


def for_transformers_4(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """A Hugging Face `config.json` that transformers 4 reads rightly too, which TensorRT-LLM 1.0 to 1.2 pins.

    It ignores `rope_parameters` and silently uses base 10000 without scaling. Below 4.56 it ignores `dtype` and leaves
    the model without one, which TensorRT-LLM passes to its layers. transformers 5 reads either form.
    """
    base, scaling = rotary(hf_config)
    scaling = {key: value for key, value in scaling.items() if key != "type"} if scaling else None
    dtype = hf_config.get("dtype") or hf_config.get("torch_dtype")
    dtypes = {"dtype": dtype, "torch_dtype": dtype} if dtype else {}
    return {**hf_config, "rope_theta": base, "rope_scaling": scaling, **dtypes}


def rotary(hf_config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(base, scaling) of a model's rotary embedding, in TensorRT-LLM's form: scaling is None for the plain one.

    transformers 4 writes `rope_theta` and `rope_scaling`, 5 writes `rope_parameters` {rope_theta, rope_type, ...}.
    """
    parameters = dict(hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {})
    if any(isinstance(value, Mapping) for value in parameters.values()):
        layers = ", ".join(sorted(parameters))
        raise UserError(
            f"the model's rotary settings differ by layer type ({layers}): use engine.backend=pytorch or torch"
        )
    base = float(parameters.pop("rope_theta", None) or hf_config.get("rope_theta") or DEFAULT_BASE)
    kind = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    parameters.pop("type", None)
    if kind == "default":
        return base, None
    return base, {"type": kind, "rope_type": kind, **parameters}  # TensorRT-LLM looks for either name
