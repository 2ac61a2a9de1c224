"""STAND-IN: Llama for TensorRT engines: TensorRT-LLM's names and call order, attention on torch tensors."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional

from tensorrt_llm.functional import Tensor
from tensorrt_llm.layers import ColumnLinear, RowLinear
from tensorrt_llm.models.modeling_utils import PretrainedConfig
from tensorrt_llm.module import Module, ModuleList, Parameter
from tensorrt_llm.quantization.quantize import quantize


class RmsNorm(Module):
    def __init__(self, config):
        self.weight, self.eps = Parameter((config.hidden_size,), config.dtype), config.norm_epsilon

    def forward(self, x):
        value = x.trt_tensor.float()
        value = value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + self.eps)
        return Tensor(self.weight.value.trt_tensor * value.to(x.trt_tensor.dtype))


def rotate(x, base):
    half = x.shape[-1] // 2
    frequency = 1.0 / base ** (torch.arange(half, dtype=torch.float32) / half)
    angle = torch.arange(x.shape[-2], dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Attention(Module):
    def __init__(self, config):
        ranks, self.base, self.size = config.mapping.tp_size, config.rotary_base, config.head_size
        self.heads, self.kv_heads = config.num_attention_heads // ranks, config.num_key_value_heads // ranks
        wide = (config.num_attention_heads + 2 * config.num_key_value_heads) * self.size
        self.qkv = column(config, config.hidden_size, wide)
        self.dense = row(config, config.num_attention_heads * self.size, config.hidden_size)

    def forward(self, x):
        sizes = [n * self.size for n in (self.heads, self.kv_heads, self.kv_heads)]
        parts = self.qkv(x).trt_tensor.split(sizes, -1)
        q, k, v = (part.unflatten(-1, (-1, self.size)).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(
            rotate(q, self.base), rotate(k, self.base), v, is_causal=True, enable_gqa=True
        )
        return self.dense(Tensor(mixed.transpose(1, 2).flatten(-2)))


class GatedMLP(Module):
    """fc is Hugging Face's gate_proj, gate its up_proj."""

    def __init__(self, config):
        self.fc = column(config, config.hidden_size, config.intermediate_size)
        self.gate = column(config, config.hidden_size, config.intermediate_size)
        self.proj = row(config, config.intermediate_size, config.hidden_size)

    def forward(self, x):
        inner = functional.silu(self.fc(x).trt_tensor) * self.gate(x).trt_tensor
        return self.proj(Tensor(inner))


def column(config, in_features, out_features):
    return ColumnLinear(
        in_features, out_features, bias=False, dtype=config.dtype, tp_size=config.mapping.tp_size, gather_output=False
    )


def row(config, in_features, out_features):
    mapping = config.mapping
    return RowLinear(
        in_features,
        out_features,
        bias=False,
        dtype=config.dtype,
        tp_group=(mapping.group, mapping.tp_rank),
        tp_size=mapping.tp_size,
    )


class LLaMADecoderLayer(Module):
    def __init__(self, config):
        self.input_layernorm, self.attention = RmsNorm(config), Attention(config)
        self.post_layernorm, self.mlp = RmsNorm(config), GatedMLP(config)

    def forward(self, x):
        x = x + self.attention(self.input_layernorm(x))
        return x + self.mlp(self.post_layernorm(x))


class Embedding(Module):
    def __init__(self, config):
        self.weight = Parameter((config.vocab_size // config.mapping.tp_size, config.hidden_size), config.dtype)


class LLaMAModel(Module):
    def __init__(self, config):
        if config.mapping.is_first_pp_rank():
            self.vocab_embedding = Embedding(config)
        self.layers = ModuleList(LLaMADecoderLayer(config) for _ in config.mapping.pp_layers(config.num_hidden_layers))
        if config.mapping.is_last_pp_rank():
            self.ln_f = RmsNorm(config)


class PostInitCaller(type):
    def __call__(cls, *args, **kwargs):
        obj = type.__call__(cls, *args, **kwargs)
        obj.__post_init__()
        return obj


class PretrainedModel(Module, metaclass=PostInitCaller):
    def __init__(self, config):
        self.config = config

    def __post_init__(self):
        quantize(self, self.config.quantization)

    @classmethod
    def from_checkpoint(cls, directory, rank=None, config=None):
        weights = load_file(Path(directory) / f"rank{config.mapping.rank}.safetensors")
        model = cls(config)
        wanted = dict(model.named_parameters())
        if missing := sorted(set(wanted) - set(weights)):
            raise RuntimeError(f"Required but not provided tensors:{missing}")
        for name, parameter in wanted.items():
            parameter.value = weights[name]
        return model


class LLaMAForCausalLM(PretrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.transformer = LLaMAModel(config)
        rows = config.vocab_size // config.mapping.tp_size
        if config.mapping.is_last_pp_rank():
            self.lm_head = ColumnLinear(config.hidden_size, rows, bias=False, dtype=config.dtype)

    def forward(self, input_ids):
        """Logits; embedding and head are split by vocabulary, and this puts their parts together again."""
        mapping = self.config.mapping
        table = torch.cat(
            mapping.group.exchange(mapping.tp_rank, self.transformer.vocab_embedding.weight.value.trt_tensor)
        )
        x = Tensor(table[input_ids])
        for layer in self.transformer.layers:
            x = layer(x)
        x = self.transformer.ln_f(x)
        return torch.cat(mapping.group.exchange(mapping.tp_rank, self.lm_head(x).trt_tensor), -1)


MODEL_MAP = {"LlamaForCausalLM": LLaMAForCausalLM}

__all__ = ["MODEL_MAP", "LLaMAForCausalLM", "PretrainedConfig"]
