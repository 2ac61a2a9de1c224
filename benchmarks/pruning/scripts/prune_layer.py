"""python -m benchmarks.pruning.scripts.prune_layer SOLVER N K OUT

Prunes one random layer [N, K] to 2:4 with one solver, on the same Hessian, and writes time and error to OUT.

The Hessian is that of K correlated inputs. Error: of the layer's output, relative, under that Hessian.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

PEAK = 4096  # rows and columns of the product that measures the machine


def twofour(method: str, weight_NK: Tensor, hessian_KK: Tensor) -> Tensor:
    from calibration.pruning.solvers import SOLVERS, Pattern, Statistics
    from plugins.sparsity.segments import Segments

    whole = Segments.split("rows", len(weight_NK), len(weight_NK))
    return SOLVERS[method]().prune("layer", weight_NK, Statistics(hessian_KK), Pattern.parse("2:4"), whole)


def modelopt(weight_NK: Tensor, hessian_KK: Tensor) -> Tensor:
    """Gives a mask only: kept weights are unchanged."""
    from modelopt.torch.sparsity.weight_sparsity.sparsegpt import SparseGPTSearcher, create_sgpt_mask

    config = {**SparseGPTSearcher().default_search_config, "pattern": "2:4 sparsity"}
    return weight_NK * create_sgpt_mask(weight_NK, hessian_KK.clone(), config)


def llmcompressor(weight_NK: Tensor, hessian_KK: Tensor) -> Tensor:
    from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight

    layer = torch.nn.Linear(weight_NK.shape[1], weight_NK.shape[0], bias=False)
    layer.weight.data = weight_NK.clone()
    return sparsify_weight(layer, {layer: hessian_KK.clone()}, 0.5, 2, 4, 128, 0.01, False)[1]


def peak() -> float:
    """Floating-point operations a second of a float32 product."""
    a, b = torch.randn(2, PEAK, PEAK)
    taken = []
    for _ in range(4):
        started = time.perf_counter()
        a @ b
        taken.append(time.perf_counter() - started)
    return 2 * PEAK**3 / min(taken)


def layer(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A weight, and the second moments of inputs that share a few directions."""
    generator = torch.Generator().manual_seed(0)
    weight_NK = torch.randn(rows, columns, generator=generator) / columns**0.5
    mixed_MK = torch.randn(2 * columns, columns // 8, generator=generator) @ torch.randn(
        columns // 8, columns, generator=generator
    ) / (columns // 8) ** 0.5 + torch.randn(2 * columns, columns, generator=generator)
    return weight_NK, mixed_MK.T @ mixed_MK / len(mixed_MK)


@torch.no_grad()
def measure(solver: str, out_features: int, in_features: int) -> dict[str, float | bool]:
    tool, _, method = solver.partition(" ")
    tools: dict[str, Callable[[Tensor, Tensor], Tensor]]
    tools = {"twofour": partial(twofour, method), "modelopt": modelopt, "llm-compressor": llmcompressor}
    prune = tools[tool]
    prune(*layer(64, 256))  # imports and first calls are not timed
    weight_NK, hessian_KK = layer(out_features, in_features)
    started = time.perf_counter()
    pruned_NK = prune(weight_NK, hessian_KK.clone())
    seconds = time.perf_counter() - started
    change_NK = weight_NK - pruned_NK.float()
    error = ((change_NK @ hessian_KK) * change_NK).sum() / ((weight_NK @ hessian_KK) * weight_NK).sum()
    holds = bool(((pruned_NK.unflatten(1, (-1, 4)) != 0).sum(2) <= 2).all())
    return {"seconds": seconds, "error": float(error), "holds_2of4": holds, "peak": peak()}


if __name__ == "__main__":
    Path(sys.argv[4]).write_text(json.dumps(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
