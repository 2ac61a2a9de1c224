"""A published build and its manifest: what may be replaced, kills, full disks, and damage that the manifest finds."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from builder.artifacts.cache import Cache, CachedOutput
from builder.artifacts.install import claimed, publish
from builder.artifacts.manifest import make_manifest, read_manifest, record_folder, verify_manifest
from plugins.common.errors import UserError
from tests.support.small_disk import mounted

KEY = "0" * 64


def write_one(text: bytes) -> Any:
    def make(out: Path, work: Path) -> None:
        (out / "weights.bin").write_bytes(text)

    return make


def write_two(out: Path, work: Path) -> None:
    """One file small enough to be copied, one so large that it is linked."""
    (out / "config.json").write_text("{}")
    (out / "a.bin").write_bytes(bytes(4 << 20))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.fixture
def store(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "store")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    yield from mounted(tmp_path / "disk", 2)


def build(entry: CachedOutput, out: Path) -> None:
    subjects = {f"checkpoint/{name}": digest for name, digest in entry.files.items()}
    manifest = make_manifest(
        subjects, recipe={"model": "m"}, tools={"torch": "2"}, gpu=None, sources={"model": "ab"}, stages=[entry],
        started="2026-01-01T00:00:00Z", finished="2026-01-01T00:00:01Z",
    )  # fmt: skip
    with claimed(out) as place:
        publish({"checkpoint": entry.path}, place, {"manifest.json": json.dumps(manifest).encode()})


@pytest.fixture
def entry(store: Cache) -> CachedOutput:
    return store.run("export", KEY, {}, write_two)


def test_a_build_is_published_whole_with_large_files_linked(entry: CachedOutput, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    build(entry, out)
    assert verify_manifest(out) == []
    assert os.path.samefile(out / "checkpoint/a.bin", entry.path / "a.bin")
    assert not (out / "checkpoint/a.bin").is_symlink()
    assert names(out.parent) == ["out"]


def test_small_files_are_copies_that_may_be_edited(store: Cache, tmp_path: Path) -> None:
    entry = store.run("s", KEY, {}, write_one(b"w"))
    build(entry, tmp_path / "out")
    (tmp_path / "out/checkpoint/weights.bin").write_bytes(b"edited")
    assert store.run("s", KEY, {}, write_one(b"w")).reused


def test_a_later_build_replaces_an_earlier_one(store: Cache, entry: CachedOutput, tmp_path: Path) -> None:
    build(entry, tmp_path / "out")
    build(store.run("s", KEY + "1", {}, write_one(b"w")), tmp_path / "out")
    assert names(tmp_path / "out/checkpoint") == ["weights.bin"]
    assert names(tmp_path) == ["out", "store"]


def test_an_empty_folder_may_be_built_into(entry: CachedOutput, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    build(entry, tmp_path / "out")
    assert verify_manifest(tmp_path / "out") == []


def _foreign(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")


def _foreign_manifest(out: Path) -> None:
    out.mkdir()
    (out / "manifest.json").write_text('{"name": "a web app"}')


@pytest.mark.parametrize(
    ("prepare", "fragment"),
    [
        (_foreign, "holds 'thesis.tex' and is not an earlier build"),
        (_foreign_manifest, "holds 'manifest.json' and is not an earlier build"),
        (lambda out: out.write_text(""), "is a file"),
    ],
)
def test_publishing_over_something_else_is_refused(
    entry: CachedOutput, tmp_path: Path, prepare: Any, fragment: str
) -> None:
    out = tmp_path / "out"
    prepare(out)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=fragment):
        build(entry, out)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_that_the_user_put_into_a_build_is_not_deleted(entry: CachedOutput, tmp_path: Path) -> None:
    build(entry, tmp_path / "out")
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"contains 'notes\.txt', which twofour did not create"):
        build(entry, tmp_path / "out")
    assert (tmp_path / "out/notes.txt").read_text() == "mine"


def test_a_build_cannot_replace_what_it_is_made_from(tmp_path: Path) -> None:
    out = tmp_path / "out"
    entry = Cache(tmp_path / "store").run("s", KEY, {}, write_one(b"w"))
    build(entry, out)
    with claimed(out) as place, pytest.raises(UserError, match="an input of the build"):
        publish({"checkpoint": out / "checkpoint"}, place, {})
    assert verify_manifest(out) == []


def test_two_builds_into_one_folder(entry: CachedOutput, tmp_path: Path) -> None:
    with claimed(tmp_path / "out"), pytest.raises(UserError, match=f"process {os.getpid()} is building"):
        build(entry, tmp_path / "out")
    assert names(tmp_path) == ["store"]


PUBLISHER = """
import json, sys
from pathlib import Path
from builder.artifacts.install import claimed, publish
out, source = Path(sys.argv[1]), Path(sys.argv[2])
manifest = (out / "manifest.json").read_bytes()
print("ready", flush=True)
while True:
    with claimed(out) as place:
        publish({"checkpoint": source}, place, {"manifest.json": manifest})
"""


@pytest.mark.slow
def test_kill_while_publishing_leaves_a_whole_build(entry: CachedOutput, tmp_path: Path) -> None:
    out, chance = tmp_path / "out", random.Random(1)
    build(entry, out)
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", PUBLISHER, out, entry.path], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        with claimed(out):
            assert verify_manifest(out) == []
        assert names(tmp_path) == ["out", "store"]


# The manifest


def test_the_manifest_is_an_in_toto_statement(entry: CachedOutput, tmp_path: Path) -> None:
    build(entry, tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest["_type"] == "https://in-toto.io/Statement/v1"
    assert manifest["subject"][0] == {"name": "checkpoint/a.bin", "digest": {"sha256": entry.files["a.bin"]}}
    stage = manifest["predicate"]["runDetails"]["byproducts"][0]
    assert (stage["name"], stage["annotations"]["key"]) == ("export", KEY)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda out: (out / "checkpoint/a.bin").unlink(), "'checkpoint/a.bin' is missing"),
        (lambda out: (out / "checkpoint/c.bin").write_bytes(b""), "'checkpoint/c.bin' is not in the manifest"),
        (lambda out: (out / "manifest.json").write_text("{}"), "holds no manifest.json of a build"),
    ],
)
def test_the_manifest_finds_damage(entry: CachedOutput, tmp_path: Path, damage: Any, problem: str) -> None:
    build(entry, tmp_path / "out")
    damage(tmp_path / "out")
    problems = verify_manifest(tmp_path / "out")
    assert len(problems) == 1
    assert problem in problems[0]


def test_the_manifest_finds_a_changed_byte(store: Cache, tmp_path: Path) -> None:
    build(store.run("s", KEY, {}, write_one(b"w")), tmp_path / "out")
    (tmp_path / "out/checkpoint/weights.bin").write_bytes(b"v")
    assert verify_manifest(tmp_path / "out") == [
        "'checkpoint/weights.bin' changed: its sha256 is not the manifest's"
    ]  # fmt: skip


def test_a_manifest_that_leads_out_of_the_build(entry: CachedOutput, tmp_path: Path) -> None:
    build(entry, tmp_path / "out")
    path = tmp_path / "out/manifest.json"
    path.write_text(path.read_text().replace("checkpoint/a.bin", "../../etc/passwd"))
    assert "'../../etc/passwd' leads out of the build" in verify_manifest(tmp_path / "out")


def test_a_folder_written_later_is_recorded(entry: CachedOutput, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(entry, out)
    (out / "triton").mkdir()
    (out / "triton/config.pbtxt").write_text("name: 'm'")
    assert verify_manifest(out) == ["'triton/config.pbtxt' is not in the manifest"]
    record_folder(out, "triton")
    assert verify_manifest(out) == []
    build(entry, out)
    assert verify_manifest(out) == []


def test_publishing_to_a_full_disk_keeps_the_earlier_build(store: Cache, small_disk: Path) -> None:
    build(store.run("s", KEY, {}, write_one(b"w")), small_disk / "out")
    big = store.run("s", KEY + "1", {}, write_two)
    with pytest.raises(UserError, match="the disk is full at"):
        build(big, small_disk / "out")
    assert verify_manifest(small_disk / "out") == []
    assert names(small_disk) == ["out"]
