"""A model in memory one decoder block at a time: the skeleton on the meta device, weights read per block.

Suffixes: B samples, T tokens of a sample, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from calibration.model.activation_file import ActivationFile, samples_at_once
from calibration.model.channel_order import ChannelOrder
from calibration.model.sdpa_float32 import attention
from calibration.model.weights import Weights
from plugins.common.errors import UserError
from plugins.common.families import model_types

HEAD = "lm_head"
HALVES = {  # of a block, each x + branch(norm(x)): the branch, its norm, and its layer that gives what is added to x
    "self_attn": ("input_layernorm", "self_attn.o_proj"),
    "mlp": ("post_attention_layernorm", "mlp.down_proj"),
}


class Blocks:
    """The decoder blocks of a Hugging Face directory, channels in the `orders` given, if any.

    Computes in float32, whatever the weights are stored in.
    """

    def __init__(
        self,
        directory: Path,
        device: torch.device | str = "cpu",
        orders: Mapping[str, Sequence[int]] = MappingProxyType({}),
    ):
        self.config, self.device = AutoConfig.from_pretrained(str(directory)), device
        if self.config.model_type not in model_types():
            known = ", ".join(model_types())
            raise UserError(
                f"'{directory}' is a '{self.config.model_type}', which cannot be pruned: use one of {known}"
            )
        self.weights = Weights(directory, ChannelOrder(self.config, orders))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32, attn_implementation=attention())
        self.skeleton: Any = model.eval().requires_grad_(False).model
        self.count: int = self.config.num_hidden_layers
        self.has_untied_lm_head: bool = not self.config.tie_word_embeddings and f"{HEAD}.weight" in self.weights

    def embed(self, tokens_BT: Tensor) -> Iterator[Tensor]:
        """The hidden states [B, T, D] that enter the first block, a few samples at a time.

        Reads the rows of the tokens that occur.
        """
        occurring, row_BT = tokens_BT.unique(return_inverse=True)
        embedded = self.weights.read_rows("model.embed_tokens.weight", occurring.tolist())
        return (embedded[rows].float() for rows in row_BT.split(samples_at_once(tokens_BT.shape[1])))

    def arguments(self, length: int) -> list[dict[str, Any]]:
        """What the model passes to each block besides the hidden states, for samples of `length` tokens.

        Runs the model itself with blocks that only record their inputs, so that masks and positions are the model's.
        """
        model = copy.copy(self.skeleton)
        model._modules = dict(self.skeleton._modules)
        blocks = [_Remember() for _ in range(self.count)]
        model.layers, model.norm = nn.ModuleList(blocks), nn.Identity()
        model.rotary_emb = type(self.skeleton.rotary_emb)(config=self.config).to(self.device)
        model(inputs_embeds=torch.zeros(1, length, self.config.hidden_size, device=self.device), use_cache=False)
        return [block.arguments for block in blocks]

    def load(self, number: int) -> nn.Module:
        """Block `number` with its weights, float32, on the device."""
        return self._load(f"layers.{number}")

    def load_norm(self) -> nn.Module:
        """The norm behind the last block, float32, on the device."""
        return self._load("norm")

    def _load(self, name: str) -> nn.Module:
        module: nn.Module = copy.deepcopy(self.skeleton.get_submodule(name))
        prefix = f"model.{name}."
        tensors = {name: self.weights.read(prefix + name).to(self.device).float() for name in module.state_dict()}
        module.load_state_dict(tensors, assign=True)
        return module


class _Remember(nn.Module):
    def forward(self, hidden_BTD: Tensor, **arguments: Any) -> Tensor:
        self.arguments = arguments
        return hidden_BTD


@dataclass
class Stream:
    """One form of a block, pruned or dense, with the hidden states that enter the half of it that is at work."""

    block: nn.Module
    states: ActivationFile


def forward_half(block: nn.Module, half: str, x_BTD: Tensor, arguments: dict[str, Any]) -> Tensor:
    """What leaves one of the `HALVES` of a block: [B, T, D]."""
    branch, normed_BTD = block.get_submodule(half), block.get_submodule(HALVES[half][0])(x_BTD)
    added_BTD = branch(hidden_states=normed_BTD, **arguments)[0] if half == "self_attn" else branch(normed_BTD)
    return x_BTD + added_BTD
