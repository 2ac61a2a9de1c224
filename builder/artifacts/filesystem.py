"""Files that outlive a crash: hashes, locks, trees synced to the disk, and a full disk as an error of one line."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from plugins.common.errors import UserError
from plugins.common.files import sha256, sync

HOLDER_SECONDS, HOLDER_READS = 2.0, 100  # time limit and number of reads of a lock file without its holder's pid
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def sha256_tree(directory: Path) -> dict[str, str]:
    """The sha256 of every regular file under `directory`, by relative posix path, sorted.

    Raises ValueError at a link or a special file: its name could come to hold something else.
    """
    paths = sorted(path for path in directory.rglob("*") if not path.is_dir() or path.is_symlink())
    for path in paths:
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"'{path}' is not a regular file")
    with ThreadPoolExecutor() as threads:  # hashlib releases the interpreter lock
        return {
            path.relative_to(directory).as_posix(): digest
            for path, digest in zip(paths, threads.map(sha256, paths), strict=True)
        }


def checkpoint_digest(directory: Path) -> str:
    """One hash for a checkpoint's content: of its weights, config.json and sparsity.json by name. Engines record it."""
    paths = [*directory.glob("*.safetensors"), directory / "config.json", directory / "sparsity.json"]
    digests = {path.name: sha256(path) for path in sorted(paths) if path.is_file()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def sync_tree(directory: Path) -> None:
    """Waits until everything under `directory` is on the disk: the files first, then the names that lead to them."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))


def remove(path: Path) -> None:
    """Removes a file or a tree, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, busy: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock file at `path`, alone among processes and threads.

    Where another holds it, `busy(pid)` is called once, and may raise to stop waiting. The kernel
    releases the lock when its holder dies.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    reported = False
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                if not reported and (holder := _holder(path)) is not None:
                    reported = True
                    busy(holder)
                fcntl.flock(file, fcntl.LOCK_EX)
            continue
        if _is_open_at(file.fileno(), path):  # else the previous holder removed it: our file is no longer the lock
            break
        file.close()
    with file:
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _holder(path: Path) -> str | None:
    """The pid in a lock file; None where the holder has just let go and removed it.

    A holder writes its pid just after it takes the lock, so an empty file is read again.
    """
    for _ in range(HOLDER_READS):
        try:
            if pid := path.read_text().strip():
                return pid
        except FileNotFoundError:
            return None
        time.sleep(HOLDER_SECONDS / HOLDER_READS)
    return "unknown"


def _is_open_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def disk_full_as_user_error(path: Path, doing: str) -> Iterator[None]:
    """Turns a full disk under `path` into one UserError, whatever library met it."""
    try:
        yield
    except Exception as error:
        if not is_full_disk(error):
            raise
        free = shutil.disk_usage(path).free
        raise UserError(
            f"the disk is full at '{path}' ({free / 1e6:.1f} MB free) while {doing}: free space and run again"
        ) from error


def is_full_disk(error: BaseException | None) -> bool:
    """Whether `error`, or what caused it, is a full disk. Libraries in Rust and C++ show it in their message alone."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if "No space left on device" in str(error) or "StorageFull" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
