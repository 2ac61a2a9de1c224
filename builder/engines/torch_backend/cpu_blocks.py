"""The decoder's blocks on a CPU, in libtwofour_cpu (plugins/csrc/cpu/decoder.cpp).

A decode step is one call for all blocks. Prompts and evaluation take two calls a block, with torch's attention between
them. Both compute what transformers' layers compute, rounded where they round.

Legend: B requests, T new tokens, K hidden size, D head_dim.
"""

from __future__ import annotations

from ctypes import Array, byref, pointer
from typing import Any

import torch
from torch import nn

from builder.engines.torch_backend.attention import Batch, Decode, window_of
from plugins.libtwofour import cpu
from plugins.linear.cpu_linear import TYPES, CpuLinear
from plugins.linear.hybrid_linear import HybridLinear

CACHES = {"none": 0, "int8": 1}  # kinds of KV cache that the library reads
LANES = 16  # of a vector: sizes are multiples of it
LONGEST_HEAD = 256


class CpuBlocks:
    """All blocks and the last norm of a model whose linear layers run on the CPU kernels."""

    def __init__(self, body: nn.Module, cos_SD: torch.Tensor, sin_SD: torch.Tensor) -> None:
        self._layers, self._norm, self._config = list(body.layers), body.norm, body.config
        self._cos_SD, self._sin_SD = cos_SD.contiguous(), sin_SD.contiguous()
        self._decode_steps: dict[tuple[int, int], tuple[cpu.Step, Array[cpu.Block]]] = {}

    @classmethod
    def of(cls, body: nn.Module, cos_SD: torch.Tensor, sin_SD: torch.Tensor) -> CpuBlocks | None:
        """None where a layer runs on torch's products, or the library does not take the model's sizes."""
        linears = [module for layer in body.layers for name, module in layer.named_modules() if name.endswith("_proj")]
        config, head_dim = body.config, cos_SD.shape[1]
        sizes_fit = not (
            config.hidden_size % LANES
            or config.intermediate_size % LANES
            or head_dim % (2 * LANES)
            or head_dim > LONGEST_HEAD
        )
        if not sizes_fit or config.hidden_act != "silu" or not all(map(_on_cpu_kernels, linears)):
            return None
        return cls(body, cos_SD, sin_SD)

    def __call__(self, x_BTK: torch.Tensor, positions: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Final hidden states [B, T, K] of embeddings [B, T, K], which are overwritten."""
        x = x_BTK.contiguous()
        if isinstance(batch, Decode) and batch.cache.kind in CACHES:
            return self._decode(x, batch)
        return self._by_parts(x, positions, batch)

    def _decode(self, x: torch.Tensor, batch: Decode) -> torch.Tensor:
        tokens, positions = x.shape[0], batch.positions.contiguous()
        key = (tokens, id(batch.cache))
        if key not in self._decode_steps:
            blocks = (cpu.Block * len(self._layers))(*(self._block(layer, tokens, batch) for layer in self._layers))
            step = self._step(tokens, x.dtype)
            step.cache_int8, step.page_size = CACHES[batch.cache.kind], batch.cache.keys[0].shape[2]
            self._decode_steps[key] = step, blocks
        step, blocks = self._decode_steps[key]
        table = batch.table.contiguous()
        step.positions, step.table, step.table_stride = positions.data_ptr(), table.data_ptr(), table.shape[1]
        cpu.check(cpu.load().twofour_cpu_decode(byref(step), blocks, len(blocks), x.data_ptr()))
        return x

    def _by_parts(self, x: torch.Tensor, positions: torch.Tensor, batch: Batch) -> torch.Tensor:
        library, config, head_dim = cpu.load(), self._config, self._cos_SD.shape[1]
        requests, new = x.shape[:2]
        places = positions.expand(requests, new).contiguous()
        step = self._step(requests * new, x.dtype)
        step.positions = places.data_ptr()
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        q, k, v = (x.new_empty(requests, new, count, head_dim) for count in heads)
        out = torch.empty_like(x)
        added = None  # what the block before adds to x
        for layer in self._layers:
            attention, block = layer.self_attn, self._block(layer, requests * new, None)
            projected = (q.data_ptr(), k.data_ptr(), v.data_ptr())
            cpu.check(library.twofour_cpu_before_attention(byref(step), byref(block), x.data_ptr(), added, *projected))
            q_BHTD, k_BHTD, v_BHTD = (tensor.transpose(1, 2) for tensor in (q, k, v))
            window = window_of(attention, config)
            attended = batch.attend(attention.layer_idx, q_BHTD, k_BHTD, v_BHTD, attention.scaling, window).contiguous()
            cpu.check(
                library.twofour_cpu_after_attention(
                    byref(step), byref(block), x.data_ptr(), attended.data_ptr(), out.data_ptr()
                )
            )
            added = out.data_ptr()
        normed = torch.empty_like(x)
        cpu.check(library.twofour_cpu_final_norm(byref(step), x.data_ptr(), added, normed.data_ptr()))
        return normed

    def _step(self, tokens: int, dtype: torch.dtype) -> cpu.Step:
        config = self._config
        return cpu.Step(
            type=TYPES[dtype],
            tokens=tokens,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=self._cos_SD.shape[1],
            intermediate=config.intermediate_size,
            eps=self._norm.variance_epsilon,
            cos=self._cos_SD.data_ptr(),
            sin=self._sin_SD.data_ptr(),
            final_norm=self._norm.weight.data_ptr(),
        )

    def _block(self, layer: nn.Module, tokens: int, batch: Decode | None) -> cpu.Block:
        """A layer with its kernels for `tokens` rows, and with its cache where the library reads it."""
        attention, mlp = layer.self_attn, layer.mlp
        index = attention.layer_idx
        k_scale, v_scale = (1.0, 1.0) if batch is None else batch.cache.scales[index]
        return cpu.Block(
            *(
                pointer(linear.problem(tokens))
                for linear in (
                    attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
                    mlp.gate_proj, mlp.up_proj, mlp.down_proj,
                )
            ),
            layer.input_layernorm.weight.data_ptr(),
            layer.post_attention_layernorm.weight.data_ptr(),
            *(_weight(getattr(attention, name, None)) for name in ("q_norm", "k_norm")),
            attention.scaling * k_scale,
            v_scale,
            1 / k_scale,
            1 / v_scale,
            window_of(attention, self._config) or 0,
            None if batch is None else batch.cache.keys[index].data_ptr(),
            None if batch is None else batch.cache.values[index].data_ptr(),
        )  # fmt: skip


def _on_cpu_kernels(linear: nn.Module) -> bool:
    return isinstance(linear, CpuLinear) or (isinstance(linear, HybridLinear) and linear.on_cpu_kernels)


def _weight(norm: Any) -> int | None:
    return None if norm is None else int(norm.weight.data_ptr())
