"""Stage outputs, kept by the hash of everything they were made from.

ROOT/entries/STAGE/KEY/   record.json and files/: finished, never changed again, hashed at every read
    work/KEY/             what a stage keeps while it runs; outlives a kill, so that the stage resumes
    tmp/KEY.PID/          the output of a running stage, renamed into entries/ when all of it is on the disk
    locks/KEY             held by the process that makes KEY
    corrupt/KEY           the last entry of that key whose files differed from its record
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.artifacts.filesystem import disk_full_as_user_error, locked, remove, sha256_tree, sync_tree
from builder.hardware.peak_memory import PeakMemory
from plugins.common.errors import UserError
from plugins.common.files import sync
from plugins.common.json_files import read_json, write_json

Make = Callable[[Path, Path], None]


def default_store() -> Path:
    """Where stage outputs are kept unless --store names another place: shared by all builds of this user."""
    cache = os.environ.get("TWOFOUR_STORE")
    return Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twofour"


def key(stage: str, inputs: Mapping[str, str], config: Any, code: str, tools: Mapping[str, str]) -> str:
    """The name of a stage's output: the sha256 of its inputs' digests, config, code's digest and tools' versions."""
    return digest_of({"stage": stage, "inputs": inputs, "config": config, "code": code, "tools": tools})


def digest_of(value: Any) -> str:
    """The sha256 of a JSON value, whatever the order of its keys. Raises TypeError or ValueError if it is not JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class CachedOutput:
    """A finished stage output. `files` are sha256 by relative path; `digest` is the hash of all of them."""

    path: Path
    digest: str
    files: Mapping[str, str]
    record: Mapping[str, Any]
    reused: bool


class CorruptEntryError(Exception):
    """An entry differs from its record."""


class Cache:
    """A folder of stage outputs, shared by any number of builds at once."""

    def __init__(self, root: Path, log: Callable[[str], None] = print) -> None:
        self.root = root.resolve()
        self.log = log
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the cache '{root}' cannot be written ({error.strerror}): choose another folder") from None

    def run(self, stage: str, key: str, describe: Mapping[str, Any], make: Make, *, wait: bool = True) -> CachedOutput:
        """The output of `stage` under `key`: the finished one, or else the one that `make(out, work)` writes now.

        `out` starts empty; `work` holds what a killed run of the same key left there. `describe` goes into the record.
        Raises UserError for a full disk and, unless `wait`, when another process is making the same output.
        """
        try:
            if (entry := self.find(stage, key)) is not None:
                self._forget_work(key)  # left by a kill between the last rename and the end
                return entry
        except CorruptEntryError:
            pass  # looked at again below, where no other process is mending it

        def busy(pid: str) -> None:
            if not wait:
                raise UserError(f"process {pid} is running stage '{stage}' on the same input: wait for it, or stop it")
            self.log(f"{stage}: process {pid} is making the same output; waiting for it")

        with locked(self.root / "locks" / key, busy):
            try:
                if (entry := self.find(stage, key)) is not None:
                    return entry
            except CorruptEntryError as problem:
                self._set_aside(stage, key, problem)
            for stale in (self.root / "tmp").glob(f"{key}.*"):  # only a killed run leaves one: we hold the lock
                remove(stale)
            return self._make(stage, key, describe, make)

    def find(self, stage: str, key: str) -> CachedOutput | None:
        """The finished output of `stage` under `key`, its files hashed again; None where there is none.

        Raises CorruptEntryError where they differ from the record.
        """
        folder = self._folder(stage, key)
        if not folder.exists():
            return None
        try:
            record = read_json(folder / "record.json")
            recorded: dict[str, str] = record["files"]
            files = sha256_tree(folder / "files")
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise CorruptEntryError(str(error)) from None
        for name in sorted(recorded.keys() | files.keys()):
            if recorded.get(name) != files.get(name):
                state = "is missing" if name not in files else "was not recorded" if name not in recorded else "changed"
                raise CorruptEntryError(f"'{name}' {state}")
        return CachedOutput(folder / "files", digest_of(files), files, record, reused=True)

    def _make(self, stage: str, key: str, describe: Mapping[str, Any], make: Make) -> CachedOutput:
        temporary = self.root / "tmp" / f"{key}.{os.getpid()}"
        out, work, folder = temporary / "files", self.root / "work" / key, self._folder(stage, key)
        started = time.time()
        try:
            with disk_full_as_user_error(self.root, f"making stage '{stage}'"):
                out.mkdir(parents=True)
                work.mkdir(parents=True, exist_ok=True)
                with PeakMemory() as peak:
                    make(out, work)
                _readable(out)
                record = {
                    "stage": stage,
                    "key": key,
                    **describe,
                    "files": sha256_tree(out),
                    "seconds": round(time.time() - started, 3),
                    "peak_memory_bytes": peak.bytes,
                    "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                }
                write_json(temporary / "record.json", record, 2)
                sync_tree(temporary)
                folder.parent.mkdir(parents=True, exist_ok=True)
                temporary.rename(folder)
                sync(folder.parent)
        except BaseException:
            remove(temporary)
            raise
        self._forget_work(key)
        return CachedOutput(folder / "files", digest_of(record["files"]), record["files"], record, reused=False)

    def _forget_work(self, key: str) -> None:
        shutil.rmtree(self.root / "work" / key, ignore_errors=True)  # another process may be at it too

    def _set_aside(self, stage: str, key: str, problem: CorruptEntryError) -> None:
        aside = self.root / "corrupt" / key
        aside.parent.mkdir(exist_ok=True)
        remove(aside)
        self._folder(stage, key).rename(aside)
        self.log(f"warning: {stage}: a kept output is damaged ({problem}); set aside at '{aside}', making it again")

    def _folder(self, stage: str, key: str) -> Path:
        return self.root / "entries" / stage / key


def _readable(directory: Path) -> None:
    """Lets every user read the files: some libraries write weights for their owner alone, and a server is another.

    A script stays one that can be run.
    """
    for path in directory.rglob("*"):
        path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
