"""The releases of TensorRT-LLM that this code was checked against, and the note on an older or a newer one.

The builder imports this module, and so do TensorRT-LLM's own processes: standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

from plugins.common.errors import UserError

Release = tuple[int, int]
OLDEST: Release = (1, 0)
LAST_WITH_ENGINES: Release = (1, 2)  # the last line that builds TensorRT engines
NEWEST: Release = (1, 3)
IMAGE = "nvcr.io/nvidia/tensorrt-llm/release"
CONTAINER = f"{IMAGE}:1.2.1"  # the last stable release that builds TensorRT engines


def parse(version: str) -> Release | None:
    """(major, minor) of a version such as 1.3.0rc3; None for anything else."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return (int(numbers[1]), int(numbers[2])) if numbers else None


def installed() -> str | None:
    """The installed version, without importing the package; None where there is none."""
    try:
        return metadata.version("tensorrt_llm")
    except metadata.PackageNotFoundError:
        return None


def is_newer(version: str) -> bool:
    """Whether nothing here was checked against this release."""
    release = parse(version)
    return release is not None and release > NEWEST


def caution(version: str) -> str:
    """The note on a release that `is_newer`."""
    return f"TensorRT-LLM {version} is newer than {dotted(NEWEST)}, the newest release that twofour was checked against"


def require_supported(version: str | None) -> None:
    """Raises UserError for a release that is missing or too old."""
    release = parse(version) if version else None
    if release is None or release < OLDEST:
        problem = (
            f"TensorRT-LLM {version} is older than {dotted(OLDEST)}" if version else "TensorRT-LLM is not installed"
        )
        raise UserError(problem, f"use the container {CONTAINER}")


@contextmanager
def naming_the_release() -> Iterator[None]:
    """Names the release in an error that looks like a changed interface, where the release is a newer one.

    Raises UserError in place of ImportError, AttributeError and TypeError; on known releases they pass unchanged.
    """
    try:
        yield
    except (ImportError, AttributeError, TypeError) as error:
        version = installed()
        if version is None or not is_newer(version):
            raise
        raise UserError(
            f"{caution(version)}, and it fails there ({error})", f"use the container {CONTAINER}"
        ) from error


def dotted(release: Release) -> str:
    """1.2 for (1, 2)."""
    return ".".join(map(str, release))
