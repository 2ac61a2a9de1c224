"""Installs a finished build: assembles it in OUT's folder and swaps it in by rename: OUT is never incomplete."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from builder.artifacts.filesystem import disk_full_as_user_error, locked, remove, sync_tree
from builder.artifacts.manifest import MANIFEST, is_build, listed_files
from plugins.common.errors import UserError
from plugins.common.files import sync

LINK_BYTES = 1 << 20  # smaller files are copied: people edit them in place, and a link would change the store's too
_AT_FDCWD, _EXCHANGE = -100, 2


@contextmanager
def claimed(out: Path) -> Iterator[Path]:
    """Keeps `out` for this build while it runs. Yields its resolved path.

    Raises UserError where `out` is not ours to replace or another running build holds it.
    """
    out = out.resolve()
    check(out)

    def busy(pid: str) -> None:
        raise UserError(f"process {pid} is building '{out}': wait for it, or choose another --out")

    try:
        with locked(out.parent / f".{out.name}.lock", busy):
            _tidy(out)
            yield out
    except PermissionError as error:
        raise UserError(f"'{out.parent}' cannot be written ({error.strerror}): choose another --out") from None


def check(out: Path) -> None:
    """Raises UserError unless `out` is absent, empty, or an earlier build with nothing else in it."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"'{out}' is a file: choose another --out")
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file() or path.is_symlink()}
    if not names:
        return
    if not is_build(out):
        raise UserError(f"'{out}' holds '{min(names)}' and is not an earlier build: choose another --out, or empty it")
    foreign = sorted(name for name in names - listed_files(out) - {MANIFEST} if "__pycache__" not in name)
    if foreign:
        raise UserError(
            f"'{out}' contains '{foreign[0]}', which twofour did not create: move it, or choose another --out"
        )


def publish(parts: Mapping[str, Path], out: Path, files: Mapping[str, bytes]) -> None:
    """Makes `out` hold `parts` (a file or folder each, by name), `files` (bytes, by relative path), nothing else.

    Large files are hard links where the disks allow, else copies; all are regular files. Call it inside `claimed(out)`.
    Raises UserError for a full disk and where `out` contains what it is made from.
    """
    out = out.resolve()
    for path in parts.values():
        if path.resolve().is_relative_to(out):
            raise UserError(f"'{out}' contains '{path}', an input of the build: choose another --out")
    new = out.with_name(f".{out.name}.new")
    try:
        with disk_full_as_user_error(out.parent, f"writing '{out}'"):
            new.mkdir(parents=True)
            for name, path in parts.items():
                _place(path, new / name)
            for name, data in files.items():
                target = new / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("xb") as file:
                    file.write(data)
                if data.startswith(b"#!"):  # a script, to be run
                    target.chmod(0o755)
            sync_tree(new)
            _swap(new, out)
    except BaseException:
        remove(new)
        raise


def _place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        target.mkdir()
        for child in sorted(source.iterdir()):
            _place(child, target / child.name)
        return
    if source.stat().st_size >= LINK_BYTES:
        try:
            os.link(source.resolve(), target)
            return
        except OSError:
            pass  # another disk, or one without links
    shutil.copy(source, target)  # with its permission to be run


def _swap(new: Path, out: Path) -> None:
    """Puts `new` at `out`. `out` is never absent where the kernel can exchange two names."""
    old = out.with_name(f".{out.name}.old")
    if not out.exists():
        new.rename(out)
    elif _exchange(new, out):
        new.rename(old)
    else:
        out.rename(old)
        new.rename(out)
    sync(out.parent)
    remove(old)


def _exchange(a: Path, b: Path) -> bool:
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _EXCHANGE) == 0)


def _tidy(out: Path) -> None:
    """Removes the remains of a killed build from the folder of `out`."""
    new, old = out.with_name(f".{out.name}.new"), out.with_name(f".{out.name}.old")
    if old.exists() and not out.exists():
        old.rename(out)
    remove(new)
    remove(old)
