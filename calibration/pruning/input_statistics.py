"""Second moments of the inputs of a block's linear layers, and which of the layers share an input.

Suffixes: B samples, T tokens of a sample, D hidden size, M rows of activations, N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from calibration.model.activation_file import ActivationFile
from calibration.model.block_walk import BlockWalk
from calibration.model.blocks import HALVES, Stream, forward_half
from calibration.pruning.solvers import Statistics

PARTS = 4  # of a symmetric sum's rows: 10 of its 16 blocks are computed


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


def walk_block(
    walk: BlockWalk, number: int, block: nn.Module, names: Sequence[str], stream: str
) -> Iterator[tuple[list[str], Statistics]]:
    """The layers `names` of a block that read the same inputs, with their statistics, group by group.

    The states named `stream` enter the block; those that leave it are written behind the groups.
    """
    arguments, middle = walk.arguments[number], walk.states(number, "middle")
    passes = ((walk.entering(number, stream), middle), (middle, walk.states(number + 1, stream)))
    for half, (entering, leaving) in zip(HALVES, passes, strict=True):
        states, inside = Stream(block, entering), [name for name in names if name.startswith(half)]
        for group in shared_inputs(states, half, inside, arguments) if inside else []:
            with walk.products:
                statistics = collect_statistics(group[0], states, arguments)
            yield group, statistics
        if leaving is middle or number + 1 < walk.blocks.count:  # nothing reads what leaves the last block
            walk.send(entering, partial(forward_half, block, half, arguments=arguments), leaving)


def collect_statistics(
    layer: str,
    pruned: Stream,
    arguments: dict[str, Any],
    dense: Stream | None = None,
    inputs: ActivationFile | None = None,
    leaving: ActivationFile | None = None,
) -> Statistics:
    """The statistics of `layer`'s input over all samples; with `dense`, also against the dense model's.

    The streams' states are those that enter the layer's half. `inputs` gets the layer's inputs, as the pruned part of
    the model gives them. If `layer` is the half's last, `leaving` gets the dense states that leave the half.
    """
    half = layer.split(".")[0]
    linear = pruned.block.get_submodule(layer)
    last = layer == HALVES[half][1]
    zeros = partial(torch.zeros, device=pruned.states.device)
    hessian_KK = zeros(linear.in_features, linear.in_features)
    cross_KK = torch.zeros_like(hessian_KK) if dense and not last else None
    wanted_NK = zeros(linear.weight.shape) if dense and last else None
    rows = 0
    dense_batches = dense.states.batches() if dense else None
    with _writer(inputs) as keep, _writer(leaving) as leave:
        for state_BTD in pruned.states.batches():
            x_MK = _input(layer, half, pruned.block, state_BTD, arguments)
            keep(x_MK)
            _add_square(hessian_KK, x_MK)
            rows += len(x_MK)
            if not (dense and dense_batches):
                continue
            dense_state_BTD = next(dense_batches)
            dense_x_MK = _input(layer, half, dense.block, dense_state_BTD, arguments)
            if cross_KK is not None:
                cross_KK.addmm_(dense_x_MK.T, x_MK)
            if wanted_NK is not None:
                left_BTD = dense_state_BTD + dense.block.get_submodule(layer)(dense_x_MK).view_as(dense_state_BTD)
                leave(left_BTD)
                missing_BTD = left_BTD - state_BTD
                if linear.bias is not None:
                    missing_BTD -= linear.bias
                wanted_NK.addmm_(missing_BTD.flatten(0, 1).T, x_MK)
    _mirror(hessian_KK)
    for moment in (hessian_KK, cross_KK, wanted_NK):
        if moment is not None:
            moment.div_(rows)
    return Statistics(hessian_KK, cross_KK, wanted_NK)


def _writer(states: ActivationFile | None) -> AbstractContextManager[Callable[[Tensor], object]]:
    """What adds a batch to the file; without a file it drops it."""
    return states.writer() if states else nullcontext(lambda _: None)


def _add_square(sum_KK: Tensor, x_MK: Tensor) -> None:
    """Adds X'X on and above the diagonal, part by part: what is below is the same."""
    size = -(-len(sum_KK) // PARTS)
    for at in range(0, len(sum_KK), size):
        sum_KK[at : at + size, at:].addmm_(x_MK[:, at : at + size].T, x_MK[:, at:])


def _mirror(sum_KK: Tensor) -> None:
    """Fills in what `_add_square` leaves out."""
    size = -(-len(sum_KK) // PARTS)
    for at in range(size, len(sum_KK), size):
        sum_KK[at:, at - size : at] = sum_KK[at - size : at, at:].T


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
