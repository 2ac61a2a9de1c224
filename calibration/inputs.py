"""Second moments of the inputs of a block's linear layers, and which of the layers share an input.

Suffixes: B samples, T tokens of a sample, D hidden size, M rows of activations, N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from calibration.blocks import RESIDUAL_BEFORE, SAMPLES_AT_ONCE, Stream
from calibration.solvers import Statistics


class _ReachedError(Exception):
    """Ends a forward pass at the layer whose input was wanted."""


def shared_inputs(stream: Stream, names: Sequence[str], arguments: dict[str, Any]) -> list[list[str]]:
    """The linear layers `names` grouped by the tensor they read, in the order of the forward pass."""
    groups: list[tuple[Tensor, list[str]]] = []

    def note(name: str, x: Tensor) -> None:
        for seen, group in groups:
            if seen is x:
                group.append(name)
                return
        groups.append((x, [name]))

    with _watch(stream.block, names, note):
        stream.block(stream.hidden[:1], **arguments)
    return [group for _, group in groups]


def gather(layer: str, pruned: Stream, arguments: dict[str, Any], dense: Stream | None = None) -> Statistics:
    """The statistics of `layer`'s input over all samples; with `dense`, also against the dense model's."""
    features: tuple[int, int] = tuple(pruned.block.get_submodule(layer).weight.shape)
    hessian_KK = torch.zeros(features[1], features[1])
    cross_KK = torch.zeros_like(hessian_KK) if dense else None
    residual_NK = torch.zeros(features) if dense and layer in RESIDUAL_BEFORE else None
    rows = 0
    for at in range(0, len(pruned.hidden), SAMPLES_AT_ONCE):
        x_MK, residual_MN = _input(layer, pruned, at, arguments)
        hessian_KK.addmm_(x_MK.T, x_MK)
        if dense and cross_KK is not None:
            dense_MK, dense_residual_MN = _input(layer, dense, at, arguments)
            cross_KK.addmm_(dense_MK.T, x_MK)
            if residual_NK is not None and residual_MN is not None and dense_residual_MN is not None:
                residual_NK.addmm_((dense_residual_MN - residual_MN).T, x_MK)
        rows += len(x_MK)
    for moment in (hessian_KK, cross_KK, residual_NK):
        if moment is not None:
            moment.div_(rows)
    return Statistics(hessian_KK, cross_KK, residual_NK)


def _input(layer: str, stream: Stream, at: int, arguments: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """The input [M, K] of `layer` for the samples from `at` on, and the residual [M, N] that its output is added to."""
    seen: dict[str, Tensor] = {}
    names = [name for name in (RESIDUAL_BEFORE.get(layer), layer) if name]

    def note(name: str, x: Tensor) -> None:
        seen[name] = x.flatten(0, -2)
        if name == layer:
            raise _ReachedError

    with _watch(stream.block, names, note), suppress(_ReachedError):
        stream.block(stream.hidden[at : at + SAMPLES_AT_ONCE], **arguments)
    return seen[layer], seen[names[0]] if len(names) > 1 else None


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
