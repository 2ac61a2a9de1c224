"""Wrong recipes, options, places and commands: one line each, and nothing half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.bad_input import FAST
from tests.support.command import done, nothing_left, refused
from tests.support.models import write_recipe
from tests.support.small_disk import mounted


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("sparsity.metod=wanda", "unknown recipe key 'sparsity.metod' (did you mean 'method'?)"),
        ("quantisation.format=fp8", "unknown recipe key 'quantisation' (did you mean 'quantization'?)"),
        ("accuracy.max_perplexity_increase=5000%", "recipe key 'accuracy.max_perplexity_increase' is '5000%'"),
        ("accuracy.min_top1_agreement=-1%", "recipe key 'accuracy.min_top1_agreement' is '-1%'"),
        ("accuracy.max_perplexity_increase=many%", "recipe key 'accuracy.max_perplexity_increase' is 'many%'"),
        ("sparsity.pattern=1:4", "recipe key 'sparsity.pattern'"),
        ("quantization.activations=per_token", "activations per_token needs format int8"),
        ("quantization.format=int4", "recipe key 'quantization.format' is 'int4'"),
        ("calibration.samples=0", "recipe key 'calibration.samples' is 0"),
        ("sparsity.layers=[nothing]", "sparsity.layers 'nothing' matches no linear layer"),
        ("samples", "--set 'samples' is not KEY=VALUE"),
        ("sparsity.layers=[*.mlp]", "--set 'sparsity.layers=[*.mlp]': the value is not YAML; quote it"),
    ],
)
def test_recipe_keys(build: Callable[..., str], model: Path, override: str, fragment: str) -> None:
    assert fragment in build(model, "--set", override)


def test_an_unknown_preset_and_gpu(build: Callable[..., str], model: Path) -> None:
    assert "no preset 'fp8-2of5' (did you mean 'fp8-2of4'?)" in build(model, preset="fp8-2of5")
    assert "'H1000'" in build(model, "--gpu", "H1000")


def test_an_option_that_does_not_exist(build: Callable[..., str], model: Path) -> None:
    assert "'--until'" in build(model, "--until", "tomorrow")
    assert "--untill" in build(model, "--untill", "engine")


def test_an_output_directory_that_holds_something_else(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.tex").write_text("mine")
    message = refused("build", model, "--preset", "fp8", "--out", out, "--store", tmp_path / "store", "--json")
    assert message.startswith(f"'{out}' holds 'chapter1.tex' and is not an earlier build")
    assert [path.name for path in out.iterdir()] == ["chapter1.tex"]
    message = refused("build", model, "--preset", "fp8", "--out", out / "chapter1.tex", "--json")
    assert "is a file: choose another --out" in message


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB: enough for the calibration stage, too little for the weights."""
    yield from mounted(tmp_path / "disk", 3)


@pytest.mark.parametrize("preset", ["fp8", "2of4-all"])
def test_a_full_disk_under_the_store(model: Path, tmp_path: Path, small_disk: Path, preset: str) -> None:
    out, recipe = tmp_path / "out", write_recipe(tmp_path / "recipe.yaml", model)
    method = FAST if preset == "2of4-all" else ()
    message = refused("build", recipe, "--preset", preset, *method, "--out", out, "--store", small_disk, "--json")
    assert message.startswith(f"the disk is full at '{small_disk}'")
    assert nothing_left(out)
    assert not list((small_disk / "tmp").iterdir())


def test_a_full_disk_under_the_output(model: Path, tmp_path: Path, small_disk: Path) -> None:
    out, recipe = small_disk / "out", write_recipe(tmp_path / "recipe.yaml", model)
    message = refused("build", recipe, "--preset", "fp8", "--until", "checkpoint",
                    "--out", out, "--store", tmp_path / "store", "--json")  # fmt: skip
    assert message.startswith(f"the disk is full at '{small_disk}'")
    assert nothing_left(out)


def test_two_builds_on_one_store(model: Path, tmp_path: Path) -> None:
    recipe, store = write_recipe(tmp_path / "recipe.yaml", model), tmp_path / "store"
    arguments = ["build", str(recipe), "--preset", "2of4-all", "--until", "checkpoint", "--store", str(store)]
    first = _start([*arguments, "--out", str(tmp_path / "first")])
    try:
        while not list(store.glob("locks/*")):
            assert first.poll() is None, first.communicate()
            time.sleep(0.005)
        first.send_signal(signal.SIGSTOP)  # in the middle of a stage, for as long as we need
        out = tmp_path / "second"
        message = refused(*arguments, "--out", out, "--no-wait", "--json")
        assert f"process {first.pid} is running stage" in message
        assert nothing_left(out)
        message = refused(*arguments, "--out", tmp_path / "first", "--json")
        assert message.startswith(f"process {first.pid} is building '{tmp_path / 'first'}'")
        threading.Timer(0.5, first.send_signal, [signal.SIGCONT]).start()
        assert f"process {first.pid} is making the same output; waiting for it" in done(*arguments, "--out", out).stderr
        assert first.wait(timeout=60) == 0
    finally:
        first.kill()
        first.wait()
    made = {stage.name: len(list(stage.iterdir())) for stage in (store / "entries").iterdir()}
    assert made == dict.fromkeys(("calibration", "text_check", "sparsify", "checkpoint"), 1)
    for path in (out / "checkpoint").iterdir():
        assert path.read_bytes() == (tmp_path / "first" / "checkpoint" / path.name).read_bytes()


@pytest.mark.parametrize("command", ["verify", "explain", "evaluate", "bench", "deploy", "engine"])
def test_other_commands_on_nothing(command: str, tmp_path: Path) -> None:
    missing, extra = tmp_path / "missing", (("--out", tmp_path / "out") if command == "engine" else ())
    assert str(missing) in refused(command, missing, *extra, "--json")
    missing.mkdir()
    assert str(missing) in refused(command, missing, *extra, "--json")
    assert nothing_left(tmp_path / "out")


def test_serve_without_a_repository(tmp_path: Path) -> None:
    assert "holds no triton/" in refused("serve", tmp_path)


def test_the_installed_command_ends_with_the_same_line_and_status(tmp_path: Path) -> None:
    process = _start(["build", "no/such/model", "--out", str(tmp_path / "out")])
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert (
        err == "error: no model at 'no/such/model': check the path, or give a Hugging Face id such as Qwen/Qwen3-0.6B\n"
    )
    assert nothing_left(tmp_path / "out")


def _start(arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from builder.cli.commands import main; main()", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
