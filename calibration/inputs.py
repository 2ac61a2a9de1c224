"""Second moments of the inputs of a block's linear layers, and which of the layers share an input.

Suffixes: B samples, T tokens of a sample, D hidden size, M rows of activations, N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from calibration.blocks import HALVES, Stream, forward_half
from calibration.solvers import Statistics
from calibration.states import States


class _ReachedError(Exception):
    """Ends a forward pass at the layer whose input was wanted."""


def shared_inputs(stream: Stream, half: str, names: Sequence[str], arguments: dict[str, Any]) -> list[list[str]]:
    """The linear layers `names` of a half, grouped by the tensor they read, in the order of the forward pass."""
    groups: list[tuple[Tensor, list[str]]] = []

    def note(name: str, x: Tensor) -> None:
        for seen, group in groups:
            if seen is x:
                group.append(name)
                return
        groups.append((x, [name]))

    with _watch(stream.block, names, note):
        forward_half(stream.block, half, stream.states.read([0]), arguments)
    return [group for _, group in groups]


def gather(
    layer: str, pruned: Stream, arguments: dict[str, Any], dense: Stream | None = None, leaving: States | None = None
) -> Statistics:
    """The statistics of `layer`'s input over all samples; with `dense`, also against the dense model's.

    The streams' states are those that enter the layer's half. If `layer` is the half's last, the dense states that
    leave the half are one product away: `leaving` gets them.
    """
    half = layer.split(".")[0]
    out_features, in_features = weight_shape = pruned.block.get_submodule(layer).weight.shape
    device = pruned.states.device
    hessian_KK = torch.zeros(in_features, in_features, device=device)
    cross_KK = torch.zeros_like(hessian_KK) if dense else None
    residual_NK = torch.zeros(weight_shape, device=device) if dense and layer == HALVES[half][1] else None
    rows = 0
    dense_batches = dense.states.batches() if dense else None
    with leaving.writer() if leaving else nullcontext() as leave:
        for state_BTD in pruned.states.batches():
            x_MK = _input(layer, half, pruned.block, state_BTD, arguments)
            hessian_KK.addmm_(x_MK.T, x_MK)
            rows += len(x_MK)
            if dense and dense_batches and cross_KK is not None:
                dense_state_BTD = next(dense_batches)
                dense_x_MK = _input(layer, half, dense.block, dense_state_BTD, arguments)
                cross_KK.addmm_(dense_x_MK.T, x_MK)
                if residual_NK is not None:
                    residual_NK.addmm_((dense_state_BTD - state_BTD).view(-1, out_features).T, x_MK)
                if leave:
                    added_MD = dense.block.get_submodule(layer)(dense_x_MK)
                    leave(dense_state_BTD + added_MD.view_as(dense_state_BTD))
    for moment in (hessian_KK, cross_KK, residual_NK):
        if moment is not None:
            moment.div_(rows)
    return Statistics(hessian_KK, cross_KK, residual_NK)


def _input(layer: str, half: str, block: nn.Module, state_BTD: Tensor, arguments: dict[str, Any]) -> Tensor:
    """The input [M, K] that `layer` sees."""
    seen: list[Tensor] = []

    def note(_: str, x: Tensor) -> None:
        seen.append(x.flatten(0, -2).float())
        raise _ReachedError

    with _watch(block, [layer], note), suppress(_ReachedError):
        forward_half(block, half, state_BTD, arguments)
    return seen[0]


@contextmanager
def _watch(block: nn.Module, names: Sequence[str], note: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Calls `note` with each module's name and input before the module runs."""
    handles = [
        block.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
