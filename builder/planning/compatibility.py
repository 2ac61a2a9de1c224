"""What can be built: one table of number format x sparsity x backend x GPU, with reasons and alternatives.

`plan`, `build`, `engine` and `doctor` all use it, so that they never disagree.

Legend: `sm` is the GPU's compute capability times ten (H100: 90); None where no GPU is known, which skips the rules
about GPUs: they are checked again on the machine that builds the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from plugins.common.errors import UserError
from plugins.common.families import FAMILIES
from plugins.common.formats import Format
from plugins.tensorrt_llm import releases

BACKENDS = ("tensorrt", "pytorch", "torch")
FORMATS = tuple(format.value for format in Format)
MODELOPT = "0.47"  # the version whose checkpoints are supported


@dataclass(frozen=True)
class Verdict:
    """Whether a combination can be built. `reason`: how it runs, or why not; `instead`: what to use instead."""

    ok: bool
    reason: str
    instead: str = ""

    @classmethod
    def yes(cls, reason: str) -> Verdict:
        return cls(True, reason)

    @classmethod
    def no(cls, reason: str, instead: str) -> Verdict:
        return cls(False, reason, instead)

    def require(self) -> Verdict:
        """Returns itself. Raises UserError if not `ok`."""
        if not self.ok:
            raise UserError(self.reason, self.instead)
        return self


@dataclass(frozen=True)
class Rule:
    """One row of the table. Empty or None means any; `sm` is an inclusive range, matched only when the GPU is known."""

    verdict: Verdict
    formats: tuple[str, ...] = ()
    kv_caches: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    sparse: bool | None = None
    sm: tuple[int, int] | None = None
    parallel: bool | None = None
    feature: str | None = None

    def matches(self, ask: Combination) -> bool:
        return (
            (not self.formats or ask.format in self.formats)
            and (not self.kv_caches or ask.kv_cache in self.kv_caches)
            and (not self.backends or ask.backend in self.backends)
            and (self.sparse is None or ask.sparse == self.sparse)
            and (self.sm is None or (ask.sm is not None and self.sm[0] <= ask.sm <= self.sm[1]))
            and (self.parallel is None or ask.parallel == self.parallel)
            and (self.feature is None or self.feature in ask.features)
        )


@dataclass(frozen=True)
class Combination:
    """One combination to look up in the table."""

    format: str
    sparse: bool
    backend: str
    sm: int | None = None
    kv_cache: str = "none"
    parallel: bool = False
    features: tuple[str, ...] = ()  # some of PER_TOKEN and QUANTIZED_HEAD


PER_TOKEN = "int8 activations with a scale for each token"
QUANTIZED_HEAD = "an 8-bit lm_head"
TRTLLM = ("tensorrt", "pytorch")
ANY_LATER = 999

# The first row that matches decides, so refusals come before permissions.
TABLE: tuple[Rule, ...] = (
    # -- the GPU itself
    Rule(
        Verdict.no(
            "2:4 sparsity needs the sparse tensor cores that begin with SM80 (A100)",
            "remove the recipe's 'sparsity' section, or use a newer GPU",
        ),
        sparse=True,
        sm=(0, 79),
    ),
    Rule(
        Verdict.no("TensorRT-LLM 1.x supports no GPU before SM80 (A100)", "use engine.backend=torch, or a newer GPU"),
        backends=TRTLLM,
        sm=(0, 79),
    ),
    Rule(
        Verdict.no(
            "FP8 needs the FP8 tensor cores that begin with SM89 (L4, L40S, RTX 4090)",
            "use quantization.format=int8 with engine.backend=tensorrt or torch",
        ),
        formats=("fp8",),
        sm=(0, 88),
    ),
    Rule(
        Verdict.no("an FP8 KV cache needs SM89 or later", "use quantization.kv_cache=none"),
        kv_caches=("fp8",),
        sm=(0, 88),
    ),
    # -- TensorRT-LLM's own limits
    Rule(
        Verdict.no(
            "ModelOpt exports static INT8 scales to TensorRT-LLM, none for each token",
            "use quantization.activations=per_tensor, or engine.backend=torch",
        ),
        backends=TRTLLM,
        feature=PER_TOKEN,
    ),
    Rule(
        Verdict.no(
            "TensorRT-LLM keeps lm_head in 16 bit", "add lm_head to quantization.exclude, or use engine.backend=torch"
        ),
        backends=TRTLLM,
        feature=QUANTIZED_HEAD,
    ),
    Rule(
        Verdict.no(
            "the PyTorch backend of TensorRT-LLM has no INT8 W8A8 linear layer ('unsupported quant mode')",
            "use quantization.format=fp8, or engine.backend=tensorrt (TensorRT-LLM 1.0 to 1.2, up to SM90), or torch",
        ),
        formats=("int8",),
        backends=("pytorch",),
    ),
    Rule(
        Verdict.no(
            "TensorRT-LLM refuses SmoothQuant INT8 on SM100 to SM119",
            "use quantization.format=fp8, or engine.backend=torch",
        ),
        formats=("int8",),
        backends=("tensorrt",),
        sm=(100, 119),
    ),
    Rule(
        Verdict.no("the PyTorch backend of TensorRT-LLM has no INT8 KV cache", "use quantization.kv_cache=fp8 or none"),
        kv_caches=("int8",),
        backends=("pytorch",),
    ),
    Rule(
        Verdict.no("TensorRT-LLM refuses an INT8 KV cache on SM100 to SM119", "use quantization.kv_cache=fp8 or none"),
        kv_caches=("int8",),
        backends=("tensorrt",),
        sm=(100, 119),
    ),
    Rule(
        Verdict.no(
            "the torch engine runs on one device",
            "use engine.tensor_parallel=1 and engine.pipeline_parallel=1, or engine.backend=tensorrt or pytorch",
        ),
        backends=("torch",),
        parallel=True,
    ),
    Rule(
        Verdict.no("there is no sparse kernel for float32 weights", "start from a bfloat16 or float16 model"),
        formats=("fp32",),
        sparse=True,
        backends=TRTLLM,
    ),
    # -- supported combinations, and how they run
    Rule(
        Verdict.yes(
            "our plugin: TensorRT's sparse INT8 tactics need INT8 outputs, and TensorRT-LLM's INT8 layers give 16 bit"
        ),
        formats=("int8",),
        sparse=True,
        backends=("tensorrt",),
    ),
    Rule(
        Verdict.yes("TensorRT's sparse tactics (reported on SM89: FP8 layers eligible, none picked) or our plugin"),
        formats=("fp8",),
        sparse=True,
        backends=("tensorrt",),
        sm=(89, 89),
    ),
    Rule(
        Verdict.yes("TensorRT's sparse tactics (GEMM plugins off) or our plugin"), sparse=True, backends=("tensorrt",)
    ),
    Rule(Verdict.yes("TensorRT-LLM's own dense kernels"), sparse=False, backends=("tensorrt",)),
    Rule(Verdict.yes("our linear method in an out-of-tree module"), sparse=True, backends=("pytorch",)),
    Rule(Verdict.yes("TensorRT-LLM's own dense kernels"), sparse=False, backends=("pytorch",)),
    Rule(
        Verdict.yes("our sparse kernels on CUDA, their reference numerics elsewhere"), sparse=True, backends=("torch",)
    ),
    Rule(Verdict.yes("our dense linear layers"), sparse=False, backends=("torch",)),
)


def features_of(per_token: bool, quantized_head: bool) -> tuple[str, ...]:
    """What not every backend has, as `check` takes it."""
    return tuple(name for name, used in ((PER_TOKEN, per_token), (QUANTIZED_HEAD, quantized_head)) if used)


def has_hybrid_kernels(backend: str) -> bool:
    """Whether the backend runs layers that are partly 2:4, partly dense; TensorRT-LLM's kernels take whole layers."""
    return backend == "torch"


def check(
    format: str,
    sparse: bool,
    backend: str,
    sm: int | None = None,
    *,
    kv_cache: str = "none",
    parallel: int = 1,
    features: Sequence[str] = (),
    tensorrt_llm: str | None = None,
) -> Verdict:
    """The verdict of the table on one combination.

    `format` is one of FORMATS, `kv_cache` "none", "int8" or "fp8", `parallel` the number of GPUs one engine spans,
    `features` those of `features_of` and `tensorrt_llm` the installed version, if known. Raises UserError for an
    unknown name.
    """
    _known("format", format, FORMATS)
    _known("backend", backend, BACKENDS)
    if tensorrt_llm is not None and backend in TRTLLM:
        verdict = check_release(backend, tensorrt_llm)
        if not verdict.ok:
            return verdict
    ask = Combination(format, sparse, backend, sm, kv_cache, parallel > 1, tuple(features))
    return next(rule.verdict for rule in TABLE if rule.matches(ask))


def check_release(backend: str, version: str) -> Verdict:
    """Whether a TensorRT-LLM release has the backend. TensorRT engines ended with the 1.2 line."""
    release = releases.parse(version)
    if release is None:
        return Verdict.no(f"'{version}' is not a TensorRT-LLM version", "install tensorrt-llm>=1.0")
    if release < releases.OLDEST:
        return Verdict.no(f"TensorRT-LLM {version} is older than 1.0", "install tensorrt-llm>=1.0")
    if backend == "tensorrt" and release > releases.LAST_WITH_ENGINES:
        return Verdict.no(
            f"TensorRT-LLM {version} is past the 1.2 line, the last that builds TensorRT engines",
            f"use engine.backend=pytorch, or the container {releases.CONTAINER}",
        )
    if releases.is_newer(version):
        return Verdict.yes(f"{releases.caution(version)}: it is tried")
    return Verdict.yes(f"TensorRT-LLM {version} has the {backend} backend")


def choose_backend(
    format: str,
    sparse: bool,
    sm: int | None,
    tensorrt_llm: str | None,
    *,
    kv_cache: str = "none",
    parallel: int = 1,
    features: Sequence[str] = (),
    among: Sequence[str] = BACKENDS,
) -> tuple[str, str]:
    """Resolves `engine.backend: auto`: the first of `among` that this machine can run, and the reason.

    `sm` is None on a machine with no GPU and `tensorrt_llm` None where the package is missing: both leave only `torch`.
    Raises UserError where not even that is possible.
    """
    passed_over: list[str] = []
    for backend in [name for name in among if name in TRTLLM]:
        if sm is None:
            verdict = Verdict.no("there is no GPU", "")
        elif tensorrt_llm is None:
            verdict = Verdict.no("tensorrt_llm is not installed", "")
        else:
            verdict = check(
                format,
                sparse,
                backend,
                sm,
                kv_cache=kv_cache,
                parallel=parallel,
                features=features,
                tensorrt_llm=tensorrt_llm,
            )
        if verdict.ok:
            return backend, "; ".join([*passed_over, f"{backend}: {verdict.reason}"])
        passed_over.append(f"not {backend}: {verdict.reason}")
    check(format, sparse, "torch", sm, kv_cache=kv_cache, parallel=parallel, features=features).require()
    return "torch", "; ".join([*passed_over, "torch runs anywhere"])


# -- architectures


def check_architecture(architecture: str, backend: str) -> Verdict:
    """Whether our hooks support this architecture on the backend."""
    if architecture in FAMILIES:
        return Verdict.yes(f"{backend} knows {architecture}")
    known = ", ".join(FAMILIES)
    return Verdict.no(
        f"'{architecture}' is not an architecture that the {backend} backend builds here", f"use one of {known}"
    )


def _known(what: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        raise UserError(f"'{name}' is not a {what}: use one of {', '.join(names)}")
