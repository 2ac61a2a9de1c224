"""Propagates hidden states block by block, caching them in files.

Suffixes: B samples, T tokens of a sample, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from calibration.model.activation_file import ActivationFile
from calibration.model.block_store import BlockStore
from calibration.model.blocks import Blocks
from calibration.model.device import products, products_dtype


class BlockWalk:
    """What every walk over the blocks has: where states are kept, and how they are sent on.

    States and the sums over them are float32; the linear layers of a model in bfloat16 compute in that within
    `products`, as they will in use.
    """

    def __init__(self, blocks: Blocks, tokens_BT: Tensor, finished: BlockStore):
        self.blocks, self.tokens_BT, self.finished = blocks, tokens_BT, finished
        self.arguments = blocks.arguments(tokens_BT.shape[1])
        self.dtype = products_dtype(blocks.weights.dtype("model.embed_tokens.weight"))
        self.products = products(self.dtype)

    def states(self, number: int, name: str) -> ActivationFile:
        """The named states [B, T, hidden size] of block `number`, float32."""
        shape_BTD = (*self.tokens_BT.shape, self.blocks.config.hidden_size)
        return ActivationFile(self.finished.states(number, name), shape_BTD, self.blocks.device)

    def inputs(self, number: int, layer: nn.Linear) -> ActivationFile:
        """The file of a layer's inputs [B, T, in_features] in block `number`, in the dtype that it computes in."""
        shape_BTK, path = (*self.tokens_BT.shape, layer.in_features), self.finished.states(number, "inputs")
        return ActivationFile(path, shape_BTK, self.blocks.device, self.dtype)

    def entering(self, number: int, name: str) -> ActivationFile:
        """The states that enter a block: what the one before left, or the embedded tokens."""
        states = self.states(number, name)
        if number == 0:  # written again at each start: only files of a block's outputs are known to be complete
            states.write(self.blocks.embed(self.tokens_BT))
        return states

    def send(self, entering: ActivationFile, through: Callable[[Tensor], Tensor], leaving: ActivationFile) -> None:
        """Sends states through a part of the model."""
        with self.products:
            leaving.write(through(x_BTD) for x_BTD in entering.batches())
