"""A model to damage, and a build that must refuse it in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.command import nothing_left, refused
from tests.support.models import cut_llama

FEW_TOKENS = ("--set", "calibration.samples=8", "--set", "calibration.sequence_length=64")


FAST = ("--set", "sparsity.method=magnitude")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., str]:
    """Starts a build that must be refused, and sees that it leaves nothing in OUT and no output in the store."""

    def run(model: object, *options: object, preset: str = "fp8") -> str:
        out, store = tmp_path / "out", tmp_path / "store"
        fragment = refused(
            "build", model, "--preset", preset, *FEW_TOKENS, *options, "--out", out, "--store", store, "--json"
        )
        assert nothing_left(out)
        assert not list((store / "tmp").glob("*"))
        return fragment

    return run
