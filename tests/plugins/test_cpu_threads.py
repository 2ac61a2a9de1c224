"""The threads of libtwofour_cpu under phases that follow one another at once."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from plugins.libtwofour import cpu_compiler

PHASES = 3_000_000
STRESS = Path(__file__).with_name("threads_stress.cpp")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the test with")
def test_every_chunk_is_taken_once_whatever_phase_a_late_worker_comes_from(tmp_path: Path) -> None:
    """A worker stopped between two reads once took a chunk of the next phase, and the caller waited for ever."""
    program = tmp_path / "stress"
    sources = (STRESS, cpu_compiler.SOURCES / "threads.cpp")
    command = ["g++", "-O2", "-std=c++17", "-pthread", "-I", cpu_compiler.SOURCES, *sources, "-o", program]
    subprocess.run(list(map(str, command)), check=True)
    done = subprocess.run([program, str(PHASES)], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "0"
