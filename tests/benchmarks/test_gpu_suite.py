"""The GPU suite's runner, on steps that need no GPU: what each leaves, however it ends."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.kernels import gpu_suite
from plugins.common.errors import UserError
from plugins.libtwofour import compiler

WRITE = "import sys, json, pathlib; pathlib.Path(sys.argv[1]).write_text(json.dumps({'rows': [1]})); "


def step(name: str, code: str, seconds: float = 20.0, resumes: bool = False) -> gpu_suite.Step:
    return gpu_suite.Step(name, ("-c", code, "{out}"), seconds, resumes)


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "GRACE", 0.5)
    monkeypatch.setattr(gpu_suite, "LEAST", 0.1)


def test_steps_after_a_crash_still_run_and_its_rows_are_kept(tmp_path: Path) -> None:
    crash = step("table", WRITE + "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    fails = step("engine", "raise SystemExit('error: no memory')")
    results = gpu_suite.run([crash, fails, step("tests", WRITE)], 60, tmp_path / "gpu.json")
    assert json.loads((tmp_path / "gpu.json").read_text()) == results
    steps = results["steps"]
    assert steps["table"]["result"] == {"rows": [1]}
    assert steps["table"]["error"].startswith("exit status -11")
    assert steps["engine"]["error"] == "exit status 1: error: no memory"
    assert "error" not in steps["tests"]
    assert sorted(tmp_path.iterdir()) == [tmp_path / "gpu.json"]


def test_a_step_over_its_time_is_ended_with_its_children(tmp_path: Path) -> None:
    hangs = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    begin = time.monotonic()
    outcome = gpu_suite.run_step(step("hangs", WRITE + hangs, 0.5), 60, tmp_path)
    assert time.monotonic() - begin < 10
    assert outcome["error"] == "stopped after 1 s"
    assert outcome["result"] == {"rows": [1]}


def test_a_step_without_time_left_is_named(tmp_path: Path) -> None:
    results = gpu_suite.run([step("late", WRITE)], 0.3, tmp_path / "gpu.json")
    assert results["steps"]["late"] == {"error": "not run: 0 s are left"}


def test_tests_go_on_after_the_one_that_lost_cuda(tmp_path: Path) -> None:
    """Each run adds an outcome and loses CUDA, until all three are there."""
    code = (
        "import sys, json, pathlib; file = pathlib.Path(sys.argv[1]); "
        "done = json.loads(file.read_text()) if file.exists() else {}; done[str(len(done))] = 'passed'; "
        f"file.write_text(json.dumps(done)); raise SystemExit(0 if len(done) == 3 else {gpu_suite.CUDA_LOST})"
    )
    outcome = gpu_suite.run_step(step("tests", code, resumes=True), 60, tmp_path)
    assert outcome["result"] == dict.fromkeys("012", "passed")
    assert "error" not in outcome


def test_a_crash_without_a_new_outcome_ends_the_step(tmp_path: Path) -> None:
    outcome = gpu_suite.run_step(step("tests", f"raise SystemExit({gpu_suite.CUDA_LOST})", resumes=True), 60, tmp_path)
    assert outcome["error"].startswith("exit status 3")


def test_failed_tests_and_steps_are_listed() -> None:
    steps = {"products": {"result": {"a": "passed", "b": "failed: 1 != 2"}}, "build": {"error": "no nvcc"}}
    assert gpu_suite.failures({"steps": steps}) == ["b: failed: 1 != 2", "build: no nvcc"]


def test_results_are_named_by_gpu_and_date(tmp_path: Path) -> None:
    assert gpu_suite.results_file(tmp_path, "NVIDIA H100 80GB HBM3").name.startswith("gpu-h100-80gb-hbm3-20")


def test_every_step_is_a_command_that_exists() -> None:
    modules = {step.arguments[1] for step in (*gpu_suite.SMOKE, *gpu_suite.FULL)} - {"pytest"}
    for module in modules:
        assert (gpu_suite.ROOT / f"{module.replace('.', '/')}.py").exists(), module


def test_a_full_disk_prints_what_it_cannot_keep_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, content: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gpu_suite, "write_json", full)
    results = gpu_suite.run([step("first", WRITE), step("second", WRITE)], 60, tmp_path / "gpu.json")
    assert list(results["steps"]) == ["first", "second"]
    assert "the result of first: " in capsys.readouterr().out


def test_a_killed_parent_leaves_what_the_step_had_written(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from benchmarks.kernels.gpu_suite import Step, run; import sys; "
        f"steps = [Step('first', ('-c', {WRITE!r}, '{{out}}'), 30.0), "
        f"Step('second', ('-c', {WRITE + 'import time; time.sleep(4)'!r}, '{{out}}'), 30.0)]; "
        "run(steps, 60, Path(sys.argv[1]) / 'gpu.json')"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=gpu_suite.ROOT)
    part, deadline = tmp_path / "second.part.json", time.monotonic() + 30
    while not part.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    assert json.loads((tmp_path / "gpu.json").read_text())["steps"]["first"]["result"] == {"rows": [1]}
    assert json.loads(part.read_text()) == {"rows": [1]}


def test_without_a_compiler_the_build_step_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> str:
        raise UserError("no nvcc found: install the CUDA toolkit 12.8 or newer, or set CUDA_HOME")

    monkeypatch.setattr(compiler, "find_nvcc", missing)
    assert compiler.main(["--out", str(tmp_path / "build.json")]) == 2
    assert capsys.readouterr().err.startswith("error: no nvcc found: install the CUDA toolkit")
