"""The files of a finished build under random damage: every command ends in 0, 1 or 2, never in a traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.command import done, twofour
from tests.support.damage import altered, damaged
from tests.support.models import cut_llama, write_recipe

FILES = (
    "checkpoint/config.json",
    "checkpoint/hf_quant_config.json",
    "checkpoint/sparsity.json",
    "engine/config.json",
    "engine/engine.json",
    "engine/tactics.json",
    "engine/sparsity.json",
    "engine/generation_config.json",
    "manifest.json",
    "plan.json",
    "recipe.yaml",
)
COMMANDS = ("verify", "explain", "engine", "deploy", "load")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished build of two blocks."""
    place = tmp_path_factory.mktemp("build")
    recipe = write_recipe(place / "recipe.yaml", cut_llama(place / "model"), accuracy={"data": None}, benchmark=None)
    options = ("--preset", "fp8-2of4-all", "--set", "sparsity.method=magnitude", "--set", "engine.backend=torch")
    done("build", recipe, *options, "--out", place / "out", "--store", place / "store", "--json")
    return place / "out"


def run(command: str, build: Path, scratch: Path) -> int:
    if command == "load":
        return _load(build)
    if command == "engine":
        return twofour("engine", build / "checkpoint", "--out", scratch / "engine", "--backend", "torch").status
    return twofour(command, build).status


def _load(build: Path) -> int:
    """Opening the engine and its recipe, as `evaluate`, `bench` and the server do."""
    from builder.engines import registry
    from builder.pipeline.rebuild import _recipe
    from plugins.common.errors import GateError, UserError

    try:
        _recipe(build)
        registry.load(build / "engine")
    except UserError:
        return 2
    except GateError:
        return 1
    return 0


@pytest.mark.parametrize("name", FILES)
def test_no_command_shows_a_traceback(name: str, whole: Path, tmp_path: Path) -> None:
    if not (whole / name).is_file():
        pytest.skip("this build has no such file")
    build = tmp_path / "out"
    shutil.copytree(whole, build)
    content = (whole / name).read_bytes()
    values = st.nothing() if name.endswith(".yaml") else altered(json.loads(content))

    @given(damaged(content) | values.map(lambda value: json.dumps(value).encode()), st.sampled_from(COMMANDS))
    def check(data: bytes, command: str) -> None:
        (build / name).write_bytes(data)
        status = run(command, build, tmp_path / "scratch")
        assert status in (0, 1, 2)
        if command == "verify" and data != content and name != "manifest.json":
            assert status != 0, "the manifest names the file's hash"
        shutil.rmtree(tmp_path / "scratch", ignore_errors=True)

    check()
