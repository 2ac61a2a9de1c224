"""The model families that twofour supports: one row each. A new family is one row here. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from plugins.common.errors import UserError


@dataclass(frozen=True)
class TrtllmNames:
    """What ModelOpt's export and TensorRT-LLM call a family."""

    decoder: str  # ModelOpt's decoder type
    tensorrt_class: str  # in tensorrt_llm.models
    pytorch_module: str  # of tensorrt_llm._torch.models
    qwen_type: str = ""  # of QWenConfig


@dataclass(frozen=True)
class Family:
    """What sets a family apart among decoders with rotary embeddings, grouped queries and gated MLPs."""

    architecture: str  # in config.json
    model_type: str  # of transformers
    config_class: str  # of transformers

    # transformers' defaults for keys that config.json omits
    max_position_embeddings: int
    num_key_value_heads: int | None = None  # None: as many as attention heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    sliding_window: int | None = None

    # the model's own parts, and which optional keys of config.json it reads
    bias_qkv: bool = False  # always, whatever config.json contains
    qk_norm: bool = False  # a norm of each head's queries and keys
    attention_bias: bool = False  # reads the key: biases of q, k, v and o
    mlp_bias: bool = False  # reads the key
    use_sliding_window: bool = False  # reads the key: a window only where it is true

    trtllm: TrtllmNames = TrtllmNames("", "", "")


FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family(
            "LlamaForCausalLM", "llama", "LlamaConfig", 2048, attention_bias=True, mlp_bias=True,
            trtllm=TrtllmNames("llama", "LLaMAForCausalLM", "modeling_llama"),
        ),
        Family(
            "MistralForCausalLM", "mistral", "MistralConfig", 131072, 8, sliding_window=4096,
            trtllm=TrtllmNames("llama", "LLaMAForCausalLM", "modeling_mistral"),
        ),
        Family(
            "Qwen2ForCausalLM", "qwen2", "Qwen2Config", 32768, 32, sliding_window=4096, use_sliding_window=True,
            bias_qkv=True, trtllm=TrtllmNames("qwen", "QWenForCausalLM", "modeling_qwen", "qwen2"),
        ),
        Family(
            "Qwen3ForCausalLM", "qwen3", "Qwen3Config", 32768, 32, 128, sliding_window=4096, use_sliding_window=True,
            attention_bias=True, qk_norm=True,
            trtllm=TrtllmNames("qwen", "QWenForCausalLM", "modeling_qwen3", "qwen3"),
        ),
    )
}  # fmt: skip


def family_of(architecture: str, source: str = "config.json") -> Family:
    """The family of an architecture. Raises UserError, which quotes `source`, for one that is not supported."""
    if architecture not in FAMILIES:
        known, shown = ", ".join(FAMILIES), str(architecture or "none")[:60]
        raise UserError(f"'{source}' has the architecture '{shown}', which is not supported", f"use one of {known}")
    return FAMILIES[architecture]


def model_types() -> tuple[str, ...]:
    """transformers' model types of all families."""
    return tuple(family.model_type for family in FAMILIES.values())
