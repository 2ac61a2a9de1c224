"""Recipe and `config.json` -> plan: the format and pattern of each linear layer, bytes, memory and ceilings.

Reads no weights and imports no torch. All times are predicted, from the roofline of a named GPU.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from benchmarks.roofline import roofline
from builder.planning.compatibility import features_of
from builder.planning.hub import find_config
from builder.planning.kv_cache import Capacity, capacity, check_budget, check_eviction
from builder.planning.model_config import Architecture, Linear, architecture
from builder.planning.notes import notes
from builder.recipe import Recipe
from calibration.config import check_adapter_rank
from plugins.common import defaults
from plugins.common.errors import UserError
from plugins.common.formats import OF_DTYPE, format_of
from plugins.common.fused_layers import fused_name
from plugins.common.patterns import TENSOR_CORE, Pattern, keep_and_group

Decision = Literal["prune", "candidate", "excluded", "not listed", "no sparsity"]


@dataclass(frozen=True)
class LayerPlan:
    """The plan for one linear layer. Bytes are of its weight, with scales."""

    name: str
    out_features: int
    in_features: int
    format: str
    sparse: bool  # a candidate for pruning
    fraction: float  # of the weight that is expected to become sparse
    dense_bytes: int
    built_bytes: int
    decision: Decision
    reason: str
    pattern: Pattern = TENSOR_CORE  # of layers to prune

    @property
    def bytes_saved_by_pruning(self) -> int:
        """Bytes that pruning all of the layer saves in its number format; 0 for a dense layer."""
        shape = (self.out_features, self.in_features, self.format)
        return round(roofline.weight_bytes(*shape) - roofline.weight_bytes(*shape, self.sparse, self.pattern))


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
    def sparse_layers(self) -> list[str]:
        return [layer.name for layer in self.layers if layer.sparse]

    @property
    def quantized_layers(self) -> list[str]:
        return [layer.name for layer in self.layers if layer.format in ("int8", "fp8")]

    @property
    def features(self) -> tuple[str, ...]:
        """What not every backend has (builder/planning/compatibility.py)."""
        pattern = self.pattern if self.sparse_layers else None
        return features_of(self.activations == "per_token", "lm_head" in self.quantized_layers, pattern)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(
    recipe: Recipe, gpu: str = defaults.GPU, batch: int = defaults.BATCH, context: int = defaults.CONTEXT
) -> Plan:
    """Resolves `recipe`. Raises UserError for a model, layer or pattern that cannot be built."""
    config, source = find_config(recipe.model, recipe.revision)
    shapes = architecture(config, source)
    layers = tuple(_layer(linear, shapes, recipe) for linear in shapes.linears())
    _check_globs(recipe, [layer.name for layer in layers])
    other = shapes.other_parameters * format_of(_dense_format(shapes)).nbytes
    head = layers[-1].dense_bytes if shapes.tied_embeddings else 0  # counted with the embedding
    shared = head if layers[-1].format == _dense_format(shapes) else 0
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
        notes=notes(recipe, any(layer.sparse for layer in layers), dense_bytes, built_bytes),
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


def _layer(linear: Linear, shapes: Architecture, recipe: Recipe) -> LayerPlan:
    shape, dense_format = (linear.out_features, linear.in_features), _dense_format(shapes)
    quantized = recipe.quantization.format != "none" and not matches(linear.name, recipe.quantization.exclude)
    number_format = recipe.quantization.format if quantized else dense_format
    decision, reason = _decision(linear, shapes, recipe, number_format)
    sparse = decision in ("prune", "candidate")
    fraction = (recipe.sparsity.fraction or 1.0) if recipe.sparsity and sparse else 0.0
    built = roofline.weight_bytes(*shape, number_format, fraction, _pattern(recipe))
    return LayerPlan(
        name=linear.name,
        out_features=linear.out_features,
        in_features=linear.in_features,
        format=number_format,
        sparse=sparse,
        fraction=fraction,
        dense_bytes=round(roofline.weight_bytes(*shape, dense_format)),
        built_bytes=round(built) + (_scale_bytes(linear, recipe) if quantized else 0),
        decision=decision,
        reason=reason,
        pattern=_pattern(recipe),
    )


def _pattern(recipe: Recipe) -> Pattern:
    return recipe.sparsity.pattern if recipe.sparsity else TENSOR_CORE


def _dense_format(shapes: Architecture) -> str:
    return OF_DTYPE.get(shapes.dtype, "bf16")


def _scale_bytes(linear: Linear, recipe: Recipe) -> int:
    """FP8: one weight and one input scale, float32. INT8: a scale a row, the input's, and a 16-bit one a column."""
    if recipe.quantization.format == "fp8":
        return 8
    return 4 * linear.out_features + 4 + 2 * linear.in_features


def _decision(linear: Linear, shapes: Architecture, recipe: Recipe, number_format: str) -> tuple[Decision, str]:
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
    alignment = 32 // format_of(number_format).nbytes if pattern == TENSOR_CORE else group
    if linear.in_features % group or linear.in_features % alignment:
        cut = linear.in_features % group
        what = f"{pattern} needs a multiple of {group}" if cut else f"the kernels need a multiple of {alignment}"
        last = linear.name.rsplit(".", 1)[-1]
        raise UserError(
            f"'{linear.name}' has in_features {linear.in_features}, and {what}: "
            f"leave it dense with --set 'sparsity.exclude=[lm_head, {last}]'"
        )
    if recipe.sparsity.adapter_rank is not None:
        check_adapter_rank(recipe.sparsity.adapter_rank, linear.name, linear.out_features, linear.in_features)
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
        block = sum(4 * layer.out_features * layer.in_features for layer in layers if ".layers.0." in layer.name)
        inputs = (shapes.hidden_size, shapes.num_heads * shapes.head_dim, shapes.hidden_size, shapes.intermediate_size)
        hessians = sum(2 * 4 * width * width for width in inputs)  # H and the mixed target's, float32
        activations = 2 * 2 * 4 * tokens * shapes.hidden_size  # of the dense and the pruned model, in and out
        estimate["sparsify"] = block + hessians + activations
    if recipe.quantization.wanted:
        estimate["quantize"] = (
            sum(layer.dense_bytes for layer in layers)
            + other
            + 4 * max(layer.out_features * layer.in_features for layer in layers)
        )
    return estimate


def predict(
    gpu: str, shapes: Architecture, layers: Sequence[LayerPlan], kv_bytes: int, batch: int, context: int
) -> dict[str, Any]:
    """Decode and prefill ceilings of the dense model and of the build on `gpu`. Predicted, never measured.

    The embedding is left out: decode reads one row of it a sequence.
    """
    card = roofline.gpu(gpu)
    dense_format = _dense_format(shapes)
    built, dense = _products(layers), _products(layers, dense_format)
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


def _products(layers: Sequence[LayerPlan], dense_format: str | None = None) -> list[roofline.Layer]:
    """The GEMMs that an engine runs: layers with the same input are one product where their format and pattern agree.

    With `dense_format`, those of the dense model.
    """
    products: dict[tuple[object, ...], roofline.Layer] = {}
    for layer in layers:
        number_format, sparse = (dense_format, 0.0) if dense_format else (layer.format, layer.fraction)
        key = (fused_name(layer.name), layer.in_features, number_format, sparse)
        before = products[key].out_features if key in products else 0
        products[key] = roofline.Layer(
            before + layer.out_features,
            layer.in_features,
            roofline.tensor_core_format(number_format),
            sparse,
            last_token=layer.name == "lm_head",  # prefill needs the logits of each prompt's last token only
            pattern=layer.pattern,
        )
    return list(products.values())


def _launch_bound(card: roofline.Gpu, tokens: int, products: Sequence[roofline.Layer]) -> dict[str, Any]:
    """How many sparse products of one decode step pruning cannot shorten: their dense product takes one launch."""
    sparse = [x for x in products if x.sparse and not card.refuses(x.format, x.sparse, x.pattern)]
    times = [roofline.gemm_time(card, tokens, x.out_features, x.in_features, x.format) for x in sparse]
    bound = sum(time.bound == "launch" for time in times)
    return {"products": bound, "of": len(sparse), "kernel_us": round(card.least_kernel_seconds * 1e6, 3)}
