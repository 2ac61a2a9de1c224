"""The model families that we build, described from `config.json` alone.

Module names and shapes follow `transformers`. The list is closed: a name from a checkpoint's config is looked up here
and never imported, so that a config cannot name code to run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plugins.common.errors import UserError


@dataclass(frozen=True)
class Linear:
    """One linear layer: weight [out_features, in_features]. `block` is None outside the decoder blocks."""

    name: str
    out_features: int
    in_features: int
    bias: bool
    block: int | None


# architecture -> which of the attention projections (q, k, v; o) have a bias when the config does not say
_BIAS_QKV_O = {
    "LlamaForCausalLM": (False, False),
    "MistralForCausalLM": (False, False),
    "Qwen2ForCausalLM": (True, False),
    "Qwen3ForCausalLM": (False, False),
}
ARCHITECTURES = tuple(_BIAS_QKV_O)


@dataclass(frozen=True)
class Architecture:
    """The shapes of one model."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_blocks: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tied_embeddings: bool
    dtype: str
    bias_qkv: bool
    bias_o: bool
    bias_mlp: bool

    def linears(self) -> Iterator[Linear]:
        """Every linear layer, in the order of the forward pass; `lm_head` last, also when it is tied."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        for block in range(self.num_blocks):
            for name, out_features, in_features, bias in (
                ("self_attn.q_proj", queries, hidden, self.bias_qkv),
                ("self_attn.k_proj", keys, hidden, self.bias_qkv),
                ("self_attn.v_proj", keys, hidden, self.bias_qkv),
                ("self_attn.o_proj", hidden, queries, self.bias_o),
                ("mlp.gate_proj", inner, hidden, self.bias_mlp),
                ("mlp.up_proj", inner, hidden, self.bias_mlp),
                ("mlp.down_proj", hidden, inner, self.bias_mlp),
            ):
                yield Linear(f"model.layers.{block}.{name}", out_features, in_features, bias, block)
        yield Linear("lm_head", self.vocab_size, hidden, False, None)

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that the KV cache holds for one token, over all blocks."""
        return 2 * self.num_blocks * self.num_kv_heads * self.head_dim

    @property
    def other_parameters(self) -> int:
        """Parameters that are no linear weight: embedding, biases and norms (also the per-head norms of Qwen3)."""
        biases = sum(linear.out_features for linear in self.linears() if linear.bias)
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.name == "Qwen3ForCausalLM" else 0)
        return self.vocab_size * self.hidden_size + self.num_blocks * norms + self.hidden_size + biases


def read_config(model: Path) -> dict[str, Any]:
    """The model's `config.json`. Raises UserError where there is none or it is not JSON."""
    path = model / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise UserError(f"'{model}' holds no config.json: name a Hugging Face model directory or id") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is not JSON ({error}): fetch the model again") from None
    if not isinstance(config, dict):
        raise UserError(f"'{path}' is not a JSON object: fetch the model again")
    return config


def architecture(config: dict[str, Any], source: str = "config.json") -> Architecture:
    """The architecture that a `config.json` describes. Raises UserError where we do not build it or a size lacks."""
    names = config.get("architectures") or ["none"]
    name = names[0]
    if name not in _BIAS_QKV_O:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"'{source}' names the architecture '{name}', which is not supported: use one of {known}")
    if config.get("quantization_config"):
        raise UserError(f"'{source}' is quantized already: start from the 16-bit model it was made from")
    bias_qkv, bias_o = _BIAS_QKV_O[name]
    if "attention_bias" in config and name != "Qwen2ForCausalLM":
        bias_qkv = bias_o = bool(config["attention_bias"])
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return Architecture(
            name=name,
            hidden_size=hidden,
            intermediate_size=int(config["intermediate_size"]),
            num_blocks=int(config["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            vocab_size=int(config["vocab_size"]),
            max_position_embeddings=int(config.get("max_position_embeddings") or 2048),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"),
            bias_qkv=bias_qkv,
            bias_o=bias_o,
            bias_mlp=bool(config.get("mlp_bias", False)),
        )
    except KeyError as missing:
        raise UserError(f"'{source}' lacks {missing}: it is not a complete {name} config") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"'{source}' holds a size that is not a number ({error}): fetch the model again") from None
