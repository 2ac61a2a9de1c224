"""The table of compatibility: number format x sparsity x backend x GPU, a row a rule, with reasons and alternatives.

Legend: `sm` is the GPU's compute capability times ten (H100: 90); None where no GPU is known, which skips the rules
about GPUs: they are checked again on the machine that builds the engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from plugins.common.errors import UserError
from plugins.common.formats import Format
from plugins.common.patterns import OF_EIGHT

BACKENDS = ("tensorrt", "pytorch", "torch")
FORMATS = tuple(format.value for format in Format)


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
    features: tuple[str, ...] = ()  # some of PER_TOKEN, QUANTIZED_HEAD and the patterns of 8


PER_TOKEN = "int8 activations with a scale for each token"
QUANTIZED_HEAD = "an 8-bit lm_head"
TRTLLM = ("tensorrt", "pytorch")


def _yes(reason: str, **where: Any) -> Rule:
    return Rule(Verdict.yes(reason), **where)


def _no(reason: str, instead: str, **where: Any) -> Rule:
    return Rule(Verdict.no(reason, instead), **where)


def _refusals_of_eight(pattern: str) -> tuple[Rule, Rule]:
    """Of a pattern whose only kernels are the torch engine's."""
    other, newer = (
        "use sparsity.pattern=2:4, or engine.backend=torch",
        "remove the recipe's 'sparsity' section, or use a newer GPU",
    )
    return (
        _no(f"TensorRT-LLM has no kernel for {pattern} weights", other, backends=TRTLLM, feature=pattern),
        _no(f"the kernels of {pattern} weights need SM80 (A100) or later", newer, sm=(0, 79), feature=pattern),
    )


# The first row that matches decides, so refusals come before permissions.
TABLE: tuple[Rule, ...] = (
    # -- patterns without sparse tensor cores
    *(rule for pattern in OF_EIGHT for rule in _refusals_of_eight(pattern)),
    # -- the GPU itself
    _no(
        "2:4 sparsity needs sparse tensor cores: SM80 (A100) or later",
        "remove the recipe's 'sparsity' section, or use a newer GPU",
        sparse=True,
        sm=(0, 79),
    ),
    _no(
        "TensorRT-LLM 1.x supports no GPU before SM80 (A100)",
        "use engine.backend=torch, or a newer GPU",
        backends=TRTLLM,
        sm=(0, 79),
    ),
    _no(
        "FP8 needs FP8 tensor cores: SM89 (L4, L40S, RTX 4090) or later",
        "use quantization.format=int8 with engine.backend=tensorrt or torch",
        formats=("fp8",),
        sm=(0, 88),
    ),
    _no("an FP8 KV cache needs SM89 or later", "use quantization.kv_cache=none", kv_caches=("fp8",), sm=(0, 88)),
    # -- TensorRT-LLM's own limits
    _no(
        "ModelOpt exports only static INT8 scales to TensorRT-LLM, none per token",
        "use quantization.activations=per_tensor, or engine.backend=torch",
        backends=TRTLLM,
        feature=PER_TOKEN,
    ),
    _no(
        "TensorRT-LLM keeps lm_head in 16 bit",
        "add lm_head to quantization.exclude, or use engine.backend=torch",
        backends=TRTLLM,
        feature=QUANTIZED_HEAD,
    ),
    _no(
        "the PyTorch backend of TensorRT-LLM has no INT8 W8A8 linear layer ('unsupported quant mode')",
        "use quantization.format=fp8, or engine.backend=tensorrt (TensorRT-LLM 1.0 to 1.2, up to SM90), or torch",
        formats=("int8",),
        backends=("pytorch",),
    ),
    _no(
        "TensorRT-LLM rejects SmoothQuant INT8 on SM100 to SM119",
        "use quantization.format=fp8, or engine.backend=torch",
        formats=("int8",),
        backends=("tensorrt",),
        sm=(100, 119),
    ),
    _no(
        "the PyTorch backend of TensorRT-LLM has no INT8 KV cache",
        "use quantization.kv_cache=fp8 or none",
        kv_caches=("int8",),
        backends=("pytorch",),
    ),
    _no(
        "TensorRT-LLM rejects an INT8 KV cache on SM100 to SM119",
        "use quantization.kv_cache=fp8 or none",
        kv_caches=("int8",),
        backends=("tensorrt",),
        sm=(100, 119),
    ),
    _no(
        "the torch engine runs on one device",
        "use engine.tensor_parallel=1 and engine.pipeline_parallel=1, or engine.backend=tensorrt or pytorch",
        backends=("torch",),
        parallel=True,
    ),
    _no(
        "there is no sparse kernel for float32 weights",
        "start from a bfloat16 or float16 model",
        formats=("fp32",),
        sparse=True,
        backends=TRTLLM,
    ),
    # -- supported combinations, and how they run
    _yes(
        "our plugin: TensorRT's sparse INT8 tactics need INT8 outputs, and TensorRT-LLM's INT8 layers give 16 bit",
        formats=("int8",),
        sparse=True,
        backends=("tensorrt",),
    ),
    _yes(
        "TensorRT's sparse tactics (reported on SM89: FP8 layers eligible, none picked) or our plugin",
        formats=("fp8",),
        sparse=True,
        backends=("tensorrt",),
        sm=(89, 89),
    ),
    _yes("TensorRT's sparse tactics (GEMM plugins off) or our plugin", sparse=True, backends=("tensorrt",)),
    _yes("TensorRT-LLM's own dense kernels", sparse=False, backends=("tensorrt",)),
    _yes("our linear method in an out-of-tree module", sparse=True, backends=("pytorch",)),
    _yes("TensorRT-LLM's own dense kernels", sparse=False, backends=("pytorch",)),
    *(
        _yes(
            "our kernels: packed weights up to 64 tokens on CUDA and dense above, packed ones on a CPU",
            sparse=True,
            backends=("torch",),
            feature=pattern,
        )
        for pattern in OF_EIGHT
    ),
    _yes("our sparse kernels on CUDA, their reference numerics elsewhere", sparse=True, backends=("torch",)),
    _yes("our dense linear layers", sparse=False, backends=("torch",)),
)
