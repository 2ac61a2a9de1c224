"""Second moments of the inputs of a block's linear layers. Layers that share an input share its statistics.

Suffixes: B samples, T tokens of a sample, D hidden size, M rows of activations, K in_features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from calibration.blocks import SAMPLES_AT_ONCE
from calibration.solvers import Statistics


class _ReachedError(Exception):
    """Ends a forward pass at the layer whose input was wanted."""


def shared_inputs(
    block: nn.Module, names: Sequence[str], hidden_BTD: Tensor, arguments: dict[str, Any]
) -> list[list[str]]:
    """The linear layers `names` grouped by the tensor they read, in the order of the forward pass."""
    groups: list[tuple[Tensor, list[str]]] = []

    def remember(name: str, x: Tensor) -> None:
        for seen, group in groups:
            if seen is x:
                group.append(name)
                return
        groups.append((x, [name]))

    handles = [
        block.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: remember(name, args[0]))
        for name in names
    ]
    block(hidden_BTD[:1], **arguments)
    for handle in handles:
        handle.remove()
    return [group for _, group in groups]


def gather(
    block: nn.Module,
    layer: str,
    hidden_BTD: Tensor,
    arguments: dict[str, Any],
    dense: tuple[nn.Module, Tensor] | None = None,
) -> Statistics:
    """The statistics of `layer`'s input over all samples.

    `dense` is the unpruned block with the hidden states that the unpruned model gives it; with it the statistics hold
    the cross moments too.
    """
    features = block.get_submodule(layer).in_features
    hessian_KK = torch.zeros(features, features)
    cross_KK = torch.zeros(features, features) if dense else None
    rows = 0
    for at in range(0, len(hidden_BTD), SAMPLES_AT_ONCE):
        x_MK = _input(block, layer, hidden_BTD[at : at + SAMPLES_AT_ONCE], arguments)
        hessian_KK.addmm_(x_MK.T, x_MK)
        if dense and cross_KK is not None:
            dense_MK = _input(dense[0], layer, dense[1][at : at + SAMPLES_AT_ONCE], arguments)
            cross_KK.addmm_(dense_MK.T, x_MK)
        rows += len(x_MK)
    return Statistics(hessian_KK.div_(rows), cross_KK.div_(rows) if cross_KK is not None else None)


def _input(block: nn.Module, layer: str, hidden_BTD: Tensor, arguments: dict[str, Any]) -> Tensor:
    with _stop_at(block.get_submodule(layer)) as caught:
        block(hidden_BTD, **arguments)
    return caught[0].flatten(0, -2)


@contextmanager
def _stop_at(module: nn.Module) -> Iterator[list[Tensor]]:
    caught: list[Tensor] = []

    def catch(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        caught.append(args[0])
        raise _ReachedError

    handle = module.register_forward_pre_hook(catch)
    try:
        yield caught
    except _ReachedError:
        pass
    finally:
        handle.remove()
