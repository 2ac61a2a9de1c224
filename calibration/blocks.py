"""A model held one decoder block at a time: the skeleton on the meta device, weights read when a block is asked for.

Suffixes: B samples, T tokens of a sample, D hidden size.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from calibration.weights import Weights
from plugins.errors import UserError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
RESIDUAL_BEFORE = {  # a layer that adds to the residual stream: the module that reads the stream as it was before
    "self_attn.o_proj": "input_layernorm",
    "mlp.down_proj": "post_attention_layernorm",
}
SAMPLES_AT_ONCE = 8  # that go through a block together; fixed, as sums in another order round otherwise


class Blocks:
    """The decoder blocks of a Hugging Face directory. Computes in float32, whatever the weights are stored in."""

    def __init__(self, directory: Path):
        self.weights = Weights(directory)
        self.config = AutoConfig.from_pretrained(str(directory))
        if self.config.model_type not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise UserError(
                f"'{directory}' is a '{self.config.model_type}', which cannot be pruned: use one of {known}"
            )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        self.skeleton: Any = model.eval().requires_grad_(False).model
        self.count: int = self.config.num_hidden_layers

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """The hidden states [B, T, D] that enter the first block. Reads the rows of the tokens that occur."""
        occurring, row_BT = tokens_BT.unique(return_inverse=True)
        return self.weights.read_rows("model.embed_tokens.weight", occurring.tolist()).float()[row_BT]

    def arguments(self, length: int) -> list[dict[str, Any]]:
        """What the model passes to each block besides the hidden states, for samples of `length` tokens.

        The model itself is run, with blocks that do nothing but remember: masks and positions are then its own.
        """
        model = copy.copy(self.skeleton)
        model._modules = dict(self.skeleton._modules)
        blocks = [_Remember() for _ in range(self.count)]
        model.layers, model.norm = nn.ModuleList(blocks), nn.Identity()
        model.rotary_emb = type(self.skeleton.rotary_emb)(config=self.config)
        model(inputs_embeds=torch.zeros(1, length, self.config.hidden_size), use_cache=False)
        return [block.arguments for block in blocks]

    def load(self, number: int) -> nn.Module:
        """Block `number` with its weights, float32."""
        block: nn.Module = copy.deepcopy(self.skeleton.layers[number])
        prefix = f"model.layers.{number}."
        tensors = {name: self.weights.read(prefix + name).float() for name in block.state_dict()}
        block.load_state_dict(tensors, assign=True)
        return block


class _Remember(nn.Module):
    def forward(self, hidden_BTD: Tensor, **arguments: Any) -> Tensor:
        self.arguments = arguments
        return hidden_BTD


@dataclass
class Stream:
    """One form of a block, pruned or dense, with the hidden states [B, T, D] that enter it."""

    block: nn.Module
    hidden: Tensor


def run(stream: Stream, arguments: dict[str, Any]) -> Tensor:
    """The block's output [B, T, D], a few samples at a time."""
    return torch.cat([stream.block(part, **arguments) for part in stream.hidden.split(SAMPLES_AT_ONCE)])
