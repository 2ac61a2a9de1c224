"""A model whose files a test may change."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.models import random_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return random_model(tmp_path / "model", "Llama")
