"""Which tensors a checkpoint must hold, by its config alone: names, shapes and dtypes.

Legend: N out_features, K in_features of a linear layer [N, K]. Tensor parallelism cuts N of the layers that read the
hidden state, and K of those that write it (row-parallel).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from builder.checkpoint.checkpoint_config import Mapping, Quantization
from builder.planning.model_config import Architecture
from plugins.common.formats import EIGHT_BIT, FLOATS, OF_DTYPE, format_of
from plugins.common.linear_shape import LinearShape

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


def hf_tensors(arch: Architecture, quantization: Quantization) -> dict[str, Expected]:
    """The tensors of a unified Hugging Face checkpoint, by name."""
    hidden = ((arch.hidden_size,),)
    embedding = Expected(((arch.vocab_size, arch.hidden_size),), (_stored_as(arch),))
    tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": Expected(hidden, VECTORS)}
    for linear in arch.linears():
        tensors |= _linear(linear, linear.name, quantization, ("weight_scale", "input_scale", "pre_quant_scale"))
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


def trtllm_linears(arch: Architecture, mapping: Mapping, rank: int) -> Iterator[tuple[str, LinearShape]]:
    """One rank's linear layers under their names in its file: those of each pipeline stage number blocks from 0."""
    hidden, inner = arch.hidden_size, arch.intermediate_size // mapping.tp
    queries = arch.num_heads // mapping.tp * arch.head_dim
    keys = -(-arch.num_kv_heads // mapping.tp) * arch.head_dim  # more ranks than heads: each rank keeps one
    for local, block in enumerate(mapping.blocks(rank, arch.num_blocks)):
        for last, N, K, bias in (
            ("attention.qkv", queries + 2 * keys, hidden, arch.bias_qkv),
            ("attention.dense", hidden, queries, arch.bias_o),
            ("mlp.fc", inner, hidden, arch.bias_mlp),
            ("mlp.gate", inner, hidden, arch.bias_mlp),
            ("mlp.proj", hidden, inner, arch.bias_mlp),
        ):
            name = f"transformer.layers.{block}.{last}"
            yield f"transformer.layers.{local}.{last}", LinearShape(N, K, arch.format, name=name, bias=bias)
    if rank // mapping.tp == mapping.pp - 1:
        yield "lm_head", LinearShape(-(-arch.vocab_size // mapping.tp), hidden, arch.format, name="lm_head")


def trtllm_tensors(
    arch: Architecture, quantization: Quantization, mapping: Mapping, rank: int, config: dict[str, Any]
) -> dict[str, Expected]:
    """The tensors of one rank's file, by their names there."""
    hidden = ((arch.hidden_size,),)
    stage = rank // mapping.tp
    tensors: dict[str, Expected] = {}
    names = ("weights_scaling_factor", "activation_scaling_factor", "prequant_scaling_factor")
    for local_name, linear in trtllm_linears(arch, mapping, rank):
        if "attn_bias" not in config:  # ModelOpt alone does not state whether there are any
            bias = Expected(((linear.out_features,),), VECTORS, layer=linear.name, required=False)
            tensors[f"{local_name}.bias"] = bias
        tensors |= _linear(linear, local_name, quantization, names)
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


def _linear(linear: LinearShape, local: str, quantization: Quantization, scales: Sequence[str]) -> dict[str, Expected]:
    """Weight, bias and scales of a layer that its file calls `local`.

    SmoothQuant leaves out the smoothing of a layer that it had no inputs for.
    """
    name, N, K = linear.name, linear.out_features, linear.in_features
    weight_scale, input_scale, smoothing = scales
    format = quantization.format_of(name, local)
    dtype = format_of(format if format in EIGHT_BIT else linear.format).safetensors
    tensors = {f"{local}.weight": Expected(((N, K),), (dtype,), "weight", name)}
    if linear.bias:
        tensors[f"{local}.bias"] = Expected(((N,),), VECTORS, layer=name)
    if format != "none":
        tensors[f"{local}.{weight_scale}"] = replace(_scalar_scale(), layer=name)
        if not quantization.per_token:
            tensors[f"{local}.{input_scale}"] = replace(_scalar_scale(), layer=name)
    if format == "int8":
        tensors[f"{local}.{weight_scale}"] = Expected(((N,),), ("F32",), "scale", name)
        tensors[f"{local}.{smoothing}"] = Expected(((K,),), VECTORS, "scale", name, required=False)
    return tensors


def _stored_as(arch: Architecture) -> str:
    """The dtype of unquantized weights, as safetensors calls it."""
    return format_of(OF_DTYPE[arch.dtype]).safetensors


def _scalar_scale() -> Expected:
    return Expected(((), (1,)), ("F32",), "scale")
