"""The linear layers of known models, fused as engines run them, for kernel tables.

Sizes are those of the models' published config.json files.
"""

from __future__ import annotations

from dataclasses import dataclass

from plugins.common.linear_shape import LinearShape


@dataclass(frozen=True)
class Model:
    """A Llama-like decoder, by the numbers of its config.json."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    num_hidden_layers: int
    vocab_size: int
    head_dim: int = 128

    def layers(self, format: str = "bf16", fraction: float = 0.0) -> list[LinearShape]:
        """Of one block; qkv and gate_up as one product each. `fraction` is the share of each in 2:4."""
        attention, hidden, inner = self.num_attention_heads * self.head_dim, self.hidden_size, self.intermediate_size
        qkv = attention + 2 * self.num_key_value_heads * self.head_dim
        return [
            LinearShape(qkv, hidden, format, fraction, name="qkv_proj"),
            LinearShape(hidden, attention, format, fraction, name="o_proj"),
            LinearShape(2 * inner, hidden, format, fraction, name="gate_up_proj"),
            LinearShape(hidden, inner, format, fraction, name="down_proj"),
        ]

    def config(self) -> dict[str, object]:
        """A config.json for the torch engine."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "vocab_size": self.vocab_size,
            "head_dim": self.head_dim,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
        }


MODELS = {
    "llama-3.1-8b": Model(4096, 14336, 32, 8, 32, 128256),
    "llama-3.1-70b": Model(8192, 28672, 64, 8, 80, 128256),
    "llama-2-7b": Model(4096, 11008, 32, 32, 32, 32000),
    "llama-2-70b": Model(8192, 28672, 64, 8, 80, 32000),
    "qwen2.5-7b": Model(3584, 18944, 28, 4, 28, 152064),
    "qwen2.5-14b": Model(5120, 13824, 40, 8, 48, 152064),
}
