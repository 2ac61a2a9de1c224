"""The store under kills, two writers, damage and full disks. Children are real processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from builder.artifacts.cache import Cache, CachedOutput, key
from plugins.common.errors import UserError
from tests.support.stage_cache import KEY, PARTS, names, write_one


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "quantize"},
        {"inputs": {"model": "ac"}},
        {"inputs": {"source": "ab"}},
        {"config": {"method": "magnitude"}},
        {"code": "ce"},
        {"tools": {"t": "2.1"}},
    ],
)
def test_anything_that_goes_in_changes_the_key(change: dict[str, Any]) -> None:
    assert key(**{**PARTS, **change}) != KEY


def test_the_order_of_keys_does_not_change_the_key() -> None:
    first = key("s", {"a": "1", "b": "2"}, {"x": 1, "y": [1, 2]}, 1, {})
    assert first == key("s", {"b": "2", "a": "1"}, {"y": [1, 2], "x": 1}, 1, {})


def test_a_config_that_is_not_json_has_no_key() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        key("s", {}, {"x": float("nan")}, 1, {})


def test_a_finished_output_is_reused_without_making_it(store: Cache) -> None:
    made = store.run("sparsify", KEY, {"inputs": PARTS["inputs"]}, write_one(b"w"))
    again = store.run("sparsify", KEY, {}, lambda out, work: pytest.fail("made again"))
    assert (made.reused, again.reused) == (False, True)
    assert made.digest == again.digest
    assert again.record["inputs"] == {"model": "ab"}
    assert again.record["seconds"] >= 0
    assert again.record["peak_memory_bytes"] > 1 << 20


def test_the_digest_follows_content_and_names(store: Cache) -> None:
    def renamed(out: Path, work: Path) -> None:
        (out / "other.bin").write_bytes(b"w")

    digests = [store.run("s", KEY[:-1] + end, {}, make).digest for end, make in
               (("0", write_one(b"w")), ("1", write_one(b"w")), ("2", write_one(b"v")), ("3", renamed))]  # fmt: skip
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def _change(entry: CachedOutput) -> None:
    """Same size, same time of change: only hashing finds it."""
    path = entry.path / "weights.bin"
    before = path.stat()
    path.write_bytes(b"x")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _truncate_record(entry: CachedOutput) -> None:
    record = entry.path.parent / "record.json"
    record.write_bytes(record.read_bytes()[:-20])


def _link(entry: CachedOutput) -> None:
    path = entry.path / "weights.bin"
    path.rename(entry.path.parent / "moved")
    path.symlink_to(entry.path.parent / "moved")


@pytest.mark.parametrize(
    ("damage", "fragment"),
    [
        (_change, "'weights.bin' changed"),
        (lambda entry: (entry.path / "weights.bin").unlink(), "'weights.bin' is missing"),
        (lambda entry: (entry.path / "new").write_bytes(b""), "'new' was not recorded"),
        (_truncate_record, ""),
        (_link, "not a regular file"),
        (lambda entry: (entry.path.parent / "record.json").write_text("[]"), ""),
    ],
)
def test_a_damaged_entry_is_set_aside_with_one_line_and_made_again(
    store: Cache, lines: list[str], damage: Any, fragment: str
) -> None:
    first = store.run("sparsify", KEY, {}, write_one(b"w"))
    damage(first)
    again = store.run("sparsify", KEY, {}, write_one(b"w"))
    assert not again.reused
    assert again.digest == first.digest
    assert len(lines) == 1
    assert lines[0].startswith("warning: sparsify: a kept output is damaged")
    assert fragment in lines[0]
    assert names(store.root / "corrupt") == [KEY]
    assert store.run("sparsify", KEY, {}, write_one(b"w")).reused


def test_a_stage_that_fails_leaves_no_entry_but_keeps_its_work(store: Cache) -> None:
    def fail(out: Path, work: Path) -> None:
        (work / "block0").write_bytes(b"0")
        (out / "half").write_bytes(b"h")
        raise RuntimeError("solver")

    with pytest.raises(RuntimeError, match="solver"):
        store.run("sparsify", KEY, {}, fail)
    assert store.find("sparsify", KEY) is None
    assert names(store.root / "tmp") == []

    def go_on(out: Path, work: Path) -> None:
        assert names(out) == []
        (work / "block0").rename(out / "block0")

    assert set(store.run("sparsify", KEY, {}, go_on).files) == {"block0"}
    assert names(store.root / "work") == []


def test_a_stage_that_leaves_a_link_is_a_bug_that_shows(store: Cache) -> None:
    with pytest.raises(ValueError, match="not a regular file"):
        store.run("s", KEY, {}, lambda out, work: (out / "link").symlink_to("/etc/passwd"))
    assert store.find("s", KEY) is None


def test_a_store_that_cannot_be_kept_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the cache '.*' cannot be written"):
        Cache(tmp_path / "file" / "store")
