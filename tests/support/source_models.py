"""A model whose files a test may change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.models import random_model


@pytest.fixture(scope="session")
def untrained_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("models") / "llama", "Llama")


@pytest.fixture
def model(untrained_llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(untrained_llama, tmp_path / "model"))
