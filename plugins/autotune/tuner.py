"""Chooses each layer's kernel at each number of tokens by timing them on this machine. Needs torch alone.

For each unique shape and bucket of tokens, weights cold: on a GPU (autotune/timing.py) cuBLASLt on the dense weight
(the best of our search and of torch's own call), cuSPARSELt, and the skinny kernel up to 64 tokens; on a CPU
(cpu_bench.py) our dense kernel, torch's own product and our 2:4 kernel. A sparse kernel is kept where it is faster than
dense by at least LEAST_GAIN. A layer on which none wins stays dense, and its entry says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from plugins.autotune import search, timing
from plugins.common import numerics
from plugins.common.defaults import LEAST_GAIN, MAX_SKINNY_TOKENS, SPARSE_KERNELS
from plugins.common.errors import UserError
from plugins.common.progress import Progress
from plugins.libtwofour import bindings, torch_ops

log = logging.getLogger(__name__)

BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
HELD_ONCE = 0.15  # of time: what a second, dense copy of a weight must save on a CPU
PADDED = (16, 32)  # tokens that a dense FP8 product is also timed with
WORKSPACE = 128 << 20
# of dense kernels in tactics.json; sparse kernels go by their own
NAMES = {"cublaslt": "dense-cublaslt", "torch": "dense-torch", "cpu-dense": "dense-cpu"}
OURS = ("cublaslt", "cpu-dense")  # what a layer can run dense


@dataclass(frozen=True)
class Shape:
    """A layer as far as its speed depends on it."""

    out_features: int
    in_features: int
    format: str  # fp16, bf16, int8, fp8
    per_channel: bool = False  # one weight scale a row
    out: str = "bf16"

    def __str__(self) -> str:
        return f"{self.format} [{self.out_features}, {self.in_features}]"


@dataclass(frozen=True)
class Timing:
    """A kernel's time for one call in microseconds, the algorithm it ran, and what a reader should know of it."""

    kernel: str
    us: float
    algorithm: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()


@dataclass
class Bench:
    """Operands of one shape on the GPU, made once for all buckets and freed with it."""

    shape: Shape
    device: torch.device
    most_tokens: int
    l2_bytes: int
    weights: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        s, dtype = self.shape, torch_ops.DTYPES[self.shape.format]
        self.dense = timing.random_2to4(s.out_features, s.in_features, dtype, self.device)
        self.x = timing.random_operand(self.most_tokens, s.in_features, dtype, self.device)
        self.out_dtype = dtype if dtype in (torch.float16, torch.bfloat16) else torch_ops.DTYPES[s.out]
        self.scale = 1.0 if self.out_dtype == dtype else 2.0**-10
        rows = torch.full((s.out_features,), self.scale, device=self.device)
        self.channel_scales = rows if s.per_channel and self.out_dtype != dtype else None

    def copies(self, kernel: str) -> list[torch.Tensor]:
        """As many copies of the prepared weight as defeat the L2 cache."""
        if kernel not in self.weights:
            first = torch_ops.prepare(self.dense, kernel)
            count = timing.copies_to_fill(first.nbytes, self.l2_bytes)
            self.weights[kernel] = [first, *(first.clone() for _ in range(count - 1))]
        return self.weights[kernel]


Timer = Callable[[Any, str, int], Timing]
"""Times a kernel on a bench (Bench or CpuBench) at a number of tokens."""


def tune(
    layers: Mapping[str, Shape],
    buckets: Sequence[int] = BUCKETS,
    device: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """tactics.json of 2:4 `layers` (module names and shapes) measured on a CUDA device.

    Raises UserError where there is no GPU with sparse tensor cores, no library, or not the memory for one layer.
    """
    info = bindings.context(device).info()
    unique = list(dict.fromkeys(layers.values()))
    measured: dict[Shape, list[dict[str, Any]]] = {}
    facts = timing.device_facts(device)
    for done, shape in enumerate(unique):
        progress(str(shape), done, len(unique))
        measured[shape] = _measure(shape, sorted(buckets), device, info.l2_bytes)
        clocks = timing.device_facts(device)["clocks"]  # while the GPU is still warm
        facts["clocks"] = {name: max(clock, facts["clocks"].get(name, 0.0)) for name, clock in clocks.items()}
    progress("done", len(unique), len(unique))
    return {
        "device": facts,
        "source": "measured",
        "gpu": facts["name"],
        "versions": versions(info),
        "layers": {name: entry(shape, measured[shape], facts["name"]) for name, shape in layers.items()},
    }


def _measure(shape: Shape, buckets: Sequence[int], device: int, l2_bytes: int) -> list[dict[str, Any]]:
    """The shape's buckets; its operands are freed afterwards."""
    try:
        bench = Bench(shape, torch.device("cuda", device), max(*buckets, *PADDED), l2_bytes)
        return [bucket_of(bench, tokens, time_kernel) for tokens in buckets]
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"GPU memory ran out while timing {shape}: free some and build again ({_line(error)})"
        ) from None
    finally:
        torch.cuda.empty_cache()


def search_dense(shapes: Iterable[Shape], buckets: Sequence[int], device: int = 0) -> None:
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
    layers: Mapping[str, Shape],
    buckets: Sequence[int] | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """tactics.json of 2:4 `layers` measured on this machine's CPU, with the threads that torch uses.

    Raises UserError where libtwofour_cpu can be neither loaded nor built.
    """
    from plugins.autotune import cpu_bench

    facts, made_for = cpu_bench.device_facts(), cpu_bench.versions()
    buckets = sorted(buckets or cpu_bench.BUCKETS)
    unique = list(dict.fromkeys(layers.values()))
    measured: dict[Shape, list[dict[str, Any]]] = {}
    for done, shape in enumerate(unique):
        progress(str(shape), done, len(unique))
        bench = cpu_bench.CpuBench(shape, buckets[-1])
        kernels = bench.kernels()
        measured[shape] = _held_once([bucket_of(bench, tokens, _time_on_cpu, kernels) for tokens in buckets])
    progress("done", len(unique), len(unique))
    name = facts["name"]
    return {
        "device": facts,
        "source": "measured",
        "gpu": name,
        "versions": made_for,
        "layers": {layer: entry(shape, measured[shape], name) for layer, shape in layers.items()},
    }


def _held_once(buckets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keeps the 2:4 kernel where dense is barely faster, if the layer has it anyway: its weight is then held once."""
    if not any(bucket["kernel"] in SPARSE_KERNELS for bucket in buckets):
        return buckets
    for bucket in buckets:
        if bucket["kernel"] == "dense-cpu" and bucket["ratio"] is not None and bucket["ratio"] > 1 - HELD_ONCE:
            note = f"dense takes {bucket['ratio']:.2f} of the 2:4 time: not enough to hold the weight twice"
            bucket |= {"kernel": "cpu-2of4", "notes": [*bucket["notes"], note]}
    return buckets


def _time_on_cpu(bench: Any, kernel: str, tokens: int) -> Timing:
    return Timing(kernel, bench.microseconds(kernel, tokens))


def bucket_of(bench: Any, tokens: int, timer: Timer, kernels: Sequence[str] | None = None) -> dict[str, Any]:
    """Times `kernels` (None: a GPU's) at `tokens` and returns the bucket of tactics.json.

    Kernels that cannot run are left out.
    """
    skinny = ("skinny",) if tokens <= MAX_SKINNY_TOKENS else ()
    timings = []
    for kernel in kernels or ("cublaslt", "torch", "cusparselt", *skinny):
        try:
            timings.append(time_padded(bench, kernel, tokens, timer))
        except torch.OutOfMemoryError:
            raise
        except (UserError, RuntimeError) as error:  # RuntimeError: torch's own product refuses some shapes
            log.info("%s at %d tokens leaves out %s: %s", bench.shape, tokens, kernel, _line(error))
    return choose(tokens, timings)


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


def choose(tokens: int, timings: Iterable[Timing]) -> dict[str, Any]:
    """The bucket: the fastest sparse kernel where it beats the fastest dense one by LEAST_GAIN, else the dense one."""
    by_time = sorted(timings, key=lambda t: t.us)
    dense = next((t for t in by_time if t.kernel in NAMES), None)
    sparse = next((t for t in by_time if t.kernel not in NAMES), None)
    ours = next((t for t in by_time if t.kernel in OURS), None)
    if dense is None and sparse is None:
        raise UserError(f"no kernel ran at {tokens} tokens: see the log; `twofour doctor` says what is missing")
    pays = sparse is not None and (dense is None or sparse.us * LEAST_GAIN <= dense.us)
    winner = sparse if pays else ours
    return {
        "tokens": tokens,
        "kernel": "reference" if winner is None else NAMES.get(winner.kernel, winner.kernel),
        "dense_us": None if dense is None else round(dense.us, 3),
        "sparse_us": None if sparse is None else round(sparse.us, 3),
        "ratio": None if dense is None or sparse is None else round(dense.us / sparse.us, 4),
        "measured": True,
        "algorithm": None if winner is None or winner.algorithm is None else list(winner.algorithm),
        "notes": [f"{NAMES.get(t.kernel, t.kernel)}: {note}" for t in by_time for note in t.notes],
    }


def entry(shape: Shape, buckets: Sequence[dict[str, Any]], gpu: str) -> dict[str, Any]:
    """A layer's entry in tactics.json."""
    return {
        "out_features": shape.out_features,
        "in_features": shape.in_features,
        "format": shape.format,
        "sparse": True,
        "reason": reason(buckets, gpu),
        "buckets": list(buckets),
    }


def reason(buckets: Sequence[dict[str, Any]], gpu: str) -> str:
    """Why the layer runs as it does, in words."""
    ratios = {b["tokens"]: b["ratio"] for b in buckets if b["ratio"] is not None}
    won = [b for b in buckets if b["kernel"] in SPARSE_KERNELS and (b["ratio"] is None or b["ratio"] >= 1)]
    held = [b for b in buckets if b["kernel"] in SPARSE_KERNELS and b not in won]
    if not won:
        if not ratios:
            return f"stays dense: no sparse kernel runs this shape on {gpu}"
        best = max(ratios, key=lambda tokens: ratios[tokens])
        return (
            f"stays dense: no sparse kernel is faster by {LEAST_GAIN - 1:.0%} on {gpu}; "
            f"the best is {ratios[best]:.2f}x at {best} tokens"
        )
    gains = [f"{b['ratio']:.2f}x at {b['tokens']}" if b["ratio"] else f"at {b['tokens']}" for b in won]
    lost = [str(b["tokens"]) for b in buckets if b not in won and b not in held]
    dense = f"; dense at {', '.join(lost)}" if lost else ""
    slower = [f"{b['ratio']:.2f}x at {b['tokens']}" for b in held]
    kept = f"; 2:4 all the same, so that the weight is held once: {', '.join(slower)}" if held else ""
    return f"2:4 is faster on {gpu}: {', '.join(gains)} tokens{dense}{kept}"


def apply(tactics: Mapping[str, Any], out: str = "bf16", device: int = 0) -> str | None:
    """Gives libtwofour the algorithms that were found when `tactics` were measured, so that nothing is searched again.

    `out` is what the layers put out, "bf16" or "fp16". Only where they were measured on this kind of GPU with these
    libraries; else the libraries' own defaults run, and the answer says in words what is amiss.
    """
    context = bindings.context(device)
    info = context.info()
    problem = check_device(tactics, torch.cuda.get_device_name(device), info.sm, versions(info))
    if problem is not None:
        return problem
    for layer in tactics["layers"].values():
        format = out if layer["format"] in ("fp16", "bf16") else layer["format"]
        for bucket in layer["buckets"]:
            kernel = bucket["kernel"].removeprefix("dense-")
            if bucket.get("algorithm") is None or kernel not in bindings.KERNELS:
                continue
            sizes = (layer["out_features"], layer["in_features"], bucket["tokens"])
            try:
                context.set_algorithm(bindings.gemm(kernel, format, out, *sizes), tuple(bucket["algorithm"]))
            except bindings.LibraryError as error:
                log.info("%s keeps its default algorithm at %d tokens: %s", kernel, bucket["tokens"], error)
    return None


def check_device(tactics: Mapping[str, Any], name: str, sm: int, here: Mapping[str, Any]) -> str | None:
    """Why `tactics` cannot be reused on this GPU with these library versions, or None."""
    device, known = tactics.get("device"), tactics.get("versions", {})
    if tactics.get("source") != "measured" or device is None:
        return "its kernels were chosen by prediction, not measured: build the engine again on this GPU"
    there = f"{device['name']} (SM {device['sm']})" if device["sm"] else device["name"]
    if (device["name"], device["sm"]) != (name, sm):
        return f"its kernels were timed on {there}, and this is {name} (SM {sm}): build the engine again here"
    for library_name in ("libtwofour", "cusparselt", "cublaslt"):
        timed = known.get(library_name)
        if timed != here[library_name]:
            expected = f"{library_name} {timed or 'of an unknown version'}"
            return f"its kernels were timed with {expected}, and here is {here[library_name]}: build the engine again"
    return None


def versions(info: bindings.Info) -> dict[str, Any]:
    """What the times depend on besides the GPU."""
    return {
        "libtwofour": bindings.load().twofour_version(),
        "cusparselt": info.cusparselt_version,
        "cublaslt": info.cublaslt_version,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


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
    problem = torch_ops.describe(kernel, x_MK, s.out_features, bench.out_dtype, bench.scale, bench.channel_scales)
    y_MN = torch.empty(tokens, s.out_features, dtype=bench.out_dtype, device=bench.device)
    workspace, notes = _workspace(bench.device)
    place = (workspace.data_ptr(), workspace.nbytes)

    def call(i: int) -> None:
        stream = torch.cuda.current_stream(bench.device).cuda_stream
        context.matmul(problem, x_MK.data_ptr(), weights[i].data_ptr(), y_MN.data_ptr(), place, stream)

    result = search.search(context, problem, call, len(weights), workspace.nbytes)
    if result.over_workspace:
        notes = (*notes, f"{result.over_workspace} algorithms want more than {workspace.nbytes >> 20} MiB of workspace")
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


def _workspace(device: torch.device) -> tuple[torch.Tensor, tuple[str, ...]]:
    """WORKSPACE bytes, or what memory has left: then algorithms that want more are passed over, and it is said."""
    size = WORKSPACE
    while True:
        try:
            workspace = torch.empty(size, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            if size <= 1 << 20:
                raise UserError("no GPU memory is left for a workspace: free some, or tune a smaller model") from None
            size //= 2
        else:
            short = (f"only {size >> 20} MiB of GPU memory for a workspace",) if size < WORKSPACE else ()
            return workspace, short
