"""The stage cache under kills, other processes and a full disk."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from builder.artifacts.cache import Cache
from builder.artifacts.filesystem import locked
from plugins.common.errors import UserError
from tests.support.small_disk import mounted
from tests.support.stage_cache import KEY, names, write_one

CHILD = """
import os, sys, time
from pathlib import Path
from builder.artifacts.cache import Cache

def make(out, work):  # twelve blocks, each kept in `work` when it is finished, as sparsify does
    for block in range(12):
        kept = work / f"{block}"
        if not kept.exists():
            part = work / f"{block}.part"
            part.write_bytes(bytes([block]) * 50_000)
            time.sleep(0.02)
            part.rename(kept)
            with open(sys.argv[2], "a") as made:
                made.write(f"{block}\\n")
    (out / "deep").mkdir()
    for block in range(12):
        (out / "deep" / f"{block}.bin").write_bytes((work / f"{block}").read_bytes())
    (out / "all.bin").write_bytes(b"".join((work / f"{block}").read_bytes() for block in range(12)))

print("ready", flush=True)
entry = Cache(Path(sys.argv[1])).run("sparsify", sys.argv[3], {}, make)
print(entry.digest, "reused" if entry.reused else "made", flush=True)
"""


def child(store: Path, made: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", CHILD, store, made, KEY], stdout=subprocess.PIPE, text=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    yield from mounted(tmp_path / "disk", 2)


@pytest.mark.slow
def test_kill_at_random_moments_then_the_same_bytes(tmp_path: Path) -> None:
    calm = child(tmp_path / "calm", tmp_path / "calm.made")
    digest = calm.communicate()[0].split()[1]
    chance, root, kills = random.Random(0), tmp_path / "store", 0
    for _ in range(10):
        process = child(root, tmp_path / "made")
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.uniform(0, 0.06))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    process = child(root, tmp_path / "made")
    assert process.communicate()[0].split()[1] == digest
    assert kills >= 5
    assert [names(root / folder) for folder in ("tmp", "work", "locks", "corrupt")] == [[], [], [], []]
    blocks = (tmp_path / "made").read_text().split()
    assert len(blocks) <= 12 + kills, "finished blocks were made again"


def test_kill_at_each_step_of_finishing(store: Cache) -> None:
    """A forked child kills itself at its n-th sync or rename, for every n; then the stage must still end well."""
    digest = store.run("calm", KEY, {}, _nested).digest
    for step in range(100):
        stage = f"stage{step}"
        if _dies_at(step, lambda name=stage: store.run(name, KEY, {}, _nested)) is False:
            break
        entry = store.run(stage, KEY, {}, _nested)
        assert entry.digest == digest
        assert [names(store.root / folder) for folder in ("tmp", "work", "corrupt")] == [[], [], []]
    assert 5 < step < 99


def _nested(out: Path, work: Path) -> None:
    (out / "deep").mkdir()
    (out / "deep/a").write_bytes(b"a")
    (out / "b").write_bytes(b"b")


def _dies_at(step: int, run: Any) -> bool:
    """Whether `run`, in a child that is killed at its `step`-th durable operation, was killed before it ended."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def or_die(operation: Any) -> Any:
            def counted(*arguments: Any) -> Any:
                nonlocal count
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                return operation(*arguments)

            return counted

        os.fsync, Path.rename = or_die(os.fsync), or_die(Path.rename)  # type: ignore[method-assign]
        os.unlink = or_die(os.unlink)
        run()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_two_processes_on_one_key_make_it_once(tmp_path: Path) -> None:
    processes = [child(tmp_path / "store", tmp_path / "made") for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    digests = {output.splitlines()[-1].split()[0] for output in outputs}
    states = sorted(output.split()[-1] for output in outputs)
    assert len(digests) == 1
    assert states == ["made", "reused"]
    waiting = next(output for output in outputs if output.endswith("reused\n")).splitlines()
    maker = processes[[output.endswith("made\n") for output in outputs].index(True)]
    assert waiting[1:-1] in ([], [f"sparsify: process {maker.pid} is making the same output; waiting for it"])
    assert len((tmp_path / "made").read_text().split()) == 12


def test_a_process_that_does_not_wait_gets_the_running_process_id(store: Cache, tmp_path: Path) -> None:
    process = child(store.root, tmp_path / "made")
    while not (tmp_path / "made").exists():
        time.sleep(0.005)
    with pytest.raises(UserError, match=f"process {process.pid} is running stage 'sparsify'"):
        store.run("sparsify", KEY, {}, write_one(b"w"), wait=False)
    process.communicate()


def test_a_process_that_waits_prints_it_once_and_reuses(store: Cache, lines: list[str], tmp_path: Path) -> None:
    process = child(store.root, tmp_path / "made")
    while not (tmp_path / "made").exists():
        time.sleep(0.005)
    assert store.run("sparsify", KEY, {}, lambda out, work: pytest.fail("made again")).reused
    assert lines == [f"sparsify: process {process.pid} is making the same output; waiting for it"]
    process.communicate()


def _python_writer(out: Path, work: Path) -> None:
    (out / "a.bin").write_bytes(bytes(1 << 20))
    (out / "b.bin").write_bytes(bytes(4 << 20))


def _safetensors_writer(out: Path, work: Path) -> None:
    safetensors.numpy.save_file({"w": np.zeros(4 << 20, np.int8)}, out / "model.safetensors")


@pytest.mark.parametrize("make", [_python_writer, _safetensors_writer])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(small_disk: Path, make: Any) -> None:
    store = Cache(small_disk / "store")
    with pytest.raises(UserError) as caught:
        store.run("export", KEY, {}, make)
    assert "\n" not in str(caught.value)
    assert f"the disk is full at '{small_disk / 'store'}'" in str(caught.value)
    assert "MB free) while making stage 'export'" in str(caught.value)
    assert store.find("export", KEY) is None
    assert names(store.root / "tmp") == []
    assert not store.run("export", KEY, {}, write_one(b"fits")).reused


def test_a_holder_that_has_not_written_its_name_yet_is_named_all_the_same(tmp_path: Path) -> None:
    lock, pids = tmp_path / "lock", []
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        def write_late() -> None:
            time.sleep(0.2)
            lock.write_text("4321")

        def give_up(pid: str) -> None:
            pids.append(pid)
            raise UserError(pid)

        late = threading.Thread(target=write_late)
        late.start()
        with pytest.raises(UserError), locked(lock, give_up):
            pass
        late.join()
    assert pids == ["4321"]
