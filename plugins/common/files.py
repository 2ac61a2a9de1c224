"""Reading and writing files so that a reader, or a process that was killed, never meets half of one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

CHUNK = 1 << 20  # bytes read at once


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yields a path to write to; moves what was written there to `path` in one step, if no exception is raised.

    `durable` waits until the bytes and the name are on the disk, so that both outlive a loss of power.
    """
    partial = path.with_name(f".{path.name}.partial{path.suffix}")  # numpy appends a suffix that it misses
    yield partial
    if durable:
        sync(partial)
    partial.replace(path)
    if durable:
        sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_once(path: Path) -> str:
    """As `sha256`, but a file that did not change since this process hashed it is not read again.

    For large inputs. What must notice a damaged disk reads with `sha256`.
    """
    status = path.stat()
    return _sha256_of(path.resolve(), status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _sha256_of(path: Path, inode: int, size: int, modified_ns: int) -> str:
    return sha256(path)
