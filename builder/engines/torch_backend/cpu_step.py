"""The decode step on a CPU: all blocks in one call of libtwofour_cpu (plugins/csrc/cpu/decoder.cpp).

It computes what transformers' layers compute, rounded where they round. Prompts and evaluation run through the layers.

Legend: B requests.
"""

from __future__ import annotations

from ctypes import Array, byref, pointer
from typing import Any

import torch
from torch import nn

from builder.engines.torch_backend.attention import Decode, window_of
from plugins.libtwofour import cpu
from plugins.linear.cpu_linear import TYPES, CpuLinear

CACHES = {"none": 0, "int8": 1}
LANES = 16  # of a vector: sizes are multiples of it
LONGEST_HEAD = 256


class CpuStep:
    """One new token for each of B sequences."""

    def __init__(self, body: nn.Module, cos_SD: torch.Tensor, sin_SD: torch.Tensor) -> None:
        self._layers, self._norm, self._config = list(body.layers), body.norm, body.config
        self._cos_SD, self._sin_SD = cos_SD.contiguous(), sin_SD.contiguous()
        self._ready: dict[tuple[int, int], tuple[cpu.Step, Array[cpu.Block]]] = {}

    @classmethod
    def of(cls, body: nn.Module, cos_SD: torch.Tensor, sin_SD: torch.Tensor) -> CpuStep | None:
        """None where a layer runs on torch's products, or the library has no step for the model's sizes."""
        linears = [module for layer in body.layers for name, module in layer.named_modules() if name.endswith("_proj")]
        config, head_dim = body.config, cos_SD.shape[1]
        sizes_fit = not (
            config.hidden_size % LANES
            or config.intermediate_size % LANES
            or head_dim % (2 * LANES)
            or head_dim > LONGEST_HEAD
        )
        if not sizes_fit or config.hidden_act != "silu" or not all(isinstance(x, CpuLinear) for x in linears):
            return None
        return cls(body, cos_SD, sin_SD)

    def takes(self, batch: Decode) -> bool:
        """Whether the cache is of a kind that the library reads."""
        return batch.cache.kind in CACHES

    def __call__(self, x_B1K: torch.Tensor, batch: Decode) -> torch.Tensor:
        """Final hidden states [B, 1, K] of embeddings [B, 1, K], which are overwritten."""
        x, positions = x_B1K.contiguous(), batch.positions.contiguous()
        tokens = x.shape[0]
        key = (tokens, id(batch.cache))
        if key not in self._ready:
            self._ready[key] = self._describe(tokens, x.dtype, batch)
        step, blocks = self._ready[key]
        step.positions = positions.data_ptr()
        cpu.check(cpu.load().twofour_cpu_decode(byref(step), blocks, len(blocks), x.data_ptr()))
        return x

    def _describe(self, tokens: int, dtype: torch.dtype, batch: Decode) -> tuple[cpu.Step, Array[cpu.Block]]:
        config, cache = self._config, batch.cache
        step = cpu.Step(
            type=TYPES[dtype],
            cache_int8=CACHES[cache.kind],
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
            page_size=cache.keys[0].shape[2],
        )
        blocks = (cpu.Block * len(self._layers))(*(self._block(layer, tokens, batch) for layer in self._layers))
        return step, blocks

    def _block(self, layer: nn.Module, tokens: int, batch: Decode) -> cpu.Block:
        attention, mlp, cache = layer.self_attn, layer.mlp, batch.cache
        index = attention.layer_idx
        k_scale, v_scale = cache.scales[index]
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
            cache.keys[index].data_ptr(),
            cache.values[index].data_ptr(),
        )  # fmt: skip


def _weight(norm: Any) -> int | None:
    return None if norm is None else int(norm.weight.data_ptr())
