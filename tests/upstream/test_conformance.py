"""The conformance script, where a real TensorRT-LLM can be had: TWOFOUR_TENSORRT_LLM names its tree or site-packages.

TWOFOUR_TENSORRT_LLM_PYTHON names the interpreter to run it with, by default this one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TREE = os.environ.get("TWOFOUR_TENSORRT_LLM")


@pytest.mark.slow
@pytest.mark.skipif(TREE is None, reason="no TensorRT-LLM: set TWOFOUR_TENSORRT_LLM to a source tree or site-packages")
def test_our_code_holds_against_the_real_classes() -> None:
    python = os.environ.get("TWOFOUR_TENSORRT_LLM_PYTHON", sys.executable)
    command = [python, "-W", "ignore", str(Path(__file__).with_name("conformance.py")), str(TREE)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout
    assert "ok    sparse layers, FP8" in ran.stdout


def test_a_directory_without_tensorrt_llm_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("conformance.py")), str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert ran.stderr == f"'{tmp_path}' contains no tensorrt_llm/version.py: give a source tree, or site-packages\n"
