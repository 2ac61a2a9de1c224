"""The decoder's blocks with few kernels: between the linear layers, one operator of plugins/triton_kernels a step.

    norm | q, k, v | rope, cache | attention (2) | o | norm | gate, up | silu | down: ten kernels a block and token

A layer that is 2:4 in part has two products: fourteen, where all four are.
The numbers are those of transformers' own layers, rounded where they round. What a linear layer rounds its input to,
the operator before it puts out. Sequences of more than one new token take the same linear layers, norms and silu;
their rotary embedding and attention are torch's.

Legend: B requests, T new tokens, M = B * T, K hidden size, N out_features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from builder.engines.torch_backend.attention import Batch, Decode, window_of
from plugins.linear.torch_linear import Linear
from plugins.triton_kernels import reference
from plugins.triton_kernels.guarded import BlockOps

DTYPES = (torch.float16, torch.bfloat16)  # that the kernels compute in


def can_fuse(config: Any, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a model's blocks are what the kernels compute, on a device where they are kernels."""
    return device.type == "cuda" and dtype in DTYPES and config.hidden_act == "silu"


class FusedBlocks:
    """All blocks and the last norm of a model whose q, k and v, and gate and up, are joined (linears.py)."""

    def __init__(self, body: nn.Module, cos_SD: torch.Tensor, sin_SD: torch.Tensor, remarks: list[str]) -> None:
        self._ops = BlockOps(remarks)
        self._blocks = [_Block(layer, body.config, cos_SD, sin_SD, self._ops) for layer in body.layers]
        self._norm = body.norm

    def __call__(self, x_BTK: torch.Tensor, positions: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Final hidden states [B, T, K] of embeddings [B, T, K], which are overwritten."""
        residual_MK, x_MK = x_BTK.view(-1, x_BTK.shape[-1]), None
        for block in self._blocks:
            x_MK = block(residual_MK, x_MK, x_BTK.shape[:2], positions, batch)
        out_MK = self._ops.rms_norm(
            residual_MK, x_MK, self._norm.weight, self._norm.variance_epsilon, None, residual_MK.dtype
        )
        return out_MK.view(x_BTK.shape)


class _Block:
    """One decoder block: the linear layers and norms of a transformers layer, whatever the family."""

    def __init__(
        self, layer: nn.Module, config: Any, cos_SD: torch.Tensor, sin_SD: torch.Tensor, ops: BlockOps
    ) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._ops, self._cos_SD, self._sin_SD = ops, cos_SD, sin_SD
        self._index, self._scaling, self._head_dim = attention.layer_idx, attention.scaling, attention.head_dim
        self._kv_heads = config.num_key_value_heads
        self._window = window_of(attention, config)
        self._first_norm, self._second_norm = layer.input_layernorm, layer.post_attention_layernorm
        norms = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        self._q_norm, self._k_norm = (None if norm is None else norm.weight for norm in norms)
        self._heads_first = tuple(rows // self._head_dim for rows in attention.qkv_proj.sparse_rows)
        self._qkv, self._o, self._gate_up, self._down = (
            _Product(layer) for layer in (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
        )

    def __call__(
        self,
        residual_MK: torch.Tensor,
        x_MK: torch.Tensor | None,
        shape: tuple[int, int],
        positions: torch.Tensor,
        batch: Batch,
    ) -> torch.Tensor:
        """What the block adds to the residual, which gets `x_MK`, the block before's, and the attention's here."""
        qkv_MN = self._qkv(self._norm(self._first_norm, residual_MK, x_MK, self._qkv))
        if isinstance(batch, Decode):
            x_MK = self._o(self._attend_to_cache(qkv_MN, batch))
        else:
            x_MK = self._o.layer(self._attend(qkv_MN.view(*shape, -1), positions, batch))
        gate_up_MN = self._gate_up(self._norm(self._second_norm, residual_MK, x_MK, self._gate_up))
        rounding = self._down.rounding(gate_up_MN.dtype)
        return self._down(self._ops.silu_mul(gate_up_MN, *rounding, *self._gate_up.layer.sparse_rows))

    def _norm(
        self, norm: nn.Module, residual_MK: torch.Tensor, x_MK: torch.Tensor | None, product: _Product
    ) -> torch.Tensor:
        rounding = product.rounding(residual_MK.dtype)
        return self._ops.rms_norm(residual_MK, x_MK, norm.weight, norm.variance_epsilon, *rounding)

    def _attend_to_cache(self, qkv_MN: torch.Tensor, batch: Decode) -> torch.Tensor:
        """Attention [M, heads * D] of one new token a request, rounded for the output projection."""
        cache, layer = batch.cache, self._index
        keys, values, (k_scale, v_scale) = cache.keys[layer], cache.values[layer], cache.scales[layer]
        q_MHD = self._ops.rope_and_cache(
            qkv_MN,
            self._cos_SD,
            self._sin_SD,
            batch.positions,
            self._q_norm,
            self._k_norm,
            self._first_norm.variance_epsilon,
            keys,
            values,
            *cache.multipliers(layer),
            batch.table,
            *self._heads_first,
        )
        return self._ops.decode_attention(
            q_MHD,
            keys,
            values,
            batch.positions,
            batch.table,
            batch.length,
            self._window,
            self._scaling * k_scale,
            v_scale,
            *self._o.rounding(qkv_MN.dtype),
        )

    def _attend(self, qkv_BTN: torch.Tensor, positions: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Attention [M, heads * D] of several new tokens a request."""
        q, k, v = reference.split_heads(qkv_BTN, self._kv_heads, self._head_dim, self._heads_first)
        if self._q_norm is not None and self._k_norm is not None:
            eps = self._first_norm.variance_epsilon
            q, k = reference.normalize(q, self._q_norm, eps), reference.normalize(k, self._k_norm, eps)
        cos, sin = self._cos_SD[positions][:, :, None], self._sin_SD[positions][:, :, None]
        q, k = reference.rotate(q, cos, sin), reference.rotate(k, cos, sin)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = batch.attend(self._index, q, k, v, self._scaling, self._window)
        return out.reshape(qkv_BTN.shape[0] * qkv_BTN.shape[1], -1)


class _Product:
    """A linear layer as the operators feed it: its input rounded already, where it has 8-bit operands."""

    def __init__(self, layer: Linear) -> None:
        self.layer = layer
        self._call = layer if layer.operand is None else layer.multiply

    def rounding(self, dtype: torch.dtype) -> tuple[torch.Tensor | None, torch.dtype]:
        """(multiplier, dtype) that an operator rounds its result with; `dtype` is the compute dtype."""
        quantizer, operand = self.layer.quantizer, self.layer.operand
        if quantizer is None or operand is None:
            return None, dtype
        return quantizer.multiplier, operand

    def __call__(self, x_MK: torch.Tensor) -> torch.Tensor:
        y_MN: torch.Tensor = self._call(x_MK)
        return y_MN
