"""Checks of this machine: its hardware, the backends that can run, and the first missing requirement of each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from builder.doctor.finding import Finding
from builder.doctor.probes import PROBES, run
from builder.planning.compatibility import check, check_release
from builder.planning.compatibility_rules import BACKENDS, TRTLLM

# What each backend needs, in the order of installation; calibration and deployment likewise.
NEEDS = {
    "tensorrt": ("GPU", "TensorRT-LLM", "TensorRT"),
    "pytorch": ("GPU", "TensorRT-LLM"),
    "torch": ("torch", "transformers"),
    "calibration": ("torch", "transformers", "ModelOpt"),
    "deploy": ("Triton",),
}
FORMATS = ("bf16", "fp8", "int8")  # that recipes build
KERNELS = ("GPU", "CUDA driver", "cuSPARSELt", "libtwofour")  # the torch backend without them: reference numerics


@dataclass(frozen=True)
class Ability:
    """Whether a backend or step can run here. `missing` is the first thing to install, `fix` how."""

    name: str
    able: bool
    missing: str = ""
    fix: str = ""
    note: str = ""


@dataclass(frozen=True)
class Examination:
    """All findings, and the abilities that follow from them."""

    findings: tuple[Finding, ...]
    abilities: tuple[Ability, ...]

    @property
    def backends(self) -> tuple[Ability, ...]:
        return tuple(ability for ability in self.abilities if ability.name in BACKENDS)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> Examination:
    """Runs every probe, four in parallel. Takes seconds, never more than the slowest probe's limit."""
    with ThreadPoolExecutor(4) as threads:
        findings = tuple(threads.map(run, PROBES))
    return Examination(findings, abilities(findings))


def abilities(findings: Sequence[Finding]) -> tuple[Ability, ...]:
    """The abilities that the findings allow: backends first, in the order in which `auto` tries them."""
    by_name = {finding.name: finding for finding in findings}
    return tuple(_ability(name, needs, by_name) for name, needs in NEEDS.items())


def _ability(name: str, needs: Sequence[str], by_name: Mapping[str, Finding]) -> Ability:
    for need in needs:
        finding = by_name[need]
        if not finding.ok and not _will_do(name, finding):
            return Ability(name, False, f"{need}: {finding.message}", finding.fix)
    if name == "tensorrt":
        verdict = check_release("tensorrt", str(by_name["TensorRT-LLM"].version))
        if not verdict.ok:
            return Ability(name, False, f"TensorRT-LLM: {verdict.reason}", verdict.instead)
    return Ability(name, True, note=_note(name, by_name))


def _will_do(name: str, finding: Finding) -> bool:
    """Whether the finding is acceptable: the torch backend also runs on the CPU of a machine with a GPU."""
    return name in ("torch", "calibration") and finding.name == "torch" and finding.state == "unfit"


def _note(name: str, by_name: Mapping[str, Finding]) -> str:
    if name in TRTLLM:
        return _formats(name, by_name)
    if name != "torch":
        return ""
    lacking = next((by_name[need] for need in KERNELS if not by_name[need].ok), None)
    if lacking is None:
        return "sparse layers run on our CUDA kernels"
    compiler = by_name.get("C++ compiler")
    if by_name["GPU"].state == "missing" and compiler is not None and compiler.ok:
        return "sparse layers run on our CPU kernels, compiled at first use"
    return f"sparse layers run the reference numerics, without speed-up: {lacking.name}: {lacking.message}"


def _formats(backend: str, by_name: Mapping[str, Finding]) -> str:
    """The number formats of 2:4 layers that this GPU supports, and the reasons against the others."""
    sm = int(str(by_name["GPU"].version).removeprefix("SM"))
    verdicts = {name: check(name, True, backend, sm, tensorrt_llm=by_name["TensorRT-LLM"].version) for name in FORMATS}
    refused = [f"not {name}: {verdict.reason}" for name, verdict in verdicts.items() if not verdict.ok]
    return "; ".join([f"2:4 layers in {', '.join(name for name in verdicts if verdicts[name].ok)}", *refused])
