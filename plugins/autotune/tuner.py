"""Chooses each layer's kernel at each number of tokens by timing them on this machine. Needs torch alone.

For each unique shape and bucket of tokens, weights cold: on a GPU (autotune/timing.py) cuBLASLt on the dense weight
(the best of our search and of torch's own call), for 2:4 cuSPARSELt, and the pattern's skinny kernel up to 64 tokens;
on a CPU (cpu_bench.py) our dense kernel, torch's own product and our sparse kernel. A sparse kernel is kept where it is
faster than dense by at least LEAST_GAIN. A layer on which none wins stays dense, with the reason in its entry.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch

from plugins.autotune import search, timing
from plugins.autotune.bench import Bench, HybridBench, workspace_of
from plugins.autotune.choice import Hybrid, Timing, choose, choose_hybrid, chosen_us, entry, hold_once
from plugins.autotune.reuse import versions
from plugins.common import numerics
from plugins.common.defaults import MAX_SKINNY_TOKENS, SPARSE_KERNELS
from plugins.common.errors import UserError
from plugins.common.linear_shape import LinearShape
from plugins.common.patterns import TENSOR_CORE, cpu_kernel, skinny_kernel
from plugins.common.progress import Progress, silent
from plugins.libtwofour import bindings, hybrid_ops

log = logging.getLogger(__name__)

BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
PADDED = (16, 32)  # tokens that a dense FP8 product is also timed with
WORKSPACE = 128 << 20  # in addition to the raw sums that our epilogue finishes


Timed = TypeVar("Timed")
Timer = Callable[[Any, str, int], Timing]
"""Times a kernel on a bench (Bench or CpuBench) at a number of tokens."""
MakeBench = Callable[[LinearShape], Bench]


def tune(
    layers: Mapping[str, LinearShape | Hybrid],
    buckets: Sequence[int] = BUCKETS,
    device: int = 0,
    progress: Progress = silent,
    out: str = "bf16",
) -> dict[str, Any]:
    """tactics.json of sparse `layers` (module names and shapes) measured on a CUDA device.

    `out` is what the layers put out, "bf16" or "fp16". Dense and 2:4 kernels are timed, whatever a shape's fraction.
    Raises UserError where there is no GPU with sparse tensor cores, no library, or not the memory for one layer.
    """
    info = bindings.context(device).info()
    unique = list(dict.fromkeys(layers.values()))
    measured: dict[LinearShape | Hybrid, list[dict[str, Any]]] = {}
    dense: dict[LinearShape, list[Timing]] = {}  # hybrid layers share them: a whole layer of one size, at any share
    facts = timing.device_facts(device)
    most_tokens, place = max(*buckets, *PADDED), torch.device("cuda", device)

    def bench(shape: LinearShape) -> Bench:
        return Bench(shape, place, most_tokens, info.l2_bytes, out)

    def hybrid_bench(cut: hybrid_ops.Cut, shape: LinearShape) -> Bench:
        return HybridBench(shape, place, most_tokens, info.l2_bytes, out, cut=cut)

    for done, shape in enumerate(unique):
        progress("time kernels", done, len(unique))
        given = (sorted(buckets), bench)
        if isinstance(shape, Hybrid):
            for part in {shape.rest, shape.whole} - dense.keys():
                dense[part] = _measure_dense(part, *given)
            cut = hybrid_ops.Cut(shape.pattern, shape.axis, shape.size)
            one = _measure_one_launch(shape.whole, cut, sorted(buckets), partial(hybrid_bench, cut))
            own = _measure(shape.sparse, *given)
            both = [
                replace(rest, us=rest.us + chosen_us(bucket))
                for bucket, rest in zip(own, dense[shape.rest], strict=True)
            ]
            measured[shape] = choose_hybrid(own, both, dense[shape.whole], one)
        else:
            measured[shape] = _measure(shape, *given)
        clocks = timing.device_facts(device)["clocks"]  # while the GPU is still warm
        facts["clocks"] = {name: max(clock, facts["clocks"].get(name, 0.0)) for name, clock in clocks.items()}
    progress("time kernels", len(unique), len(unique))
    return {
        "device": facts,
        "source": "measured",
        "gpu": facts["name"],
        "versions": versions(info),
        "layers": {name: entry(shape, measured[shape], facts["name"]) for name, shape in layers.items()},
    }


def _measure(shape: LinearShape, buckets: Sequence[int], make: MakeBench) -> list[dict[str, Any]]:
    """The shape's buckets."""
    return _timed(shape, lambda bench: [bucket_of(bench, tokens, time_kernel) for tokens in buckets], make)


def _timed(shape: LinearShape, times: Callable[[Bench], list[Timed]], make: MakeBench) -> list[Timed]:
    """The `times` of the shape's operands, which are freed afterwards."""
    try:
        return times(make(shape))
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"GPU memory ran out while timing {shape}: free memory and build again ({_line(error)})"
        ) from None
    finally:
        torch.cuda.empty_cache()


def _measure_dense(shape: LinearShape, buckets: Sequence[int], make: MakeBench) -> list[Timing]:
    """The dense part of a hybrid layer, timed by itself, as the engine launches its parts in turn."""
    return _timed(shape, lambda bench: [_dense_time(bench, tokens) for tokens in buckets], make)


def _measure_one_launch(
    shape: LinearShape, cut: hybrid_ops.Cut, buckets: Sequence[int], make: MakeBench
) -> list[Timing | None]:
    """Both parts of a hybrid layer in one launch; None where no kernel takes them."""
    if not hybrid_ops.supports(cut.pattern):
        return [None] * len(buckets)
    return _timed(shape, lambda bench: [_one_launch_time(bench, cut.kernel, tokens) for tokens in buckets], make)


def _one_launch_time(bench: Bench, kernel: str, tokens: int) -> Timing | None:
    try:
        return time_kernel(bench, kernel, tokens) if tokens <= MAX_SKINNY_TOKENS else None
    except UserError as error:
        log.info("%s at %d tokens excludes %s: %s", bench.shape, tokens, kernel, _line(error))
        return None


def _dense_time(bench: Bench, tokens: int) -> Timing:
    """By the product that the engine has for dense weights: cuBLASLt for those of 8 bit, torch for others."""
    return time_kernel(bench, "cublaslt" if bench.shape.format in ("int8", "fp8") else "torch", tokens)


def search_dense(shapes: Iterable[LinearShape], buckets: Sequence[int], device: int = 0) -> None:
    """Leaves with libtwofour the fastest dense algorithms of `shapes`; a shape that it refuses keeps its defaults."""
    l2_bytes = bindings.context(device).info().l2_bytes
    for shape in shapes:
        bench = Bench(shape, torch.device("cuda", device), max(buckets), l2_bytes)
        for tokens in buckets:
            try:
                time_kernel(bench, "cublaslt", tokens)
            except UserError as error:
                log.info("%s at %d tokens keeps cuBLASLt's default: %s", shape, tokens, error)
    torch.cuda.empty_cache()


def tune_cpu(
    layers: Mapping[str, LinearShape | Hybrid],
    buckets: Sequence[int] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """tactics.json of sparse `layers` measured on this machine's CPU, with the threads that torch uses.

    Raises UserError where libtwofour_cpu can be neither loaded nor built.
    """
    from plugins.autotune import cpu_bench

    facts, made_for = cpu_bench.device_facts(), cpu_bench.versions()
    buckets = sorted(buckets or cpu_bench.BUCKETS)
    unique = list(dict.fromkeys(layers.values()))
    measured: dict[LinearShape | Hybrid, list[dict[str, Any]]] = {}
    for done, shape in enumerate(unique):
        progress("time kernels", done, len(unique))
        measured[shape] = _measure_on_cpu(shape, buckets)
    progress("time kernels", len(unique), len(unique))
    name = facts["name"]
    return {
        "device": facts,
        "source": "measured",
        "gpu": name,
        "versions": made_for,
        "layers": {layer: entry(shape, measured[shape], name) for layer, shape in layers.items()},
    }


def _measure_on_cpu(shape: LinearShape | Hybrid, buckets: Sequence[int]) -> list[dict[str, Any]]:
    """The shape's buckets. Both parts of a hybrid layer are one call, and are timed as one."""
    from plugins.autotune.cpu_bench import CpuBench, times_of_hybrid
    from plugins.linear.cpu_linear import DENSE

    if isinstance(shape, LinearShape):
        bench = CpuBench(shape, buckets[-1])
        kernels = bench.kernels()
        return hold_once([bucket_of(bench, tokens, _time_on_cpu, kernels) for tokens in buckets])
    sparse, rest, whole = (CpuBench(part, buckets[-1]) for part in (shape.sparse, shape.rest, shape.whole))
    own = hold_once([bucket_of(sparse, tokens, _time_on_cpu, (DENSE, cpu_kernel(shape.pattern))) for tokens in buckets])
    both, dense = list[Timing](), list[Timing]()
    for bucket in own:
        kernel = bucket["kernel"] if bucket["kernel"] in SPARSE_KERNELS else DENSE
        parts, alone = times_of_hybrid(sparse, rest, whole, shape.axis, kernel, bucket["tokens"])
        both.append(Timing(kernel, parts))
        dense.append(Timing(DENSE, alone))
    return choose_hybrid(own, both, dense)


def _time_on_cpu(bench: Any, kernel: str, tokens: int) -> Timing:
    return Timing(kernel, bench.microseconds(kernel, tokens))


def bucket_of(bench: Any, tokens: int, timer: Timer, kernels: Sequence[str] | None = None) -> dict[str, Any]:
    """Times `kernels` (None: a GPU's) at `tokens` and returns the bucket of tactics.json.

    Kernels that cannot run are left out.
    """
    timings = []
    for kernel in kernels or kernels_of(bench.shape.pattern, tokens):
        try:
            timings.append(time_padded(bench, kernel, tokens, timer))
        except torch.OutOfMemoryError:
            raise
        except (UserError, RuntimeError) as error:  # RuntimeError: torch's own product refuses some shapes
            log.info("%s at %d tokens excludes %s: %s", bench.shape, tokens, kernel, _line(error))
    return choose(tokens, timings)


def kernels_of(pattern: str, tokens: int) -> tuple[str, ...]:
    """A GPU's kernels that may multiply a weight of `pattern`, dense ones first. cuSPARSELt takes 2:4 alone."""
    wide = ("cusparselt",) if pattern == TENSOR_CORE else ()
    skinny = (skinny_kernel(pattern),) if tokens <= MAX_SKINNY_TOKENS else ()
    return ("cublaslt", "torch", *wide, *skinny)


def time_padded(bench: Any, kernel: str, tokens: int, timer: Timer) -> Timing:
    """The kernel's time at `tokens`; of a dense FP8 product the best of these and of tokens padded to 16 and 32.

    cuBLASLt is often faster with more tokens there (vllm-project/vllm#4691); the padding itself is not timed.
    """
    best = timer(bench, kernel, tokens)
    if kernel in ("cublaslt", "torch") and bench.shape.format == "fp8":
        for padded in PADDED:
            if padded > tokens:
                other = timer(bench, kernel, padded)
                if other.us < best.us:
                    note = f"fastest with its tokens padded to {padded}"
                    best = replace(best, us=other.us, notes=(*best.notes, note))
    return best


def time_kernel(bench: Bench, kernel: str, tokens: int) -> Timing:
    """Searches the kernel's algorithm for this bucket and times it. Raises UserError where it cannot run."""
    x_MK = bench.x[:tokens]
    if kernel == "torch":
        weights = bench.copies("cublaslt")
        multiply = torch_dense(bench, x_MK)
        return Timing(kernel, timing.measure(lambda i: multiply(weights[i]), len(weights)).us)
    weights = bench.copies(kernel)
    context = bindings.context(bench.device.index)
    s = bench.shape
    problem = bench.problem(kernel, x_MK)
    y_MN = torch.empty(tokens, s.out_features, dtype=bench.out_dtype, device=bench.device)
    sums = 4 * tokens * s.out_features if bench.channel_scales is not None or s.format == "int8" else 0
    workspace, notes = workspace_of(bench.device, WORKSPACE + sums)
    place = (workspace.data_ptr(), workspace.nbytes)

    def call(i: int) -> None:
        stream = torch.cuda.current_stream(bench.device).cuda_stream
        context.matmul(problem, x_MK.data_ptr(), weights[i].data_ptr(), y_MN.data_ptr(), place, stream)

    result = search.search(context, problem, call, len(weights), workspace.nbytes)
    if result.over_workspace:
        notes = (*notes, f"{result.over_workspace} algorithms need more than {workspace.nbytes >> 20} MiB of workspace")
    for note in notes:
        log.info("%s at %d tokens, %s: %s", s, tokens, kernel, note)
    return Timing(kernel, result.us, result.algorithm, notes)


def torch_dense(bench: Bench, x_MK: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """torch's own dense product of the same problem: linear, _int_mm or _scaled_mm."""
    if bench.shape.format == "int8":
        factor = (
            torch.full((1,), bench.scale, device=bench.device) if bench.channel_scales is None else bench.channel_scales
        )
        return lambda w_NK: numerics.int8_linear(x_MK, w_NK, factor).to(bench.out_dtype)
    if bench.shape.format == "fp8":
        scale = torch.tensor(bench.scale, device=bench.device)
        return lambda w_NK: numerics.fp8_linear(x_MK, w_NK, scale, bench.out_dtype)
    return lambda w_NK: torch.nn.functional.linear(x_MK, w_NK)


def _line(error: Exception) -> str:
    """An error's first line; its kind where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)
