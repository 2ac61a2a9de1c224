"""What each channel costs where it alone is pruned, as KL from the dense model: all of them in a few passes.

To second order KL(dense || pruned) is half the mean square of how the output's change, along the gradient, moves the
log likelihood of tokens that the model itself draws (Fisher information; Martens, 2020, arXiv:1412.1193; for pruning:
Singh and Alistarh, 2020, arXiv:2004.14340). A channel is rows or inputs of its layers, so that its part is a sum of
products that a backward pass holds already.

The shares of channels come from squares summed token by token, of which there are many. What all channels of a layer,
or of a half of a block, cost together has the tokens of a window summed before they are squared, as KL has it: on
docs-llama that is the measured KL, where the sum over tokens is up to 2.5 times as much.

Suffixes: B windows, T tokens of a window, P predictions, V vocabulary, N out_features, K in_features, F features of a
layer along its channels, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calibration.data.windows import Tokens
from calibration.model.block_store import BlockStore
from calibration.model.block_walk import BlockWalk
from calibration.model.blocks import Blocks
from calibration.model.channel_order import INPUTS, Channels
from calibration.pruning.block_pruner import by_block
from calibration.pruning.input_statistics import walk_block
from calibration.pruning.solvers import SOLVERS, Pattern
from plugins.common.progress import Progress
from plugins.sparsity.segments import Segments

BATCH = 4  # windows
DRAWS = 4  # of tokens from the model's own distribution, a batch
Prices = dict[str, list[float]]


@torch.no_grad()
def prune_each_alone(
    blocks: Blocks, tokens: Tokens, layers: Sequence[str], pattern: str, work: Path, progress: Progress
) -> dict[str, Tensor]:
    """Each weight [N, K] pruned to `pattern` by SparseGPT on the dense model's inputs; `tokens` [windows, T]."""
    walk = BlockWalk(blocks, torch.from_numpy(tokens), BlockStore(work, "alone"))
    solver, parsed = SOLVERS["sparsegpt"](), Pattern.parse(pattern)
    pruned: dict[str, Tensor] = {}
    for number, names in enumerate(by_block(layers, blocks)):
        progress("pruning each layer alone", number, blocks.count)
        block = blocks.load(number)
        for group, statistics in walk_block(walk, number, block, names, "dense"):
            for name in group:
                weight_NK, full = block.get_submodule(name).weight, f"model.layers.{number}.{name}"
                whole = Segments.split("rows", len(weight_NK), len(weight_NK))
                kept_NK = solver.prune(full, weight_NK, statistics, parsed, whole)
                pruned[full] = kept_NK.to(blocks.weights.dtype(f"{full}.weight"))
        for stream in ("dense", "middle"):
            walk.states(number, stream).path.unlink()
    return pruned


def channel_prices(
    model: Any, pruned: Mapping[str, Tensor], tokens: Tokens, progress: Progress, seed: int = 0
) -> Prices:
    """Nats a token of each channel where the layers `pruned` [N, K] are: by layer, and by half of a block.

    One forward and `DRAWS` backward passes on each batch of `tokens` [windows, T], with two products a layer in each.
    """
    model.requires_grad_(False)
    sums = _Sums(model.config)
    generator = torch.Generator(model.device).manual_seed(seed)
    batches = torch.from_numpy(tokens).to(model.device).split(BATCH)
    for done, ids_BT in enumerate(batches, start=1):
        progress("pricing channels", done - 1, len(batches))
        with ExitStack() as hooks:
            for name, weight_NK in pruned.items():
                hooks.enter_context(_along_gradient(model.get_submodule(name), weight_NK, name, sums))
            embedded = model.get_input_embeddings()(ids_BT).requires_grad_()
            log_PV = model(inputs_embeds=embedded, use_cache=False).logits[:, :-1].float().log_softmax(-1).flatten(0, 1)
            for draw in range(DRAWS):
                drawn_P = log_PV.detach().exp().multinomial(1, generator=generator)
                log_PV.gather(1, drawn_P).sum().backward(retain_graph=draw + 1 < DRAWS)
                sums.square()
    return sums.prices(2 * DRAWS * tokens.shape[0] * (tokens.shape[1] - 1))


class _Sums:
    """What channels move the log likelihood by, token by token, and the sums of squares; by layer and by half."""

    def __init__(self, config: Any):
        self.config = config
        self.moved: dict[str, Tensor] = {}  # of the backward pass at work: [B, T, C]
        self.squares: dict[str, Tensor] = {}  # [C], float64
        self.by_window: dict[str, float] = {}

    def add(self, name: str, moved_BTF: Tensor) -> None:
        """Of the rows or inputs F of the layer `name`."""
        half, _, layer = name.rpartition(".")
        width = Channels.of(self.config, half.rsplit(".", 1)[-1]).width[layer]
        moved_BTC = moved_BTF.float().unflatten(-1, (-1, width)).sum(-1)
        for key in (half, name):
            self.moved[key] = self.moved[key] + moved_BTC if key in self.moved else moved_BTC

    def square(self) -> None:
        """Ends a backward pass."""
        for key, moved_BTC in self.moved.items():
            squares_C = moved_BTC.square().sum((0, 1), dtype=torch.float64)
            self.squares[key] = self.squares[key] + squares_C if key in self.squares else squares_C
            self.by_window[key] = self.by_window.get(key, 0.0) + float(moved_BTC.sum((1, 2)).square().sum())
        self.moved = {}

    def prices(self, count: int) -> Prices:
        """Over `count`."""
        totals = {key: max(float(squares_C.sum()), 1e-30) for key, squares_C in self.squares.items()}
        scales = {key: self.by_window[key] / total for key, total in totals.items()}
        return {key: (squares_C * scales[key] / count).tolist() for key, squares_C in self.squares.items()}


@contextmanager
def _along_gradient(layer: Any, pruned_NK: Tensor, name: str, sums: _Sums) -> Iterator[None]:
    """Adds to `sums`, in each backward pass, what the layer's rows or inputs move the log likelihood by."""
    change_NK = pruned_NK.to(layer.weight.device, layer.weight.dtype) - layer.weight
    by_input = name.endswith(tuple(INPUTS.values()))

    def forward(_: nn.Module, inputs: tuple[Tensor, ...], output_BTN: Tensor) -> None:
        x_BTK = inputs[0].detach()

        def backward(gradient_BTN: Tensor) -> None:
            moved_BTF = (gradient_BTN @ change_NK) * x_BTK if by_input else gradient_BTN * (x_BTK @ change_NK.T)
            sums.add(name, moved_BTF)

        output_BTN.register_hook(backward)

    handle = layer.register_forward_hook(forward)
    try:
        yield
    finally:
        handle.remove()
