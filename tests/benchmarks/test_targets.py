"""Results of a GPU held against the targets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.kernels import targets

FIRST_RUN = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu-h200-2026-11-26-0429.json"


def test_the_first_run_is_judged_row_by_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert targets.main([str(FIRST_RUN)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(targets.TARGETS)
    assert lines[-2].startswith("| engine, decode of 8 requests, over dense FP8 | 1.35x | 1 | 1.06x")
    assert lines[-2].endswith("| 0 of 1 |")


def test_int8_is_also_held_against_dense_fp8() -> None:
    row = {
        "model": "m",
        "layer": "down_proj",
        "tokens": 1024,
        "dense": "cublaslt",
        "sparse": "cusparselt",
        "ratio": 2.0,
    }
    both = [{**row, "format": "fp8", "kernels_us": {"cublaslt": 30.0, "cusparselt": 20.0}},
            {**row, "format": "int8", "kernels_us": {"cublaslt": 50.0, "cusparselt": 25.0}}]  # fmt: skip
    assert targets.against_fp8({"steps": {"table": {"result": {"rows": both}}}}) == [1.2]


def test_what_was_not_measured_is_named() -> None:
    assert all("not measured" in line for line in list(targets.table({"steps": {}}))[2:])


@pytest.mark.parametrize("text", ["", "[]", '{"steps": 3}', json.dumps({"steps": {"table": []}})])
def test_another_file_is_refused_in_a_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text(text)
    assert targets.main([str(tmp_path / "other.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
