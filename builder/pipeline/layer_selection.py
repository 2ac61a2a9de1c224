"""Chooses the channels that are pruned: those that reach the recipe's fraction, or what fits under its budget.

Every layer is pruned once, alone, and every channel priced by it; the cheapest for what they gain go first. Under a
budget at most three such choices are pruned, quantized as the recipe sets and evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.roofline import roofline
from builder.engines import measured_tactics
from builder.pipeline.questions_stage import questions_of
from builder.planning.compatibility import has_hybrid_kernels
from builder.planning.model_config import architecture, read_config
from calibration.evaluation.answer_loss import Answers, compare_answers, exact_match_change
from plugins.common.fused_layers import fused_name, fused_parts
from plugins.common.json_files import read_json, write_json
from plugins.common.linear_shape import LinearShape
from plugins.sparsity.declaration import Declaration

if TYPE_CHECKING:
    from builder.context import BuildContext
    from calibration.budget.allocation import Allocation, Allocator
    from calibration.budget.channel_prices import Prices
    from calibration.data.windows import Tokens

PRUNED_ON, PRICED_ON = 64, 32  # calibration samples: the first, and the last


def price(context: BuildContext, tokens: Tokens, work: Path) -> Prices:
    """prices.json: what each channel of the candidates costs, in nats per token, by layer and by half of a block."""
    from calibration.budget.channel_prices import channel_prices, prune_each_alone
    from calibration.model.blocks import Blocks
    from calibration.model.device import device
    from calibration.quantization.quantize import load_model

    progress, blocks = context.console.progress, Blocks(context.model, device())
    pruned = prune_each_alone(
        blocks, tokens[:PRUNED_ON], context.plan.sparse_layers, context.plan.pattern, work, progress
    )
    return channel_prices(load_model(context.model), pruned, tokens[-PRICED_ON:], progress)


def select(
    context: BuildContext, tokens: Tokens, prices: Prices, work: Path, answers: Answers | None = None
) -> dict[str, Any]:
    """selection.json: {declaration, fraction, cost, gain, ...}. `work` keeps what a killed run had measured.

    `answers`: the dense model's, to the budget's questions; None where it has none.

    Raises GateError, which names the smallest loss reached, where nothing fits under the budget.
    """
    from calibration.budget.budget_search import search

    sparsity = context.sparsity
    allocator = _allocator(context, prices, by_weights=sparsity.budget is None)
    if sparsity.budget is None:
        assert sparsity.fraction is not None
        allocation = allocator.of_fraction(sparsity.fraction)
        if context.recipe.engine.backend == "tensorrt":  # here, and not after the hours of pruning
            allocator.declare(allocation, sparsity.method).require_whole_layers()
        search_result: dict[str, Any] = {"pareto": []}
    else:
        builds = _Builds(context, tokens, allocator, work, answers)
        selection = search(allocator, sparsity.budget, sparsity.method, builds.measure, answers)
        allocation = selection.allocation
        search_result = {"measured_loss": selection.measured_loss, "pareto": selection.pareto}
    declaration = allocator.declare(allocation, sparsity.method)
    return {"declaration": declaration.to_json(), **asdict(allocation), **search_result}


def _allocator(context: BuildContext, prices: Prices, by_weights: bool) -> Allocator:
    from transformers import AutoConfig

    from calibration.budget.allocation import allocator

    candidates = [shape for shape in context.plan.shapes if shape.sparse]
    weights = {layer.name: layer.numel for layer in candidates}
    gains = weights if by_weights else _seconds_saved(context, candidates)
    config, ranks = AutoConfig.from_pretrained(str(context.model)), context.recipe.engine.tensor_parallel
    whole_layers = not has_hybrid_kernels(context.plan.backend)
    second = {} if by_weights or whole_layers else _second_products(context, candidates)
    pattern = context.plan.pattern
    return allocator(config, prices, list(weights), weights, gains, ranks, whole_layers, second, pattern)


def _load(context: BuildContext) -> tuple[int, str]:
    """The workload's decode batch, and the model's dtype."""
    benchmark = context.recipe.benchmark
    batch = max(max(load.concurrency) for load in benchmark.workloads) if benchmark else 1
    return batch, architecture(read_config(context.model)).dtype


def _seconds_saved(context: BuildContext, candidates: Sequence[LinearShape]) -> dict[str, float]:
    """Dense less sparse at the workload's decode batch: measured on this machine's GPU, or, without one, predicted.

    All candidates use the same source: measured and predicted times cannot be compared. Where no
    layer is predicted to gain, because a kernel's launch bounds them all, they are weighed by the bytes that they save.
    """
    batch, dtype = _load(context)
    measured = measured_tactics.seconds_saved(candidates, batch, dtype)
    if measured is not None:
        return dict(measured)
    card = roofline.gpu(context.plan.predicted["gpu"])
    predicted = {layer.name: _predicted_gain(card, batch, layer) for layer in candidates}
    if any(predicted.values()):
        return predicted
    return {layer.name: layer.bytes_saved_by_pruning / card.bandwidth for layer in candidates}


def _second_products(context: BuildContext, candidates: Sequence[LinearShape]) -> dict[str, float]:
    """Seconds that each layer's second product takes while it is sparse in part; layers that an engine joins share one.

    None where bytes weigh the layers: bytes are not seconds of a kernel.
    """
    batch, dtype = _load(context)
    card = roofline.gpu(context.plan.predicted["gpu"])
    seconds = measured_tactics.seconds_of_second_product(candidates, batch, dtype)
    if seconds is None:
        if not any(_predicted_gain(card, batch, layer) for layer in candidates):
            return {}
        seconds = {layer.name: _predicted_second(card, batch, layer) for layer in candidates}
    return {name: second / len(fused_parts(fused_name(name))) for name, second in seconds.items()}


def _predicted_second(card: roofline.Gpu, tokens: int, layer: LinearShape) -> float:
    dense, half, whole = (replace(roofline.on_tensor_cores(layer), fraction=fraction) for fraction in (0.0, 0.5, 1.0))
    ends = roofline.gemm_time(card, tokens, dense).seconds + roofline.gemm_time(card, tokens, whole).seconds
    return max(0.0, roofline.gemm_time(card, tokens, half, kernels=2).seconds - ends / 2)


def _predicted_gain(card: roofline.Gpu, tokens: int, layer: LinearShape) -> float:
    dense, whole = (replace(roofline.on_tensor_cores(layer), fraction=fraction) for fraction in (0.0, 1.0))
    return roofline.gemm_time(card, tokens, dense).seconds - roofline.gemm_time(card, tokens, whole).seconds


class _Builds:
    """Prunes and measures allocations, and keeps the results in `work`."""

    def __init__(
        self, context: BuildContext, tokens: Tokens, allocator: Allocator, work: Path, answers: Answers | None
    ) -> None:
        from calibration.data.windows import windows

        accuracy = context.recipe.accuracy
        assert accuracy.data is not None
        self.context, self.tokens, self.allocator, self.work = context, tokens, allocator, work
        self.held_out = windows(accuracy.data, context.model, accuracy.sequence_length, accuracy.samples)
        self.answers = answers
        self.record = work / "measured.json"
        self.measured: dict[str, Any] = read_json(self.record, {})

    def measure(self, allocation: Allocation) -> dict[str, Any]:
        """The built model against the dense one, everything quantized as the recipe sets."""
        key = " ".join(map(str, allocation.counts))
        if key not in self.measured:
            self.measured[key] = self._measure(allocation)
            write_json(self.record, self.measured)
        measured: dict[str, Any] = self.measured[key]
        lost = f", {exact_match_change(measured)}" if self.answers else ""
        self.context.console.print(
            f"  {allocation.fraction:.1%} of the weights {self.context.plan.pattern}: "
            f"perplexity {measured['perplexity_increase']:+.2%}, "
            f"KL {measured['kl']:.4f}, top-1 agreement {measured['top1_agreement']:.1%}{lost}"
        )
        return measured

    def _measure(self, allocation: Allocation) -> dict[str, Any]:
        from calibration.evaluation.evaluate import evaluate, hf_logits, in_precision
        from calibration.evaluation.exact_match import ask
        from calibration.quantization.quantize import load_model, quantize

        progress, config = self.context.console.progress, self.context.recipe.quantization
        model = load_model(self._prune(self.allocator.declare(allocation, "")))
        if config.wanted:
            model = quantize(model, config, self.context.plan.quantized_layers, self.tokens)
        compute = self.context.recipe.accuracy.compute
        model, dense = (in_precision(each, compute) for each in (model, load_model(self.context.model)))
        held_out = self.held_out
        accuracy = evaluate(hf_logits(dense), hf_logits(model), held_out.tokens, held_out.documents, progress)
        if self.answers is None:
            return accuracy.to_dict()
        answers = ask(model, questions_of(self.context), self.context.model, progress)
        return {**accuracy.to_dict(), **compare_answers(self.answers.right, answers.right)}

    def _prune(self, target: Declaration) -> Path:
        from builder.artifacts.filesystem import remove
        from calibration.pruning.sparsify import sparsify

        context, out = self.context, self.work / "try"
        remove(out)
        work, progress = self.work / "try.work", context.console.progress
        sparsify(context.model, self.tokens, context.sparsity, target, out, work, progress)
        return out
