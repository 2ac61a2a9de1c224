"""Which tensors a checkpoint must hold, by its config alone: names, shapes and dtypes.

Legend: N out_features, K in_features of a linear layer [N, K]. Tensor parallelism cuts N of the layers that read the
hidden state, and K of those that write it (row-parallel).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from builder.checkpoint.config import Mapping, Quantization
from builder.planning.model_config import Architecture
from plugins.common.formats import EIGHT_BIT, FLOATS, OF_DTYPE, format_of

Role = Literal["weight", "scale", "other"]

VECTORS = tuple(format.safetensors for format in FLOATS)  # norms and biases may be wider than the weights


@dataclass(frozen=True)
class Expected:
    """One tensor. `shapes` and `dtypes` are the allowed ones; `layer` is the linear layer that it belongs to."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    role: Role = "other"
    layer: str | None = None
    required: bool = True


@dataclass(frozen=True)
class Part:
    """A linear layer as one file holds it: `name` in the whole model, `local` in the file, weight [N, K]."""

    name: str
    local: str
    N: int
    K: int
    bias: bool


def hf_tensors(arch: Architecture, quantization: Quantization) -> dict[str, Expected]:
    """The tensors of a unified Hugging Face checkpoint, by name."""
    hidden = ((arch.hidden_size,),)
    embedding = Expected(((arch.vocab_size, arch.hidden_size),), (_stored_as(arch),))
    tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": Expected(hidden, VECTORS)}
    for linear in arch.linears():
        part = Part(linear.name, linear.name, linear.out_features, linear.in_features, linear.bias)
        tensors |= _linear(part, arch, quantization, "weight_scale", "input_scale", "pre_quant_scale")
    if arch.tied_embeddings:
        tensors["lm_head.weight"] = replace(tensors["lm_head.weight"], required=False)
    for block in range(arch.num_blocks):
        prefix = f"model.layers.{block}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = Expected(hidden, VECTORS)
        for norm in ("q_norm", "k_norm") if arch.family.qk_norm else ():
            tensors[f"{prefix}.self_attn.{norm}.weight"] = Expected(((arch.head_dim,),), VECTORS)
        for which in ("k", "v") if quantization.kv_cache != "none" else ():
            tensors[f"{prefix}.self_attn.{which}_proj.{which}_scale"] = _scalar_scale()
        frequencies = Expected(((arch.head_dim // 2,),), VECTORS, required=False)  # older exports keep them
        tensors[f"{prefix}.self_attn.rotary_emb.inv_freq"] = frequencies
    return tensors


def trtllm_parts(arch: Architecture, mapping: Mapping, rank: int) -> Iterator[Part]:
    """The linear layers of one rank. Files of each pipeline stage number their blocks from 0."""
    hidden, inner = arch.hidden_size, arch.intermediate_size // mapping.tp
    queries = arch.num_heads // mapping.tp * arch.head_dim
    keys = -(-arch.num_kv_heads // mapping.tp) * arch.head_dim  # more ranks than heads: each rank keeps one
    for local, block in enumerate(mapping.blocks(rank, arch.num_blocks)):
        for name, N, K, bias in (
            ("attention.qkv", queries + 2 * keys, hidden, arch.bias_qkv),
            ("attention.dense", hidden, queries, arch.bias_o),
            ("mlp.fc", inner, hidden, arch.bias_mlp),
            ("mlp.gate", inner, hidden, arch.bias_mlp),
            ("mlp.proj", hidden, inner, arch.bias_mlp),
        ):
            yield Part(f"transformer.layers.{block}.{name}", f"transformer.layers.{local}.{name}", N, K, bias)
    if rank // mapping.tp == mapping.pp - 1:
        yield Part("lm_head", "lm_head", -(-arch.vocab_size // mapping.tp), hidden, False)


def trtllm_tensors(
    arch: Architecture, quantization: Quantization, mapping: Mapping, rank: int, config: dict[str, Any]
) -> dict[str, Expected]:
    """The tensors of one rank's file, by their names there."""
    hidden = ((arch.hidden_size,),)
    stage = rank // mapping.tp
    tensors: dict[str, Expected] = {}
    names = ("weights_scaling_factor", "activation_scaling_factor", "prequant_scaling_factor")
    for part in trtllm_parts(arch, mapping, rank):
        if "attn_bias" not in config:  # ModelOpt alone does not state whether there are any
            tensors[f"{part.local}.bias"] = Expected(((part.N,),), VECTORS, layer=part.name, required=False)
        tensors |= _linear(part, arch, quantization, *names)
    if arch.tied_embeddings and "lm_head.weight" in tensors:
        tensors["lm_head.weight"] = replace(tensors["lm_head.weight"], required=False)
    for local in range(arch.num_blocks // mapping.pp):
        prefix = f"transformer.layers.{local}"
        for norm in ("input_layernorm", "post_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = Expected(hidden, VECTORS)
        for norm in ("q_layernorm", "k_layernorm") if arch.family.qk_norm else ():
            tensors[f"{prefix}.attention.{norm}.weight"] = Expected(((arch.head_dim,),), VECTORS)
        for which in ("kv", "k", "v") if quantization.kv_cache != "none" else ():
            scale = replace(_scalar_scale(), required=which == "kv")
            tensors[f"{prefix}.attention.{which}_cache_scaling_factor"] = scale
    if stage == 0:
        cut = mapping.tp if config.get("use_parallel_embedding") else 1
        rows = -(-arch.vocab_size // cut)
        tensors["transformer.vocab_embedding.weight"] = Expected(((rows, arch.hidden_size),), (_stored_as(arch),))
    if stage == mapping.pp - 1:
        tensors["transformer.ln_f.weight"] = Expected(hidden, VECTORS)
    return tensors


def _linear(
    part: Part, arch: Architecture, quantization: Quantization, weight_scale: str, input_scale: str, smoothing: str
) -> dict[str, Expected]:
    """Weight, bias and scales of a layer. SmoothQuant leaves out the smoothing of a layer that it had no inputs for."""
    format = quantization.format_of(part.name, part.local)
    dtype = format_of(format).safetensors if format in EIGHT_BIT else _stored_as(arch)
    tensors = {f"{part.local}.weight": Expected(((part.N, part.K),), (dtype,), "weight", part.name)}
    if part.bias:
        tensors[f"{part.local}.bias"] = Expected(((part.N,),), VECTORS, layer=part.name)
    if format != "none":
        tensors[f"{part.local}.{weight_scale}"] = replace(_scalar_scale(), layer=part.name)
        if not quantization.per_token:
            tensors[f"{part.local}.{input_scale}"] = replace(_scalar_scale(), layer=part.name)
    if format == "int8":
        per_row = Expected(((part.N,),), ("F32",), "scale", part.name)
        tensors[f"{part.local}.{weight_scale}"] = per_row
        tensors[f"{part.local}.{smoothing}"] = Expected(((part.K,),), VECTORS, "scale", part.name, required=False)
    return tensors


def _stored_as(arch: Architecture) -> str:
    """The dtype of unquantized weights, as safetensors calls it."""
    return format_of(OF_DTYPE[arch.dtype]).safetensors


def _scalar_scale() -> Expected:
    return Expected(((), (1,)), ("F32",), "scale")
