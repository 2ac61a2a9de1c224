"""Recipe and `config.json` -> plan: the format and pattern of each linear layer, bytes, memory and ceilings.

Reads no weights and imports no torch. All times are predicted, from the roofline of a named GPU.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from benchmarks.roofline import roofline
from builder.planning.compatibility import features_of
from builder.planning.hub import find_config
from builder.planning.kv_capacity import Capacity, capacity, check_budget, check_eviction
from builder.planning.model_config import Architecture, architecture
from builder.planning.notes import notes
from builder.recipe import Recipe
from calibration.config import check_adapter_rank
from plugins.common import defaults
from plugins.common.errors import UserError
from plugins.common.formats import format_of
from plugins.common.fused_layers import fused_name
from plugins.common.linear_shape import LinearShape
from plugins.common.patterns import TENSOR_CORE, Pattern, keep_and_group

Decision = Literal["prune", "candidate", "excluded", "not listed", "no sparsity"]


@dataclass(frozen=True)
class LayerPlan:
    """The plan for one linear layer. Bytes are of its weight, with scales."""

    shape: LinearShape  # as built: `fraction` of the weight is expected to become sparse
    dense_bytes: int
    built_bytes: int
    decision: Decision
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Its entry in plan.json."""
        own = {key: value for key, value in vars(self).items() if key != "shape"}
        shape = self.shape
        return {"name": shape.name, **shape.facts, "fraction": shape.fraction, **own, "pattern": shape.pattern}


@dataclass(frozen=True)
class Plan:
    """A recipe resolved for one model."""

    model: str
    architecture: str
    format: str
    backend: str
    pattern: Pattern  # of the layers to prune
    layers: tuple[LayerPlan, ...]
    dense_bytes: int
    built_bytes: int
    activations: str  # scales of 8-bit ones: "per_tensor" or "per_token"
    kv_bytes_per_token: int
    kv_cache: Capacity  # on one of `predicted`'s cards
    heads: int
    blocks: int
    calibration_bytes: dict[str, int]
    predicted: dict[str, Any]
    notes: tuple[str, ...] = field(default=())
    source_notes: tuple[str, ...] = field(default=())  # from the model's files, where they were checked

    @property
    def shapes(self) -> list[LinearShape]:
        """Of `layers`."""
        return [layer.shape for layer in self.layers]

    @property
    def sparse_layers(self) -> list[str]:
        return [shape.name for shape in self.shapes if shape.sparse]

    @property
    def quantized_layers(self) -> list[str]:
        return [shape.name for shape in self.shapes if shape.format in ("int8", "fp8")]

    @property
    def features(self) -> tuple[str, ...]:
        """What not every backend has (builder/planning/compatibility.py)."""
        pattern = self.pattern if self.sparse_layers else None
        return features_of(self.activations == "per_token", "lm_head" in self.quantized_layers, pattern)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"layers": [layer.to_dict() for layer in self.layers]}


def make_plan(
    recipe: Recipe, gpu: str = defaults.GPU, batch: int = defaults.BATCH, context: int = defaults.CONTEXT
) -> Plan:
    """Resolves `recipe`. Raises UserError for a model, layer or pattern that cannot be built."""
    config, source = find_config(recipe.model, recipe.revision)
    shapes = architecture(config, source)
    layers = tuple(_layer(linear, shapes, recipe) for linear in shapes.linears())
    _check_globs(recipe, [layer.shape.name for layer in layers])
    other = shapes.other_parameters * format_of(shapes.format).nbytes
    head = layers[-1].dense_bytes if shapes.tied_embeddings else 0  # counted with the embedding
    shared = head if layers[-1].shape.format == shapes.format else 0
    kv_bytes = shapes.kv_values_per_token * (1 if recipe.quantization.kv_cache != "none" else 2)
    dense_bytes = sum(layer.dense_bytes for layer in layers) + other - head
    built_bytes = sum(layer.built_bytes for layer in layers) + other - shared
    return Plan(
        model=recipe.model,
        architecture=shapes.name,
        format=recipe.format,
        backend=recipe.engine.backend,
        pattern=_pattern(recipe),
        layers=layers,
        dense_bytes=dense_bytes,
        built_bytes=built_bytes,
        activations=recipe.quantization.activations,
        kv_bytes_per_token=kv_bytes,
        kv_cache=_kv_cache(recipe, shapes, kv_bytes, built_bytes, roofline.gpu(gpu)),
        heads=shapes.num_heads,
        blocks=shapes.num_blocks,
        calibration_bytes=_calibration_bytes(recipe, shapes, layers, other),
        predicted=predict(gpu, shapes, layers, kv_bytes, batch, context),
        notes=notes(recipe, any(layer.shape.sparse for layer in layers), dense_bytes, built_bytes),
    )


def _kv_cache(recipe: Recipe, shapes: Architecture, kv_bytes: int, weights: int, card: roofline.Gpu) -> Capacity:
    """On one of the devices that an engine spans. Raises UserError for a budget that holds no sequence."""
    engine = recipe.engine
    devices = engine.tensor_parallel * engine.pipeline_parallel
    backend = "torch" if engine.backend == "auto" else engine.backend
    length = min(engine.max_seq_len, shapes.max_position_embeddings)
    each = -(-kv_bytes // devices)
    check_budget(engine, each, length)
    check_eviction(engine.kv_cache_budget, shapes.sliding_window, length)
    return capacity(engine, backend, each, round(card.memory_gb * 1e9) - weights // devices, length)


def matches(name: str, globs: Sequence[str]) -> bool:
    """Whether a module name matches any of the globs; a glob without a dot also matches the last part."""
    return any(fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(name.rsplit(".", 1)[-1], glob) for glob in globs)


def _layer(linear: LinearShape, shapes: Architecture, recipe: Recipe) -> LayerPlan:
    quantized = recipe.quantization.format != "none" and not matches(linear.name, recipe.quantization.exclude)
    stored = replace(linear, format=recipe.quantization.format) if quantized else linear
    decision, reason = _decision(stored, shapes, recipe)
    sparse = decision in ("prune", "candidate")
    fraction = (recipe.sparsity.fraction or 1.0) if recipe.sparsity and sparse else 0.0
    built = replace(stored, fraction=fraction, pattern=_pattern(recipe))
    built_bytes = round(built.nbytes) + (_scale_bytes(linear, recipe) if quantized else 0)
    return LayerPlan(built, round(linear.nbytes), built_bytes, decision, reason)


def _pattern(recipe: Recipe) -> Pattern:
    return recipe.sparsity.pattern if recipe.sparsity else TENSOR_CORE


def _scale_bytes(linear: LinearShape, recipe: Recipe) -> int:
    """FP8: one weight and one input scale, float32. INT8: a scale a row, the input's, and a 16-bit one a column."""
    if recipe.quantization.format == "fp8":
        return 8
    return 4 * linear.out_features + 4 + 2 * linear.in_features


def _decision(linear: LinearShape, shapes: Architecture, recipe: Recipe) -> tuple[Decision, str]:
    """Whether the layer is pruned, and why. Raises UserError where it cannot be."""
    if recipe.sparsity is None:
        return "no sparsity", "no sparsity in the recipe"
    if matches(linear.name, recipe.sparsity.exclude):
        return "excluded", "excluded by the recipe"
    if not matches(linear.name, recipe.sparsity.layers):
        return "not listed", "not among the recipe's layers"
    if linear.name == "lm_head" and shapes.tied_embeddings:
        raise UserError(
            "'lm_head' shares its weight with the embedding and cannot be pruned: add it to sparsity.exclude"
        )
    pattern, (_, group) = recipe.sparsity.pattern, keep_and_group(recipe.sparsity.pattern)
    alignment = 32 // format_of(linear.format).nbytes if pattern == TENSOR_CORE else group
    if linear.in_features % group or linear.in_features % alignment:
        cut = linear.in_features % group
        what = f"{pattern} needs a multiple of {group}" if cut else f"the kernels need a multiple of {alignment}"
        last = linear.name.rsplit(".", 1)[-1]
        raise UserError(
            f"'{linear.name}' has in_features {linear.in_features}, and {what}: "
            f"leave it dense with --set 'sparsity.exclude=[lm_head, {last}]'"
        )
    if recipe.sparsity.adapter_rank is not None:
        check_adapter_rank(recipe.sparsity.adapter_rank, linear)
    if recipe.sparsity.budget:
        return "candidate", "a candidate: selected under the budget during the build"
    if recipe.sparsity.fraction:
        return "candidate", f"a candidate: {recipe.sparsity.fraction:.0%} of all candidates' weights become {pattern}"
    return "prune", f"pruned to {pattern}"


def _check_globs(recipe: Recipe, names: list[str]) -> None:
    """Raises UserError for a glob of the recipe that matches no layer."""
    written = [("sparsity.layers", recipe.sparsity.layers)] if recipe.sparsity else []
    written += [("sparsity.exclude", recipe.sparsity.exclude)] if recipe.sparsity else []
    for key, globs in [*written, ("quantization.exclude", recipe.quantization.exclude)]:
        for glob in globs:
            if not any(matches(name, [glob]) for name in names):
                raise UserError(f"{key} '{glob}' matches no linear layer: layers are named like '{names[0]}'")


def _calibration_bytes(
    recipe: Recipe, shapes: Architecture, layers: tuple[LayerPlan, ...], other: int
) -> dict[str, int]:
    """Peak memory of each calibrating stage: one block with its statistics, or the whole model in its own dtype."""
    tokens = recipe.calibration.samples * recipe.calibration.sequence_length
    estimate: dict[str, int] = {}
    if recipe.sparsity:
        block = sum(4 * layer.shape.numel for layer in layers if ".layers.0." in layer.shape.name)
        inputs = (shapes.hidden_size, shapes.num_heads * shapes.head_dim, shapes.hidden_size, shapes.intermediate_size)
        hessians = sum(2 * 4 * width * width for width in inputs)  # H and the mixed target's, float32
        activations = 2 * 2 * 4 * tokens * shapes.hidden_size  # of the dense and the pruned model, in and out
        estimate["sparsify"] = block + hessians + activations
    if recipe.quantization.wanted:
        largest = 4 * max(layer.shape.numel for layer in layers)
        estimate["quantize"] = sum(layer.dense_bytes for layer in layers) + other + largest
    return estimate


def predict(
    gpu: str, shapes: Architecture, layers: Sequence[LayerPlan], kv_bytes: int, batch: int, context: int
) -> dict[str, Any]:
    """Decode and prefill ceilings of the dense model and of the build on `gpu`. Predicted, never measured.

    The embedding is left out: decode reads one row of it a sequence.
    """
    card = roofline.gpu(gpu)
    built = _products(layer.shape for layer in layers)
    dense = _products(replace(layer.shape, format=shapes.format, fraction=0.0) for layer in layers)
    kv_dense = shapes.kv_values_per_token * 2
    return {
        "gpu": card.name,
        "batch": batch,
        "context": context,
        "launch_bound": _launch_bound(card, batch, built),
        "decode": {
            "dense": roofline.decode_ceiling(card, dense, batch, context, kv_dense),
            "built": roofline.decode_ceiling(card, built, batch, context, kv_bytes),
        },
        "prefill": {
            "dense": roofline.prefill_ceiling(card, dense, context),
            "built": roofline.prefill_ceiling(card, built, context),
        },
    }


def _products(layers: Iterable[LinearShape]) -> list[LinearShape]:
    """The GEMMs that an engine runs: layers of one input are one product where their format and fraction agree."""
    products: dict[tuple[object, ...], LinearShape] = {}
    for layer in layers:
        name = fused_name(layer.name)
        key = (name, layer.in_features, layer.format, layer.fraction)
        rows = layer.out_features + (products[key].out_features if key in products else 0)
        products[key] = roofline.on_tensor_cores(replace(layer, name=name, out_features=rows))
    return list(products.values())


def _launch_bound(card: roofline.Gpu, tokens: int, products: Sequence[LinearShape]) -> dict[str, Any]:
    """How many sparse products of one decode step pruning cannot shorten: their dense product takes one launch."""
    sparse = [product for product in products if product.sparse and not card.refuses(product)]
    times = [roofline.gemm_time(card, tokens, replace(product, fraction=0.0)) for product in sparse]
    bound = sum(time.bound == "launch" for time in times)
    return {"products": bound, "of": len(sparse), "kernel_us": round(card.least_kernel_seconds * 1e6, 3)}
