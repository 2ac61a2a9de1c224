"""One process a rank: side by side, ended together, with the cause of a failure first."""

import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest

from builder.engines.trtllm import build_errors, rank_processes
from plugins.common.errors import UserError


@pytest.fixture(autouse=True)
def kept_logs(tmp_path, monkeypatch):
    """Logs of failed ranks are kept in the test's own folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def run(tmp_path: Path, *codes: str) -> list[Path]:
    logs = [tmp_path / f"rank{rank}.log" for rank in range(len(codes))]
    rank_processes.run_ranks([[sys.executable, "-c", code] for code in codes], logs, [{}] * len(codes), "building")
    return logs


def test_ranks_run_side_by_side_and_keep_their_logs(tmp_path):
    logs = run(tmp_path, "print('zero')", "print('one')")
    assert [log.read_text() for log in logs] == ["zero\n", "one\n"]


def test_failed_rank_ends_the_others_and_its_cause_comes_first(tmp_path):
    marker = tmp_path / "survived"
    slow = f"import time, pathlib; time.sleep(30); pathlib.Path({str(marker)!r}).touch()"
    start = time.monotonic()
    with pytest.raises(UserError, match=r"rank 1 ended with status 1, '.*out of memory.*': the GPU ran out of memory"):
        run(tmp_path, slow, "raise SystemExit(print('[TRT] [E] Error: out of memory') or 1)")
    assert time.monotonic() - start < 15
    assert not marker.exists()


def test_killed_rank_is_named_with_its_signal(tmp_path):
    with pytest.raises(UserError, match="rank 0 was killed by SIGKILL"):
        run(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "import time; time.sleep(30)")


def test_the_log_of_a_failed_rank_outlives_the_engine_directory(tmp_path):
    engine = tmp_path / "engine"
    engine.mkdir()
    with pytest.raises(UserError) as refused:
        run(engine, "raise SystemExit(print('strange') or 1)")
    shutil.rmtree(engine)  # as a build does that fails
    kept = re.search(r"its log: '(.*)'", str(refused.value))
    assert Path(kept[1]).read_text() == "strange\n"


def test_children_of_a_rank_end_with_it(tmp_path):
    child = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    log = tmp_path / "rank0.log"
    with pytest.raises(UserError):
        rank_processes.run_ranks([[sys.executable, "-c", f"{child}; sys.exit(3)"]], [log], [{}], "building")
    pid = int(log.read_text())
    for _ in range(50):
        if not Path(f"/proc/{pid}").exists() or "zombie" in Path(f"/proc/{pid}/status").read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"process {pid}, started by the rank, still runs")


@pytest.mark.parametrize(
    ("log", "fragment"),
    [
        ("x\n[TRT] [E] getPluginCreator could not find plugin: Gemm version: 1\n", "plugin library is missing"),
        ("RuntimeError: SmoothQuant is not supported on SM>=100", "use quantization.format=fp8"),
        ("AssertionError: Unsupported model architecture: Gemma9ForCausalLM", "does not support the architecture"),
        ("ModuleNotFoundError: No module named 'plugins'", "package is missing"),
        ("all fine\nValueError: strange thing\nmore", "'ValueError: strange thing'"),
        ("", "it wrote nothing"),
    ],
)
def test_failure_is_explained(log, fragment):
    assert fragment in build_errors.explain(log)


def test_code_that_a_traceback_quotes_is_not_what_happened():
    log = 'Traceback:\n  File "x.py", line 3\n    raise Oh("out of memory")\n    ^^^^^\nValueError: the real one\n'
    assert build_errors.explain(log) == "'ValueError: the real one'"


def test_the_first_cause_is_reported_not_its_consequence():
    log = "CUDA out of memory\n" + "x\n" * 10 + "getPluginCreator could not find plugin: Gemm"
    assert "ran out of memory" in build_errors.explain(log)
