"""Checks what can be built, by the table of compatibility_rules.py.

`plan`, `build`, `engine` and `doctor` all use it, so that they never disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from builder.planning.compatibility_rules import (
    BACKENDS,
    FORMATS,
    PER_TOKEN,
    QUANTIZED_HEAD,
    TABLE,
    TRTLLM,
    Combination,
    Verdict,
)
from plugins.common.errors import UserError
from plugins.common.families import FAMILIES
from plugins.common.patterns import OF_EIGHT
from plugins.tensorrt_llm import releases

MODELOPT = "0.47"  # the version whose checkpoints are supported


def features_of(per_token: bool, quantized_head: bool, pattern: str | None = None) -> tuple[str, ...]:
    """What not every backend has, as `check` takes it. `pattern` is that of sparse layers, None without one."""
    used = ((PER_TOKEN, per_token), (QUANTIZED_HEAD, quantized_head), (str(pattern), pattern in OF_EIGHT))
    return tuple(name for name, has in used if has)


def has_hybrid_kernels(backend: str) -> bool:
    """Whether the backend runs layers that are sparse in part; TensorRT-LLM's kernels take whole layers."""
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
            f"TensorRT-LLM {version} is newer than 1.2, the last that builds TensorRT engines",
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
    among: Sequence[str] = BACKENDS,
    **needs: Any,
) -> tuple[str, str]:
    """Resolves `engine.backend: auto`: the first of `among` that this machine can run, and the reason.

    `sm` is None on a machine with no GPU and `tensorrt_llm` None where the package is missing: both leave only `torch`.
    `needs` are kv_cache, parallel and features, as `check` takes them. Raises UserError where not even torch runs.
    """
    passed_over: list[str] = []
    for backend in [name for name in among if name in TRTLLM]:
        if sm is None:
            verdict = Verdict.no("there is no GPU", "")
        elif tensorrt_llm is None:
            verdict = Verdict.no("tensorrt_llm is not installed", "")
        else:
            verdict = check(format, sparse, backend, sm, tensorrt_llm=tensorrt_llm, **needs)
        if verdict.ok:
            return backend, "; ".join([*passed_over, f"{backend}: {verdict.reason}"])
        passed_over.append(f"not {backend}: {verdict.reason}")
    check(format, sparse, "torch", sm, **needs).require()
    return "torch", "; ".join([*passed_over, "torch runs anywhere"])


# -- architectures


def check_architecture(architecture: str, backend: str) -> Verdict:
    """Whether our hooks support this architecture on the backend."""
    if architecture in FAMILIES:
        return Verdict.yes(f"{backend} supports {architecture}")
    known = ", ".join(FAMILIES)
    return Verdict.no(
        f"'{architecture}' is not an architecture that the {backend} backend supports here", f"use one of {known}"
    )


def _known(what: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        raise UserError(f"'{name}' is not a {what}: use one of {', '.join(names)}")
