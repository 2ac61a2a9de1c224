"""Selects, under the recipe's budget, the layers whose pruning saves the most time.

Every layer is pruned once, and its own cost is measured on held-out text. An integer program proposes sets of layers;
each set is pruned, quantized and evaluated, until one meets the budget.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.roofline import roofline
from builder.engines import measured_tactics
from builder.planning.model_config import architecture, read_config
from builder.planning.plan import LayerPlan
from calibration.pruning.sparsify import sparsify
from plugins.sparsity.declaration import Declaration

COST_WINDOWS = 64  # of held-out text that a layer's own cost is measured on: KL needs few

if TYPE_CHECKING:
    from builder.context import BuildContext
    from calibration.data.windows import Tokens


def select(context: BuildContext, tokens: Tokens, work: Path) -> dict[str, Any]:
    """selection.json: {layers, measured_increase, proven, pareto}. `work` keeps what a killed run had measured.

    Raises GateError, which names the smallest increase reached, where nothing fits under the budget.
    """
    from calibration.budget.search import select_layers

    search = _Search(context, tokens, work)
    candidates = [layer for layer in context.plan.layers if layer.sparse]
    sparsity = context.recipe.sparsity
    assert sparsity is not None
    assert sparsity.budget is not None
    chosen = select_layers(
        search.costs(),
        _seconds_saved(context, candidates),
        sparsity.budget.perplexity_increase,
        search.increase,
        {layer.name: layer.bytes_saved_by_pruning for layer in candidates},
    )
    return chosen.to_dict() | {"layers": sorted(chosen.layers, key=search.names.index)}


def _seconds_saved(context: BuildContext, candidates: Sequence[LayerPlan]) -> dict[str, float]:
    """Dense less 2:4 at the workload's decode batch: measured on this machine's GPU, or, without one, the roofline's.

    All candidates come from the same of the two: a measured time beside a predicted one would decide nothing. Where no
    layer is predicted to gain, because a kernel's launch bounds them all, they are weighed by the bytes that they save.
    """
    benchmark = context.recipe.benchmark
    batch = max(max(load.concurrency) for load in benchmark.workloads) if benchmark else 1
    measured = measured_tactics.seconds_saved(candidates, batch, architecture(read_config(context.model)).dtype)
    if measured is not None:
        return dict(measured)
    card = roofline.gpu(context.plan.predicted["gpu"])
    predicted = {layer.name: _predicted_gain(card, batch, layer) for layer in candidates}
    if any(predicted.values()):
        return predicted
    return {layer.name: layer.bytes_saved_by_pruning / card.bandwidth for layer in candidates}


def _predicted_gain(card: roofline.Gpu, tokens: int, layer: LayerPlan) -> float:
    shape = (card, tokens, layer.out_features, layer.in_features, roofline.tensor_core_format(layer.format))
    return roofline.gemm_time(*shape, sparse=False).seconds - roofline.gemm_time(*shape, sparse=True).seconds


class _Search:
    """Measures costs and selections for one recipe, remembering both in `work`."""

    def __init__(self, context: BuildContext, tokens: Tokens, work: Path) -> None:
        from calibration.data.windows import windows
        from calibration.evaluation.evaluate import hf_logits, perplexity
        from calibration.quantization.quantize import load_model

        accuracy = context.recipe.accuracy
        assert accuracy.data is not None
        self.context, self.tokens, self.work = context, tokens, work
        self.names = context.plan.sparse_layers
        self.held_out = windows(accuracy.data, context.model, accuracy.sequence_length, accuracy.samples).tokens
        self.dense = load_model(context.model)
        self.dense_perplexity = perplexity(hf_logits(self.dense), self.held_out)
        self.record = work / "measured.json"
        self.measured: dict[str, float] = json.loads(self.record.read_text()) if self.record.is_file() else {}

    def costs(self) -> dict[str, float]:
        """Nats a token that each layer's pruning costs alone."""
        import torch
        from safetensors.torch import load_file

        from calibration.budget.sensitivity import measure_costs, pruning

        pruned = self._prune(self.names, "all")
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted(pruned.glob("*.safetensors")):
            tensors |= load_file(file)
        changes = pruning(self.dense, {name: tensors[f"{name}.weight"] for name in self.names})
        own = {name: name for name in self.names}
        costs = measure_costs(self.dense, changes, own, self.held_out[:COST_WINDOWS], self.context.console.progress)
        return {name: cost.kl for name, cost in costs.items()}

    def increase(self, layers: Sequence[str]) -> float:
        """The perplexity increase with `layers` pruned, and everything quantized as the recipe says."""
        key = " ".join(layers)
        if key not in self.measured:
            self.measured[key] = self._measure(layers)
            self.record.write_text(json.dumps(self.measured))
            self.context.console.say(f"  {len(layers)} layers pruned: perplexity {self.measured[key]:+.2%}")
        return self.measured[key]

    def _measure(self, layers: Sequence[str]) -> float:
        from calibration.evaluation.evaluate import hf_logits, perplexity
        from calibration.quantization.quantize import load_model, quantize

        model = load_model(self._prune(layers, "try"))
        config = self.context.recipe.quantization
        if config.wanted:
            model = quantize(model, config, self.context.plan.quantized_layers, self.tokens)
        return perplexity(hf_logits(model), self.held_out) / self.dense_perplexity - 1

    def _prune(self, layers: Sequence[str], name: str) -> Path:
        from builder.artifacts.filesystem import remove

        sparsity = self.context.recipe.sparsity
        assert sparsity is not None
        out = self.work / name
        remove(out)
        target, work = Declaration(tuple(layers)), self.work / f"{name}.work"
        sparsify(self.context.model, self.tokens, sparsity, target, out, work, lambda *_: None)
        return out
