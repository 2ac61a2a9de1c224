"""Tunes the kept weights of a block's sparse parts together, so that the block gives out what the dense model's does.

Guo et al., EBFT: Effective and Block-Wise Fine-Tuning for Sparse LLMs, 2024, arXiv:2402.12419. Each layer has been
fitted by itself before; here the layers make up for each other. Masks stay, and dense segments do too: free, they fit
the calibration text and lose on other text. Gradients reach over one block and no further.

Suffixes: B samples, T tokens of a sample, D hidden size, N out_features, K in_features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from calibration.model.activation_file import ActivationFile, samples_at_once
from calibration.model.blocks import Stream
from calibration.model.device import has_bfloat16
from calibration.pruning.solvers.masks import dense_part
from plugins.sparsity.segments import Segments

PASSES = 2  # over the calibration samples
SAMPLES_A_STEP = 4
LEARNING_RATE = 0.04  # of the root mean square of a layer's weights, where half of the block's weights are zero
WARM_UP = 0.1  # share of the steps over which the rate rises; it then falls to 0 along a cosine
BETAS = (0.8, 0.95)  # shorter than Adam's own, as there are only some dozens of steps


def finetune_block(
    pruned: Stream, segments: Mapping[str, Segments], target: ActivationFile, arguments: dict[str, Any]
) -> None:
    """Lowers the squared distance of the block's output from `target` by Adam, in place.

    Only the nonzero weights in sparse segments change; `segments` are those of the linear layers, by name. Samples come
    in an order that a fixed seed draws, so that the same call gives the same bytes. Products are in bfloat16 where that
    is faster; the weights stay float32.
    """
    weights = [pruned.block.get_submodule(name).weight.requires_grad_(True) for name in segments]
    sparse = [~dense_part(weight, segments[name]) for name, weight in zip(segments, weights, strict=True)]
    masks = [(weight != 0) & part for weight, part in zip(weights, sparse, strict=True)]
    rate = LEARNING_RATE * math.sqrt(2 * _share_of_zeros(pruned.block))  # large steps harm where little is pruned
    groups = [{"params": [weight], "lr": rate * _rms(weight)} for weight in weights]
    optimizer = torch.optim.Adam(groups, betas=BETAS, eps=1e-12, fused=True)
    batches = _batches(len(target))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / len(batches)))
    for batch in batches:
        for part in batch.split(samples_at_once(pruned.states.shape[1])):
            _add_gradients(pruned, target, part.tolist(), len(part) / len(batch), arguments)
        for weight, mask in zip(weights, masks, strict=True):
            weight.grad.mul_(mask)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    for weight in weights:
        weight.requires_grad_(False)


def _add_gradients(
    pruned: Stream, target: ActivationFile, samples: list[int], share: float, arguments: dict[str, Any]
) -> None:
    """Adds `share` of the gradient of the mean squared distance over these samples."""
    target_BTD = target.read(samples)
    with torch.enable_grad(), torch.autocast(target_BTD.device.type, torch.bfloat16, enabled=has_bfloat16()):
        output_BTD = pruned.block(pruned.states.read(samples), **arguments)
        (share * nn.functional.mse_loss(output_BTD.float(), target_BTD)).backward()


def _rms(weight_NK: Tensor) -> float:
    """Of the nonzero weights."""
    mean_square: float = (weight_NK.detach().square().sum() / weight_NK.count_nonzero().clamp_min(1)).item()
    return math.sqrt(mean_square)


def _share_of_zeros(block: nn.Module) -> float:
    """Of the weights of all linear layers together."""
    weights = [module.weight for module in block.modules() if isinstance(module, nn.Linear)]
    zeros: int = sum(int((weight == 0).sum()) for weight in weights)
    total: int = sum(weight.numel() for weight in weights)
    return zeros / total


def _batches(samples: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(samples, generator=generator) for _ in range(PASSES)]
    return [batch for order in orders for batch in order.split(SAMPLES_A_STEP)]


def _rate(progress: float) -> float:
    return min(1.0, progress / WARM_UP) * (1 + math.cos(math.pi * progress)) / 2
