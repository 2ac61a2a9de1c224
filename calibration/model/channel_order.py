"""The channels of a model in another order: exact, as each channel's weights move together.

An MLP channel is a row of gate_proj and of up_proj and an input of down_proj. A KV head is head_dim rows of k_proj and
v_proj, the rows of q_proj of the query heads that share it, and their inputs of o_proj; within a head rotary embedding
fixes the order. What the block reads and adds to the residual stream stays where it is, up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plugins.common.errors import UserError

ROWS = {"mlp": ("gate_proj", "up_proj"), "self_attn": ("q_proj", "k_proj", "v_proj")}
INPUTS = {"mlp": "down_proj", "self_attn": "o_proj"}


@dataclass(frozen=True)
class Channels:
    """How many channels a half of a block has, and how many rows or inputs of a layer belong to each."""

    count: int
    width: Mapping[str, int]  # by the layer's last name

    @classmethod
    def of(cls, config: Any, half: str) -> Channels:
        """Of `half` ("mlp" or "self_attn") of a transformers config."""
        if half == "mlp":
            return cls(config.intermediate_size, dict.fromkeys((*ROWS["mlp"], INPUTS["mlp"]), 1))
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        queries = heads // kv_heads * head_dim
        return cls(kv_heads, {"q_proj": queries, "k_proj": head_dim, "v_proj": head_dim, "o_proj": queries})


class ChannelOrder:
    """Maps a model's tensors to those with channels in the order `orders`: by half of a block, place -> channel."""

    def __init__(self, config: Any, orders: Mapping[str, Sequence[int]]):
        """Raises UserError where an order does not fit the model."""
        self.config, self.orders = config, orders
        halves = {f"model.layers.{number}.{half}" for number in range(config.num_hidden_layers) for half in INPUTS}
        for module, order in orders.items():
            if module not in halves:
                raise UserError(f"the model has no '{module}' to reorder")
            count = Channels.of(config, module.rsplit(".", 1)[-1]).count
            if sorted(order) != list(range(count)):
                raise UserError(f"the order of '{module}' does not contain each channel from 0 to {count - 1} once")

    def moves(self, name: str) -> bool:
        """Whether the tensor `name` is another in the new order."""
        return self._index(name) is not None

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor `name` of the dense model as it is in the new order."""
        rows_and_columns = self._index(name)
        if rows_and_columns is None:
            return tensor
        axis, index = rows_and_columns
        return tensor.index_select(axis, index.to(tensor.device))

    def _index(self, name: str) -> tuple[int, Tensor] | None:
        """(axis, place -> row or input of before) of a tensor that moves."""
        module, _, rest = name.rpartition(".")
        module, _, layer = module.rpartition(".")
        order, half = self.orders.get(module), module.rsplit(".", 1)[-1]
        if order is None or layer not in (*ROWS[half], INPUTS[half]):
            return None
        axis = int(layer == INPUTS[half])
        if axis and rest != "weight":  # the bias belongs to the outputs
            return None
        width = Channels.of(self.config, half).width[layer]
        return axis, (torch.tensor(list(order))[:, None] * width + torch.arange(width)).flatten()
