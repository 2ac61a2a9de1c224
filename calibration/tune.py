"""Tunes a block's kept weights together, so that the block gives out what the dense model's does. Masks stay.

Guo et al., EBFT: Effective and Block-Wise Fine-Tuning for Sparse LLMs, 2024, arXiv:2402.12419. Each layer has been
fitted by itself before; here the layers make up for each other. Gradients reach over one block and no further.

Suffixes: B samples, T tokens of a sample, D hidden size, N out_features, K in_features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from calibration.blocks import Stream

PASSES = 2  # over the calibration samples
SAMPLES_A_STEP = 2
LEARNING_RATE = 0.005  # of the root mean square of a layer's weights
WARM_UP = 0.1  # share of the steps over which the rate rises; it then falls to 0 along a cosine
BETAS = (0.9, 0.99)


def tune(pruned: Stream, names: Sequence[str], target_BTD: Tensor, arguments: dict[str, Any]) -> None:
    """Lowers the squared distance of the block's output from `target_BTD` by Adam, in place.

    Only the nonzero weights of the linear layers `names` change. Samples come in an order that a fixed seed draws, so
    that the same call gives the same bytes.
    """
    weights = [pruned.block.get_submodule(name).weight for name in names]
    masks = [(weight != 0).float() for weight in weights]
    rates = [
        LEARNING_RATE * float(weight.square().sum() / mask.sum().clamp_min(1)) ** 0.5
        for weight, mask in zip(weights, masks, strict=True)
    ]
    optimizer = torch.optim.Adam(
        [{"params": [weight], "lr": rate} for weight, rate in zip(weights, rates, strict=True)], betas=BETAS, eps=1e-12
    )
    batches = _batches(len(target_BTD))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / len(batches)))
    for weight in weights:
        weight.requires_grad_(True)
    for batch in batches:
        with torch.enable_grad():
            output_BTD = pruned.block(pruned.hidden[batch], **arguments)
            torch.nn.functional.mse_loss(output_BTD, target_BTD[batch]).backward()
        for weight, mask in zip(weights, masks, strict=True):
            weight.grad.mul_(mask)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    for weight in weights:
        weight.requires_grad_(False)


def _batches(samples: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        batch for _ in range(PASSES) for batch in torch.randperm(samples, generator=generator).split(SAMPLES_A_STEP)
    ]


def _rate(progress: float) -> float:
    return min(1.0, progress / WARM_UP) * (1 + math.cos(math.pi * progress)) / 2
