"""The supported model families, described from `config.json` alone.

Module names and shapes follow `transformers`. The list is closed: a name from a checkpoint's config is looked up here
and never imported, so that a config cannot name code to run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plugins.common.errors import UserError
from plugins.common.families import FAMILIES, Family, family_of
from plugins.common.formats import OF_DTYPE
from plugins.common.json_files import read_json_object
from plugins.common.linear_shape import LinearShape

ROPE_TYPES = {  # that the torch engine runs: their frequencies do not change with the length -> the keys that they need
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}


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
    sliding_window: int | None = None

    @property
    def family(self) -> Family:
        return FAMILIES[self.name]

    @property
    def format(self) -> str:
        """Of the weights."""
        return OF_DTYPE.get(self.dtype, "bf16")

    def linears(self) -> Iterator[LinearShape]:
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
                full = f"model.layers.{block}.{name}"
                yield LinearShape(out_features, in_features, self.format, name=full, bias=bias)
        yield LinearShape(self.vocab_size, hidden, self.format, name="lm_head")

    @property
    def head_widths(self) -> dict[str, int]:
        """Rows, or inputs of `o_proj`, that belong to one key-value head, by a layer's last name."""
        queries = self.num_heads // self.num_kv_heads * self.head_dim
        return {"q_proj": queries, "k_proj": self.head_dim, "v_proj": self.head_dim, "o_proj": queries}

    @property
    def kv_values_per_token(self) -> int:
        """Values that the KV cache holds for one token, over all blocks."""
        return 2 * self.num_blocks * self.num_kv_heads * self.head_dim

    @property
    def other_parameters(self) -> int:
        """Parameters outside linear weights: embedding, biases and norms."""
        biases = sum(linear.out_features for linear in self.linears() if linear.bias)
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.family.qk_norm else 0)
        return self.vocab_size * self.hidden_size + self.num_blocks * norms + self.hidden_size + biases


def read_config(model: Path) -> dict[str, Any]:
    """The model's `config.json`. Raises UserError if there is none or it is not JSON."""
    try:
        return read_json_object(model / "config.json", "fetch the model again")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"'{model}' contains no config.json: give a Hugging Face model directory or id") from None


def architecture(config: dict[str, Any], source: str = "config.json") -> Architecture:
    """The architecture of a `config.json`. Raises UserError if it is not supported or a size is missing."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else names
    family = family_of(name if isinstance(name, str) else "none", source)
    if config.get("quantization_config"):
        raise UserError(f"'{source}' is quantized already: start from the 16-bit model it was made from")
    bias = family.attention_bias and _flag(config, "attention_bias", source)
    hidden, heads = (_size(config, key, source) for key in ("hidden_size", "num_attention_heads"))
    kv_heads = _size(config, "num_key_value_heads", source, family.num_key_value_heads or heads, null=heads)
    head_dim = _size(
        config, "head_dim", source, family.head_dim or hidden // heads, null=family.head_dim or hidden // heads
    )
    if heads % kv_heads:
        raise UserError(f"'{source}': num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
    if not config.get("head_dim") and family.head_dim is None and hidden % heads:
        raise UserError(f"'{source}': num_attention_heads {heads} does not divide hidden_size {hidden}")
    return Architecture(
        name=family.architecture,
        hidden_size=hidden,
        intermediate_size=_size(config, "intermediate_size", source),
        num_blocks=_size(config, "num_hidden_layers", source),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=_size(config, "vocab_size", source),
        max_position_embeddings=_size(config, "max_position_embeddings", source, family.max_position_embeddings),
        tied_embeddings=_flag(config, "tie_word_embeddings", source),
        dtype=_dtype(config),
        bias_qkv=bias or family.bias_qkv,
        bias_o=bias,
        bias_mlp=family.mlp_bias and _flag(config, "mlp_bias", source),
        sliding_window=_sliding_window(config, family, source),
    )


def _size(config: dict[str, Any], key: str, source: str, default: int | None = None, null: int | None = None) -> int:
    """A positive number of the config; `default` where the key is missing, `null` where it is null."""
    if key not in config and default is None:
        raise UserError(f"'{source}' lacks '{key}': it is not a complete config")
    value = config.get(key, default)
    value = (default if null is None else null) if value is None else value
    if type(value) is not int or not 0 < value < 1 << 40:
        raise UserError(f"'{source}': {key} is {str(value)[:40]!r}, not a positive whole number: fetch the model again")
    return value


def _flag(config: dict[str, Any], key: str, source: str) -> bool:
    value = config.get(key)
    if value not in (None, True, False):
        raise UserError(f"'{source}': {key} is {str(value)[:40]!r}, not true or false: fetch the model again")
    return bool(value)


def _dtype(config: dict[str, Any]) -> str:
    """The name under either key; bfloat16 where there is none."""
    named = config.get("torch_dtype") if config.get("dtype") is None else config["dtype"]
    return "bfloat16" if named is None else str(named)


def _sliding_window(config: dict[str, Any], family: Family, source: str) -> int | None:
    """Tokens that attention looks back; None if it sees all."""
    if family.sliding_window is None or config.get("sliding_window", 0) is None:
        return None
    if family.use_sliding_window and not _flag(config, "use_sliding_window", source):
        return None
    return _size(config, "sliding_window", source, family.sliding_window)
