"""Every test of this folder needs a GPU with sparse tensor cores. The tests themselves import no pytest, so that
`python -m benchmarks.gpu` runs them on machines without it."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    missing = not torch.cuda.is_available()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if missing:
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))
