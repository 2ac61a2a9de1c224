"""What each layer costs when it alone is changed: loss on held-out text, measured, or estimated in a few passes.

A layer's change is its pruned weight in the dense model's place, or ModelOpt's fake quantizers switched on, or both.
Measuring takes a pass a layer. The estimate takes a few passes for all layers together: to second order KL(dense ||
changed) is half the square of the change of the layer's output along the gradient of the log likelihood of tokens that
the model itself draws (Fisher information; Martens, 2020, arXiv 1412.1193; for pruning: Singh and Alistarh, 2020, arXiv
2004.14340). On docs-llama the two agree within a tenth. Of `Cost`, `kl` is the one to add up: the loss is what a budget
counts, but of one layer it is lost in the noise of the text.

Suffixes: B windows, T tokens of a window, V vocabulary, N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calibration.data.windows import Tokens
from plugins.common.progress import Progress

BATCH = 4  # windows
DRAWS = 4  # of tokens from the model's own distribution, a batch, for the estimate
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


def estimate_costs(
    model: Any, pruned: Mapping[str, Tensor], tokens: Tokens, progress: Progress, seed: int = 0
) -> dict[str, float]:
    """KL(dense || pruned) a token, nats, of each layer's pruned weight [N, K] alone, to second order.

    Two matrix products a layer, one forward pass and `DRAWS` backward passes, on each batch of `tokens` [windows, T].
    """
    model.requires_grad_(False)
    sums = dict.fromkeys(pruned, 0.0)
    generator = torch.Generator(model.device).manual_seed(seed)
    batches = torch.from_numpy(tokens).to(model.device).split(BATCH)
    for done, ids_BT in enumerate(batches, start=1):
        with ExitStack() as hooks:
            for name, weight_NK in pruned.items():
                hooks.enter_context(_along_gradient(model.get_submodule(name), weight_NK, name, sums))
            embedded = model.get_input_embeddings()(ids_BT).requires_grad_()
            log_PV = model(inputs_embeds=embedded, use_cache=False).logits[:, :-1].float().log_softmax(-1).flatten(0, 1)
            for draw in range(DRAWS):
                drawn_P = log_PV.detach().exp().multinomial(1, generator=generator)
                log_PV.gather(1, drawn_P).sum().backward(retain_graph=draw + 1 < DRAWS)
        progress("sensitivity", done, len(batches))
    count = DRAWS * tokens.shape[0] * (tokens.shape[1] - 1)
    return {name: total / 2 / count for name, total in sums.items()}


@contextmanager
def _along_gradient(layer: Any, pruned_NK: Tensor, name: str, sums: dict[str, float]) -> Iterator[None]:
    """Adds to `sums[name]`, in each backward pass, each window's squared output change along the gradient."""
    change_NK = pruned_NK.to(layer.weight.device, layer.weight.dtype) - layer.weight

    def forward(_: nn.Module, inputs: tuple[Tensor, ...], output_BTN: Tensor) -> None:
        change_BTN = inputs[0].detach() @ change_NK.T

        def backward(gradient_BTN: Tensor) -> None:
            sums[name] += float((gradient_BTN * change_BTN).float().sum(dim=(1, 2)).square().sum())

        output_BTN.register_hook(backward)

    handle = layer.register_forward_hook(forward)
    try:
        yield
    finally:
        handle.remove()


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


def quantizing(model: Any, layers: Sequence[str]) -> dict[str, Change]:
    """For each layer the change to its fake-quantized form. Switches all quantizers of ModelOpt's `model` off."""
    quantizers = {
        layer: [getattr(model.get_submodule(layer), f"{which}_quantizer") for which in ("weight", "input")]
        for layer in layers
    }
    for each in quantizers.values():
        for quantizer in each:
            quantizer.disable()

    @contextmanager
    def change(layer: str) -> Iterator[None]:
        for quantizer in quantizers[layer]:
            quantizer.enable()
        try:
            yield
        finally:
            for quantizer in quantizers[layer]:
                quantizer.disable()

    return {layer: lambda layer=layer: change(layer) for layer in layers}  # type: ignore[misc]


def both(first: Change, second: Change) -> Change:
    """One change inside another."""

    @contextmanager
    def change() -> Iterator[None]:
        with first(), second():
            yield

    return change


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
