"""Which kernel each sparse layer runs on, measured on this machine: its GPU, or its CPU for the torch backend.

The torch and pytorch backends obey these tactics. For the tensorrt backend they answer one question: TensorRT times its
own sparse tactics against its dense ones by itself, but cannot time our plugin against either.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from builder.config import EngineConfig
from builder.engines.product_shapes import DTYPES, hybrids, kernel_format, shape, shape_on_cpu
from builder.planning import sharding
from plugins.common.defaults import SPARSE_KERNELS
from plugins.common.errors import UserError
from plugins.common.files import sha256
from plugins.common.linear_shape import LinearShape
from plugins.common.nvidia_smi import gpus
from plugins.common.patterns import TENSOR_CORE
from plugins.common.progress import Progress, silent

if TYPE_CHECKING:
    from builder.checkpoint.reading import LayerFacts
    from plugins.autotune.choice import Hybrid
    from plugins.sparsity.segments import Axis


def can_measure_cpu() -> bool:
    """Whether there is no GPU here, and our CPU kernels can be loaded or built."""
    if gpus():
        return False
    from plugins.libtwofour import cpu

    try:
        cpu.load()
    except UserError:
        return False
    return True


def can_measure() -> bool:
    """Whether there is a GPU that torch can use."""
    if not gpus():
        return False
    import torch

    return bool(torch.cuda.is_available())


def fingerprint(on_cpu: bool = False) -> dict[str, Any]:
    """What measured tactics depend on besides the layers, for a stage's key. Empty where nothing can be measured.

    `on_cpu`: whether a CPU's times count where there is no GPU.
    """
    if not can_measure():
        return _cpu_fingerprint() if on_cpu and can_measure_cpu() else {}
    from plugins.autotune import reuse
    from plugins.libtwofour import bindings

    gpu = gpus()[0]
    try:
        versions = reuse.versions(bindings.context(0).info()) | {"library": sha256(bindings.path())}
    except UserError as error:
        versions = {"none": str(error)}
    return {"kernels": {"gpu": gpu.name, "sm": gpu.sm, "driver": gpu.driver, **versions}}


def _cpu_fingerprint() -> dict[str, Any]:
    from plugins.autotune import cpu_bench

    return {"kernels": {**cpu_bench.device_facts(), **cpu_bench.versions()}}


def cpu_tactics(
    layers: Sequence[LayerFacts], config: EngineConfig, dtype: str, progress: Progress = silent
) -> dict[str, Any]:
    """tactics.json of a checkpoint's layers for the torch engine on this machine's CPU."""
    from plugins.autotune import cpu_bench, tuner

    formats = cpu_bench.DTYPES if dtype == "bfloat16" else {}
    sparse = [
        layer
        for layer in layers
        if layer.shape.sparse
        and kernel_format(layer.shape, dtype) in formats
        and (layer.segments is None or layer.segments.in_two)
    ]
    most = max(config.max_num_tokens, config.max_batch_size)
    buckets = [tokens for tokens in cpu_bench.BUCKETS if tokens <= most]
    timed = tuner.tune_cpu({layer.shape.name: shape_on_cpu(layer, dtype) for layer in sparse}, buckets, progress)
    return _with_all_layers(timed, layers, f"stays dense: no CPU kernel takes it in a model of {dtype}")


def tactics(
    layers: Sequence[LayerFacts],
    config: EngineConfig,
    dtype: str,
    fused: bool = False,
    in_part: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """tactics.json of a checkpoint's layers, timed at every number of tokens that the engine may be given.

    `dtype` is the model's own, as its config.json names it. `fused`: as the torch engine and TensorRT-LLM's PyTorch
    backend run them, q, k and v, and gate and up, as one product of one rank's shard. `in_part`: layers that are 2:4 in
    part too, as the torch engine runs them. Raises UserError where sparse kernels cannot run: the build would be dense.
    """
    from plugins.autotune import tuner

    whole = [layer.shape for layer in layers if layer.shape.sparse and layer.segments is None]
    sparse = {layer.name: layer for layer in whole} if dtype in DTYPES else {}
    shapes: dict[str, LinearShape | Hybrid] = {
        name: shape(layer, config.tensor_parallel if fused else 1, dtype, sparse if fused else {})
        for name, layer in sparse.items()
    }
    if in_part and dtype in DTYPES:
        shapes |= hybrids(layers, dtype)
    most = max(config.max_num_tokens, config.max_batch_size)
    table = _tune(shapes, (*(tokens for tokens in tuner.BUCKETS if tokens < most), most), dtype, progress)
    untimed = f"stays dense: the model computes in {dtype}, and the sparse kernels in 16 bit"
    return _with_all_layers(table, layers, untimed)


def _with_all_layers(table: dict[str, Any], layers: Sequence[LayerFacts], untimed: str) -> dict[str, Any]:
    """Measured tactics with the layers that were not timed, in the checkpoint's order."""
    from plugins.autotune.tactics import Tactics

    entries = {}
    for layer in layers:
        whole = layer.shape
        timed = table["layers"].get(whole.name)
        why = untimed if whole.sparse else f"dense: the weight is not {whole.pattern}"
        why = f"{whole.pattern} in part: not timed" if layer.segments else why
        entries[whole.name] = {
            **whole.facts,
            "fraction": whole.fraction,
            "pattern": whole.pattern,
            "reason": _reason(layer, timed) if timed else why,
            "buckets": timed["buckets"] if timed else [],
            "products": timed.get("products") if timed else None,
        }
    checked: dict[str, Any] = Tactics.model_validate({**table, "layers": entries}).model_dump(mode="json")
    return checked


def _reason(layer: LayerFacts, timed: Mapping[str, Any]) -> str:
    reason = str(timed["reason"])
    if layer.segments is None:
        return reason
    return f"{layer.shape.pattern} in part ({layer.segments.fraction:.0%}): {reason}"


def seconds_saved(layers: Iterable[LinearShape], tokens: int, dtype: str) -> Mapping[str, float] | None:
    """Seconds that 2:4 saves each layer at `tokens` tokens; 0 where dense is faster. None where none can be timed."""
    if not can_measure() or dtype not in DTYPES:
        return None
    buckets = _whole_layers(tuple((layer.name, shape(layer, 1, dtype)) for layer in layers), tokens, dtype)
    return {
        name: 0.0 if _is_dense(bucket) or not bucket["ratio"] else (bucket["dense_us"] - bucket["sparse_us"]) * 1e-6
        for name, bucket in buckets.items()
    }


@lru_cache(maxsize=4)
def _whole_layers(shapes: tuple[tuple[str, LinearShape], ...], tokens: int, dtype: str) -> dict[str, dict[str, Any]]:
    """The times of each whole layer at `tokens` tokens, by its name."""
    return {name: timed["buckets"][0] for name, timed in _tune(dict(shapes), (tokens,), dtype)["layers"].items()}


def seconds_of_second_product(layers: Iterable[LinearShape], tokens: int, dtype: str) -> Mapping[str, float] | None:
    """Seconds that a layer, half of it 2:4, takes beyond the mean of dense and 2:4; None where none can be timed."""
    if not can_measure() or dtype not in DTYPES:
        return None
    return _second_products(tuple((layer.name, shape(layer, 1, dtype)) for layer in layers), tokens, dtype)


@lru_cache(maxsize=4)
def _second_products(shapes: tuple[tuple[str, LinearShape], ...], tokens: int, dtype: str) -> dict[str, float]:
    from plugins.autotune.choice import Hybrid
    from plugins.sparsity.segments import ALIGNMENT

    halves: dict[str, LinearShape | Hybrid] = {}
    for name, whole in shapes:
        axis: Axis = "inputs" if sharding.is_row_parallel(name) else "rows"
        half = (whole.in_features if axis == "inputs" else whole.out_features) // 2 // ALIGNMENT * ALIGNMENT
        if half:
            halves[name] = Hybrid.of(whole, axis, half)
    both = _tune(halves, (tokens,), dtype)["layers"]
    alone = _whole_layers(shapes, tokens, dtype)
    seconds = {}
    for name in halves:
        ends = [us for us in (alone[name]["dense_us"], alone[name]["sparse_us"]) if us is not None]
        seconds[name] = max(0.0, both[name]["buckets"][0]["sparse_us"] - sum(ends) / len(ends)) * 1e-6
    return seconds


def measure(layers: Iterable[LinearShape], config: EngineConfig, dtype: str) -> dict[str, float]:
    """Dense over sparse time of each 2:4 layer; a ratio above 1 means ours is faster. Nothing where none can be timed.

    `dtype` ("bf16" or "fp16") is what the layers put out.
    """
    if not gpus():
        return {}
    from plugins.autotune import tuner

    names = {short: name for name, short in DTYPES.items()}
    shapes = {layer.name: shape(layer, config.tensor_parallel, names[dtype]) for layer in layers if layer.sparse}
    try:
        return ratios(tuner.tune(shapes, buckets=(config.max_batch_size,), out=dtype), config.max_batch_size)
    except UserError:  # no libtwofour, or a GPU that it was not built for: TensorRT decides alone
        return {}


def ratios(tactics: Mapping[str, Any], tokens: int) -> dict[str, float]:
    """Of a measured tactics.json: dense over sparse at `tokens`, of the layers where a sparse kernel was kept."""
    kept = {}
    for name, layer in tactics["layers"].items():
        bucket = next((bucket for bucket in layer["buckets"] if bucket["tokens"] >= tokens), None)
        if bucket and bucket["measured"] and bucket["ratio"] and not _is_dense(bucket):
            kept[name] = float(bucket["ratio"])
    return kept


def _tune(
    shapes: Mapping[str, LinearShape | Hybrid], buckets: Sequence[int], dtype: str, progress: Progress = silent
) -> dict[str, Any]:
    """The tuner's tactics; without a layer, this GPU's facts alone. Raises UserError that names the GPU."""
    from plugins.autotune import tuner
    from plugins.libtwofour import bindings

    gpu = gpus()[0]
    if not shapes:
        device = {"name": gpu.name, "sm": gpu.sm, "driver": gpu.driver}
        return {"device": device, "source": "measured", "gpu": gpu.name, "versions": {}, "layers": {}}
    patterns = sorted({shape.pattern for shape in shapes.values()})
    try:
        if TENSOR_CORE in patterns:
            bindings.version("cusparselt")  # raises where it is missing or too old: dense would win by default
        return tuner.tune(shapes, buckets, progress=progress, out=DTYPES[dtype])
    except UserError as error:
        raise UserError(
            f"the {' and '.join(patterns)} kernels of this machine's {gpu.name} cannot be timed: {error}"
        ) from None


def _is_dense(bucket: Mapping[str, Any]) -> bool:
    return bucket["kernel"] not in SPARSE_KERNELS
