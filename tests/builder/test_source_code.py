"""The code digest of a stage: it follows the source of everything that the stage calls."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from builder.artifacts import source_code
from builder.pipeline.stages import STAGES

ROOT = Path(source_code.__file__).parents[2]


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of calibration/ that the digest reads in place of the real one."""
    folder = tmp_path / "calibration"
    shutil.copytree(ROOT / "calibration", folder)
    real = source_code._source.__wrapped__

    def source(module: str) -> Path | None:
        path = real(module)
        inside = path is not None and module.split(".")[0] == "calibration"
        return folder / path.relative_to(ROOT / "calibration") if inside else path

    monkeypatch.setattr(source_code, "_source", source)
    source_code._imports.cache_clear()
    return folder


def test_a_changed_solver_changes_the_digest_and_a_changed_evaluation_does_not(packages: Path) -> None:
    modules = ("calibration.pruning.sparsify",)
    before = source_code.code_digest(modules)
    (packages / "evaluation" / "lm_eval.py").write_text("# changed\n")
    assert source_code.code_digest(modules) == before
    solver = packages / "pruning" / "solvers" / "hessian.py"
    solver.write_text(solver.read_text() + "# changed\n")
    assert source_code.code_digest(modules) != before


def test_every_stage_names_modules_that_exist() -> None:
    for stage in STAGES:
        assert source_code.code_digest(stage.code)
        assert "twofour" in stage.tools, "a new release makes every output again"


def test_text_adds_to_the_digest() -> None:
    assert source_code.code_digest((), "a") != source_code.code_digest((), "b")
