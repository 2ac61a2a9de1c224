from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.pruning.fractions import build
from plugins.common.errors import UserError


def test_a_build_that_fails_gives_its_own_reason(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: nowhere\n")
    with pytest.raises(UserError, match=r"ended with status 2: error: .*sparsity.speed"):
        build(recipe, ["sparsity.speed=9"], tmp_path / "out", None)
