"""A TensorRT-LLM build by the command line, and a machine that has what it needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builder.engines.trtllm import sparsity_report, tensorrt, version_lock
from plugins.common.nvidia_smi import Gpu
from tests.support.command import done
from tests.support.models import cut_llama, write_recipe

ROOT = Path(__file__).parents[2]


H100 = Gpu("NVIDIA H100 80GB HBM3", 90, 80 << 30, 79 << 30, "580.1")


BUILD = ("--preset", "fp8-2of4-all", "--set", "sparsity.method=magnitude", "--set", "engine.backend=tensorrt")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def built(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `--until checkpoint` leaves for two ranks, on a machine without a GPU."""
    folder = tmp_path_factory.mktemp("built")
    recipe = write_recipe(folder / "recipe.yaml", model)
    done("build", recipe, *BUILD, "--set", "engine.tensor_parallel=2", "--until", "checkpoint",
         "--out", folder / "out", "--store", folder / "store")  # fmt: skip
    return folder / "out"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets which GPUs and packages this machine has."""

    def set_machine(cards: tuple[Gpu, ...] = (H100, H100), **packages: str) -> None:
        monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'tests' / 'stand_in'}:{ROOT}")
        monkeypatch.setattr(version_lock, "installed", packages.get)
        for module in (tensorrt, sparsity_report, version_lock):
            monkeypatch.setattr(module, "gpus", lambda: cards)

    return set_machine


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
