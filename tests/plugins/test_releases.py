"""Sparse layers on every release of TensorRT-LLM from 1.0 to main, each as a stand-in (tests/stand_in/README.md).

The module must compress every chosen layer and let its dense weight go, whoever calls it after loading; trtllm-serve
must take the launch script's command line; and where a release cannot do it, the message must name the cause.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from builder.engines.torch_backend import artifact
from builder.engines.trtllm import launch, pytorch, tensorrt
from builder.planning import compatibility
from tests.support import stand_ins
from tests.support.contract import SECTIONS, facts
from tests.support.pytorch_checkpoints import CONFIG, WIDE, token_ids, write_checkpoint
from tests.support.stand_ins import RELEASES, environment, job

LAYOUTS = {"one rank": (1, 1), "tensor parallel 2": (2, 1), "pipeline parallel 2": (1, 2)}
UNCOMPRESSED = "loaded this model without calling post_load_weights on it, so its 2:4 layers were not compressed"


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """{fp8: a sparse engine of docs-llama}."""
    root = tmp_path_factory.mktemp("releases")
    for fp8 in (False, True):
        checkpoint = write_checkpoint(root / f"checkpoint-{fp8}", fp8, sparse=True)
        pytorch.build(checkpoint, root / f"engine-{fp8}", CONFIG)
    return {fp8: root / f"engine-{fp8}" for fp8 in (False, True)}


@pytest.fixture(scope="module")
def expected(engines: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[bool, torch.Tensor]:
    """The torch engine's logits of the same checkpoints."""
    logits = {}
    for fp8, engine in engines.items():
        out = tmp_path_factory.mktemp("torch-engine")
        artifact.build(engine.with_name(f"checkpoint-{fp8}"), out, CONFIG)
        logits[fp8] = artifact.load(out, dtype=getattr(torch, WIDE[fp8])).logits(token_ids())
    return logits


@pytest.fixture(scope="module", params=RELEASES)
def release(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def loaded(release: str, engines: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """What a release's stand-in made of each engine in each layout, and without our hooks."""
    jobs = {
        (fp8, name): job(engine, tensor, WIDE[fp8], pipeline=pipeline)
        for fp8, engine in engines.items()
        for name, (tensor, pipeline) in LAYOUTS.items()
    }
    jobs[True, "dynamic"] = job(engines[True], force_dynamic_quantization=True)
    if release == "main":
        jobs[True, "staged"] = job(engines[True], staged=True)
    jobs[True, "without hook"] = job(engines[True], without_hook=True)  # last: it takes our methods away
    scratch = tmp_path_factory.mktemp("stand-in")
    results = stand_ins.load(scratch, token_ids(), *jobs.values(), release=release, must_work=False)
    return dict(zip(jobs, results, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_every_chosen_layer_is_compressed_and_computes_right(
    loaded: dict[Any, Any], expected: dict[bool, torch.Tensor], fp8: bool, layout: str
) -> None:
    result = loaded[fp8, layout]
    assert "error" not in result, result["error"]
    assert len(result["compressed"]) == 6 * 4
    assert {name for (_, name), elements in result["dense_elements"].items() if elements} == {"lm_head"}
    assert (result["logits"] - expected[fp8]).abs().max() < (1e-5 if fp8 else 1e-4)
    assert any("42 of 42 declared 2:4 layers have the sparse method" in line for line in result["log"])


def test_without_our_hook_no_layer_computes(loaded: dict[Any, Any]) -> None:
    assert UNCOMPRESSED in loaded[True, "without hook"]["error"]


def test_dynamic_quantization_is_refused(loaded: dict[Any, Any]) -> None:
    error = loaded[True, "dynamic"]["error"]
    assert error.startswith(
        "UserError: 'model.layers.0.self_attn.qkv_proj' is 2:4, and its inputs take the checkpoint's"
    )
    assert error.endswith("remove force_dynamic_quantization")


def test_a_load_path_that_calls_no_hook_is_named(engines: dict[bool, Path], tmp_path: Path) -> None:
    staged = job(engines[True], staged=True)
    (result,) = stand_ins.load(tmp_path, token_ids(), staged, release="main", must_work=False)
    assert UNCOMPRESSED in result["error"]
    assert "TensorRT-LLM 1.3.0rc26+standin" in result["error"]


def test_a_stand_in_has_the_methods_of_its_release_and_no_others(release: str) -> None:
    code = """
import json, sys
from tensorrt_llm._torch.modules import linear
names = json.loads(sys.argv[1])
own = linear.Linear(4, 4, skip_create_weights_in_init=False)
has = {"Linear": [n for n in names["Linear"] if hasattr(own, n)],
       "LinearMethodBase": [n for n in names["LinearMethodBase"] if hasattr(linear.LinearMethodBase, n)]}
print(json.dumps(has))
"""
    names = {section: list(SECTIONS[section]["facts"]) for section in ("Linear", "LinearMethodBase")}
    fragment = [sys.executable, "-c", code, json.dumps(names)]
    ran = subprocess.run(fragment, capture_output=True, text=True, env=environment(release), check=True)
    for section, has in json.loads(ran.stdout).items():
        assert set(has) == set(facts(section, release)), section


# -- starting trtllm-serve


def serve(engine: Path, release: str, tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs an engine's launch/serve.sh with the stand-in's trtllm-serve."""
    programs = {"python3": '"$@"', "trtllm-serve": "-c 'from tensorrt_llm.commands.serve import main; main()' \"$@\""}
    for name, arguments in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\nexec '{sys.executable}' {arguments}\n")
        (tmp_path / name).chmod(0o755)
    env = environment(release, PATH=f"{tmp_path}:{os.environ['PATH']}") | variables
    return subprocess.run([engine / "launch" / "serve.sh"], capture_output=True, text=True, env=env, check=False)


def test_trtllm_serve_takes_the_command_line_with_the_sparse_layers_registered(
    engines: dict[bool, Path], release: str, tmp_path: Path
) -> None:
    ran = serve(engines[True], release, tmp_path)
    assert ran.returncode == 0, ran.stderr
    asked = json.loads(ran.stdout)
    assert asked["release"] == release
    assert asked["class"] == "twofour_sparse.LlamaForCausalLM"
    assert (asked["model"], asked["backend"]) == (str(engines[True]), "pytorch")


@pytest.mark.parametrize("release", ["1.0", "1.1", "1.2"])
def test_trtllm_serve_takes_a_tensorrt_engines_command_line(release: str, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"backend": "tensorrt", "tensor_parallel": 2})
    launch.write(tmp_path, config, tensorrt._serve(config), "image", "tensorrt", modules=False, preload=False)
    ran = serve(tmp_path, release, tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["backend"] == "trt"


def test_workers_that_would_not_find_the_package_get_the_file_and_how_to_load_it(
    engines: dict[bool, Path],
) -> None:
    engine = engines[True]
    fragment = [
        sys.executable,
        "-m",
        "twofour_sparse",
        str(engine),
    ]  # found in the folder where it is run, and only there
    ran = subprocess.run(fragment, cwd=engine, capture_output=True, text=True, env=environment(), check=False)
    assert ran.returncode == 2
    assert ran.stderr == (
        f"error: TensorRT-LLM's workers would not find '{engine}/twofour_sparse/__init__.py', which contains the "
        f"sparse layers: start the engine with '{engine}/launch/serve.sh', or put '{engine}' on PYTHONPATH\n"
    )


def test_a_python_without_twofour_gets_the_install_command(engines: dict[bool, Path], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['plugins'] = None\n")
    env = environment()
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(engines[True]), env["PYTHONPATH"]])
    fragment = [sys.executable, "-c", "import twofour_sparse"]
    ran = subprocess.run(fragment, capture_output=True, text=True, env=env, check=False)
    assert ran.stderr.splitlines()[-1].endswith(
        "twofour_sparse/__init__.py' needs twofour in this Python: pip install twofour==0.1.0"
    )


# -- releases that nobody has checked


def write_release(directory: Path, version: str, linear: str | None = None) -> Path:
    """A release whose number nobody knows: main's stand-in, or with another linear.py."""
    shutil.copytree(stand_ins.STAND_IN / "releases" / "main", directory)
    (info,) = directory.glob("*.dist-info")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tensorrt_llm\nVersion: {version}\n")
    if linear is not None:
        (directory / "tensorrt_llm/_torch/modules/linear.py").write_text(linear)
    return directory


def test_a_newer_release_is_tried_with_a_warning(engines: dict[bool, Path], tmp_path: Path) -> None:
    newer = write_release(tmp_path / "newer", "1.9.0")
    ran = serve(engines[True], str(newer), tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["class"] == "twofour_sparse.LlamaForCausalLM"
    assert ran.stderr == (
        "warning: TensorRT-LLM 1.9.0 is newer than 1.3, the newest release that twofour was checked against: "
        "trying it\n"
    )
    assert "1.9.0 is newer than 1.3" in compatibility.check_release("pytorch", "1.9.0").reason


def test_a_newer_release_that_fails_is_named_in_the_error(engines: dict[bool, Path], tmp_path: Path) -> None:
    newer = write_release(tmp_path / "newer", "1.9.0", "class Linear: ...\n")
    ran = serve(engines[True], str(newer), tmp_path)
    assert ran.returncode != 0
    last = ran.stderr.splitlines()[-1]
    assert (
        "TensorRT-LLM 1.9.0 is newer than 1.3, the newest release that twofour was checked against, and it fails"
        in last
    )
    assert last.endswith("use the container nvcr.io/nvidia/tensorrt-llm/release:1.2.1")


def test_a_release_too_old_is_refused(engines: dict[bool, Path], tmp_path: Path) -> None:
    ran = serve(engines[True], str(write_release(tmp_path / "older", "0.21.0")), tmp_path)
    assert ran.returncode == 2
    assert ran.stderr == (
        "error: TensorRT-LLM 0.21.0 is older than 1.0: use the container nvcr.io/nvidia/tensorrt-llm/release:1.2.1\n"
    )
