"""Proves a checkpoint or a whole build from the files alone: weights, manifest, version lock and engine record."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from builder.artifacts.filesystem import checkpoint_digest
from builder.artifacts.manifest import is_build, verify_manifest
from builder.checkpoint.order_check import check_order
from builder.checkpoint.reading import read
from builder.checkpoint.verification import Verified, verify_checkpoint
from builder.checkpoint.violations import Code, VerificationError, Violation
from builder.engines.trtllm import version_lock
from plugins.common.json_files import read_json
from plugins.common.progress import Progress
from plugins.libtwofour.bindings import OLDEST_CUSPARSELT

PARTS = ("checkpoint", "checkpoint-trtllm")  # of a build


@dataclass(frozen=True)
class Verification:
    """The outcome: the checkpoints that could be opened, and all violations, one of a kind for each tensor."""

    directory: Path
    checkpoints: tuple[Verified, ...]
    violations: tuple[Violation, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.violations

    def require(self) -> Verification:
        """Returns itself. Raises VerificationError, which names the first violation."""
        if self.violations:
            raise VerificationError(self.violations[0], more=len(self.violations) - 1)
        return self

    def to_dict(self) -> dict[str, Any]:
        return {
            "directory": str(self.directory),
            "ok": self.ok,
            "checkpoints": [
                {**asdict(checkpoint), "directory": str(checkpoint.directory)} for checkpoint in self.checkpoints
            ],
            "violations": [violation.to_dict() for violation in self.violations],
            "seconds": self.seconds,
        }


def verify(
    directory: Path, *, tensor_parallel: int = 1, dense: Path | None = None, progress: Progress | None = None
) -> Verification:
    """Checks the checkpoint at `directory`, or all of a build's and its manifest. Raises UserError where there is none.

    With `tensor_parallel` N, also that a later split over N ranks keeps every group whole and gives each rank its
    share of sparse segments. With the `dense` model's directory, also that channels lie in the declared order.
    `progress` is called with (directory, tensors done, tensors in all).
    """
    started = time.perf_counter()
    build = directory if is_build(directory) else directory.parent if is_build(directory.parent) else None
    parts: Sequence[Path] = [directory]
    if build == directory:
        parts = [directory / part for part in PARTS if (directory / part).is_dir()]
    elif build is not None and (directory / "engine.json").is_file():
        parts = []  # a build's engine
    violations: list[Violation] = []
    checked = [verify_checkpoint(part, tensor_parallel, violations.append, progress) for part in parts]
    if dense is not None:
        violations += [wrong for part in parts[:1] for wrong in check_order(read(part), dense)]
    if build is not None:
        within = "" if build == directory else f"{directory.name}/"
        violations += [Violation(Code.DIGEST, problem) for problem in verify_manifest(build, within)]
    for part in parts:
        violations += _check_engine_record(part)
    violations += _check_locks(directory) + _check_kernel_versions(directory)
    verified, seconds = tuple(each for each in checked if each), round(time.perf_counter() - started, 3)
    return Verification(directory, verified, tuple(violations), seconds)


def _check_locks(directory: Path) -> list[Violation]:
    """Whether the engine that `directory` is or holds may run on this machine."""
    refusals = [version_lock.incompatibility(place) for place in (directory, directory / "engine")]
    return [Violation(Code.LOCK, reason, version_lock.FILE) for reason in refusals if reason is not None]


def _check_kernel_versions(directory: Path) -> list[Violation]:
    """Whether the engine that `directory` is or holds was tuned on libraries that may ship."""
    violations = []
    for place in (directory, directory / "engine"):
        try:
            version = read_json(place / "tactics.json")["versions"]["cusparselt"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(version, int) and 0 < version < OLDEST_CUSPARSELT:
            used = f"cuSPARSELt {version // 1000}.{version // 100 % 10}.{version % 100}"
            message = f"its kernels were timed with {used}, which is for measuring only: build it with 0.8.1 or newer"
            violations.append(Violation(Code.LOCK, message, "tactics.json"))
    return violations


def _check_engine_record(directory: Path) -> list[Violation]:
    """Where a build holds an engine and its checkpoint: whether the engine was built from exactly these files."""
    try:
        engine = read_json(directory.parent / "engine" / "engine.json")
        source, recorded = PARTS[engine.get("backend") == "tensorrt"], engine.get("checkpoint_sha256")
    except (OSError, ValueError, AttributeError):
        return []
    if directory.name != source or recorded is None or recorded == checkpoint_digest(directory):
        return []
    return [Violation(Code.DIGEST, "engine/engine.json was built from other files than these", directory.name)]
