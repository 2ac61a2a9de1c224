"""What each layer costs when it alone is pruned, measured on held-out text: one pass a layer.

Of `Cost`, `kl` is the one to add up: the loss is what a budget counts, but for one layer it is lost in the noise of the
text.

Suffixes: B windows, T tokens of a window, V vocabulary, N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calibration.data.windows import Tokens
from plugins.common.progress import Progress

BATCH = 4  # windows
Change = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Cost:
    """Of one change, a token: the increase of the held-out loss, and KL(dense || changed). Nats."""

    loss: float
    kl: float


@torch.inference_mode()
def measure_costs(
    model: Any, changes: Mapping[str, Change], layer_of: Mapping[str, str], tokens: Tokens, progress: Progress
) -> dict[str, Cost]:
    """Of each change by name, on `tokens` [windows, T]. `layer_of` names the layer that a change touches.

    The blocks before that layer are not run again. One batch of the dense model's logits is in memory.
    """
    sums = {name: [0.0, 0.0] for name in changes}
    batches = torch.from_numpy(tokens).to(model.device).split(BATCH)
    for done, ids_BT in enumerate(batches, start=1):
        entering = _Entering(model, ids_BT)
        dense_PV = entering.logits[:, :-1].float().log_softmax(-1).flatten(0, 1)
        target_P = ids_BT[:, 1:].flatten()
        for name, change in changes.items():
            with change():
                changed_BTV = entering.logits_from(_block(layer_of[name], model))
            changed_PV = changed_BTV[:, :-1].float().log_softmax(-1).flatten(0, 1)
            kl = (dense_PV.exp() * (dense_PV - changed_PV)).sum(dtype=torch.float64)
            loss = (dense_PV - changed_PV).gather(1, target_P[:, None]).sum(dtype=torch.float64)
            sums[name][0] += float(loss)
            sums[name][1] += float(kl)
        progress("sensitivity", done, len(batches))
    count = tokens.shape[0] * (tokens.shape[1] - 1)
    return {name: Cost(loss / count, kl / count) for name, (loss, kl) in sums.items()}


def pruning(model: Any, pruned: Mapping[str, Tensor]) -> dict[str, Change]:
    """For each layer the change to its pruned weight [N, K], and back."""

    @contextmanager
    def change(layer: str) -> Iterator[None]:
        weight = model.get_submodule(layer).weight
        before = weight.data
        weight.data = pruned[layer].to(before.device, before.dtype)
        try:
            yield
        finally:
            weight.data = before

    return {layer: lambda layer=layer: change(layer) for layer in pruned}  # type: ignore[misc]


class _Entering:
    """What entered each block of a model in one forward pass, to go on from there."""

    def __init__(self, model: Any, ids_BT: Tensor):
        self.model = model
        self.entered: list[tuple[Tensor, dict[str, Any]]] = []
        handles = [
            block.register_forward_pre_hook(
                lambda _, args, kwargs: self.entered.append((args[0], kwargs)), with_kwargs=True
            )
            for block in model.model.layers
        ]
        last = model.model.norm.register_forward_pre_hook(lambda _, args: self.entered.append((args[0], {})))
        self.logits: Tensor = model(ids_BT, use_cache=False).logits
        for handle in [*handles, last]:
            handle.remove()

    def logits_from(self, first: int) -> Tensor:
        """The logits [B, T, V] with the blocks from number `first` on run again."""
        hidden_BTD = self.entered[first][0]
        for (_, arguments), block in zip(self.entered[first:], self.model.model.layers[first:], strict=False):
            hidden_BTD = block(hidden_BTD, **arguments)
        logits: Tensor = self.model.lm_head(self.model.model.norm(hidden_BTD))
        return logits


def _block(layer: str, model: Any) -> int:
    """The number of the block that a layer belongs to; lm_head comes behind the last."""
    return int(layer.split(".")[2]) if layer.startswith("model.layers.") else len(model.model.layers)
