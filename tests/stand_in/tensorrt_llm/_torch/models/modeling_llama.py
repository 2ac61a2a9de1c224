"""STAND-IN: Llama with TensorRT-LLM's module names (fused qkv_proj and gate_up_proj) and plain causal attention."""

import torch
from torch import nn
from torch.nn import functional

from tensorrt_llm._torch.models.modeling_utils import DecoderModelForCausalLM, register_auto_model
from tensorrt_llm._torch.modules.linear import Linear, TensorParallelMode, WeightMode, WeightsLoadingConfig
from tensorrt_llm._torch.modules.shared import quantize


class RMSNorm(nn.Module):
    def __init__(self, size, eps, dtype):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False), eps

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def parallel(config, in_features, out_features, row=False, mode=WeightMode.VANILLA):
    pretrained = config.pretrained_config
    return Linear(
        in_features,
        out_features,
        dtype=pretrained.torch_dtype,
        mapping=config.mapping,
        tensor_parallel_mode=TensorParallelMode.ROW if row else TensorParallelMode.COLUMN,
        quant_config=config.quant_config,
        force_dynamic_quantization=config.force_dynamic_quantization,
        weights_loading_config=WeightsLoadingConfig(weight_mode=mode),
    )


def rotate(x, theta):
    """Rotary embedding, halves form, of x [B, heads, T, D]."""
    half = x.shape[-1] // 2
    frequency = 1.0 / theta ** (torch.arange(half, dtype=torch.float32) / half)
    angle = torch.arange(x.shape[-2], dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        p, ranks = config.pretrained_config, config.mapping.tp_size
        self.theta, self.head_dim = p.rope_theta, p.head_dim
        self.heads, self.kv_heads = p.num_attention_heads // ranks, p.num_key_value_heads // ranks
        wide = (p.num_attention_heads + 2 * p.num_key_value_heads) * p.head_dim
        self.qkv_proj = parallel(config, p.hidden_size, wide, mode=WeightMode.FUSED_QKV_LINEAR)
        self.o_proj = parallel(config, p.num_attention_heads * p.head_dim, p.hidden_size, row=True)

    def forward(self, x):
        sizes = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self.qkv_proj(x).split(sizes, -1)
        )
        q, k = rotate(q, self.theta), rotate(k, self.theta)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        mixed = mixed.transpose(1, 2).flatten(-2)
        if self.o_proj.has_fp8_qdq and self.o_proj.input_scale is not None:  # the attention kernel's own output
            mixed = quantize(mixed, self.o_proj.input_scale)
        return self.o_proj(mixed)


class GatedMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        p = config.pretrained_config
        mode = WeightMode.FUSED_GATE_UP_LINEAR
        self.gate_up_proj = parallel(config, p.hidden_size, 2 * p.intermediate_size, mode=mode)
        self.down_proj = parallel(config, p.intermediate_size, p.hidden_size, row=True)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(functional.silu(gate) * up)


class LlamaDecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        p = config.pretrained_config
        self.input_layernorm = RMSNorm(p.hidden_size, p.rms_norm_eps, p.torch_dtype)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(p.hidden_size, p.rms_norm_eps, p.torch_dtype)
        self.mlp = GatedMLP(config)

    def forward(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        p = config.pretrained_config
        self.embed_tokens = nn.Embedding(p.vocab_size, p.hidden_size, dtype=p.torch_dtype)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config) for _ in range(p.num_hidden_layers))
        self.norm = RMSNorm(p.hidden_size, p.rms_norm_eps, p.torch_dtype)
        self.mapping = config.mapping

    def forward(self, input_ids):
        mapping = self.mapping
        x = self.embed_tokens(input_ids) if mapping.is_first_pp_rank() else mapping.pipe.receive(mapping.pp_rank)
        for number in mapping.pp_layers(len(self.layers)):
            x = self.layers[number](x)
        if mapping.is_last_pp_rank():
            return self.norm(x)
        return mapping.pipe.send(mapping.pp_rank, x)


@register_auto_model("LlamaForCausalLM")
class LlamaForCausalLM(DecoderModelForCausalLM):
    def __init__(self, model_config):
        super().__init__(LlamaModel(model_config), model_config)
