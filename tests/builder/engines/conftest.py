"""Fixtures that test files here share."""

import pytest

from plugins.libtwofour import bindings
from tests.support.stand_in_gpu import open_gpu, use_machine, use_torch
from tests.support.torch_models import tiny

__all__ = ["tiny"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> bindings.Context:
    """The builder sees a GPU, and what runs on it runs on the stand-in."""
    opened = open_gpu(monkeypatch)
    use_torch(monkeypatch, opened)
    use_machine(monkeypatch)
    return opened
