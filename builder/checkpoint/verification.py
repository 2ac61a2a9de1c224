"""Proves one checkpoint from its files alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from builder.checkpoint.reading import Checkpoint, open_checkpoint
from builder.checkpoint.tensor_checks import check_names, check_presence, check_split, check_types, check_values
from builder.checkpoint.violations import Code, Violation
from plugins.common.progress import Progress

THREADS = 4  # each holds one chunk of a tensor


@dataclass(frozen=True)
class Verified:
    """What a checkpoint turned out to be."""

    directory: Path
    kind: str
    format: str
    kv_cache: str
    ranks: int
    tensors: int
    layers: int
    sparse_layers: int
    pattern: str  # of these
    bytes: int


def verify_checkpoint(
    directory: Path,
    tensor_parallel: int,
    report: Callable[[Violation], None],
    progress: Progress | None,
) -> Verified | None:
    """Reports every violation of the checkpoint at `directory`; None where it cannot be opened.

    `tensor_parallel` N also checks a later split of K over N ranks. `progress` is called with ("verify", tensors done,
    tensors in all). Raises UserError where there is no checkpoint.
    """
    unreadable = []

    def note(violation: Violation) -> None:
        unreadable.append(violation.code in (Code.FILE, Code.MISSING_FILE))
        report(violation)

    checkpoint = open_checkpoint(directory, note)
    if checkpoint is None:
        return None
    checks = [check_names(checkpoint), check_types(checkpoint), check_split(checkpoint, tensor_parallel)]
    if not any(unreadable):  # else each tensor of a lost file would be named
        checks.insert(1, check_presence(checkpoint))
    for check in checks:
        for violation in check:
            report(violation)
    _check_all_values(checkpoint, report, progress)
    tensors = checkpoint.tensors.values()
    return Verified(
        directory=directory,
        kind=checkpoint.kind,
        format=checkpoint.format,
        kv_cache=checkpoint.kv_cache,
        ranks=checkpoint.ranks,
        tensors=len(tensors),
        layers=len(checkpoint.layers()),
        sparse_layers=len(checkpoint.sparse_layers),
        pattern=checkpoint.declaration.pattern,
        bytes=sum(tensor.nbytes for tensor in tensors),
    )


def _check_all_values(
    checkpoint: Checkpoint,
    report: Callable[[Violation], None],
    progress: Progress | None,
) -> None:
    """Every tensor, several at once: numpy lets go of the interpreter lock."""

    def check(key: str) -> list[Violation]:
        return check_values(checkpoint.tensors[key], checkpoint.expected.get(key), checkpoint.segments(key))

    keys = list(checkpoint.tensors)
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as threads:
        for number, violations in enumerate(threads.map(check, keys), start=1):
            for violation in violations:
                report(violation)
            if progress is not None:
                progress("verify", number, len(keys))
