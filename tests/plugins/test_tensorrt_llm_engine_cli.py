"""TensorRT-LLM engines by the command line: where they run, without calibration, and whole builds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from builder.engines.trtllm import tensorrt
from tests.support.command import done, nothing_left, refused, twofour
from tests.support.models import write_recipe
from tests.support.trtllm_builds import BUILD, H100, ROOT, change


@pytest.fixture
def container(machine: Callable[..., None]) -> None:
    machine(tensorrt_llm="1.2.1", tensorrt="10.14.1")


def test_an_engine_runs_where_it_was_built_and_nowhere_else(
    built: Path, model: Path, tmp_path: Path, container: None, machine: Callable[..., None]
) -> None:
    engine = tmp_path / "build" / "engine"
    facts = done("engine", built / "checkpoint-trtllm", "--out", engine, "--json").json
    assert (facts["backend"], facts["tensor_parallel"]) == ("tensorrt", 2)
    assert done("verify", engine, "--json").json["violations"] == []
    done("deploy", engine.parent)
    fragment = refused("bench", engine, "--model", model)
    assert "which this process cannot open: serve it with its launch file" in fragment
    machine((replace(H100, name="NVIDIA A100", sm=80),), tensorrt_llm="1.2.1", tensorrt="10.14.1")
    fragment = (
        f"'{engine}' needs SM 90 (here: 80): use the container nvcr.io/nvidia/tensorrt-llm/release:1.2.1 on a GPU"
    )
    shutil.rmtree(engine.parent / "triton")
    assert refused("bench", engine).startswith(fragment)
    assert refused("evaluate", engine, "--data", model / "evaluation.jsonl", "--model", model).startswith(fragment)
    assert refused("deploy", engine.parent).startswith(fragment)
    assert not (engine.parent / "triton").exists()
    ended = twofour("verify", engine)
    assert ended.status == 1
    assert f"failed: [version-lock] lock.json: {fragment}" in ended.stderr
    machine(tensorrt_llm="1.1.0", tensorrt="10.13.3")
    assert "needs TensorRT-LLM 1.2.1 (here: 1.1.0), TensorRT 10.14.1 (here: 10.13.3)" in refused("bench", engine)


@pytest.mark.parametrize(("part", "backend"), [("checkpoint-trtllm", "tensorrt"), ("checkpoint", "pytorch")])
def test_engine_needs_neither_modelopt_nor_the_calibration_extra(
    built: Path, tmp_path: Path, part: str, backend: str
) -> None:
    """A process of its own, which finds the stand-in, a driver's nvidia-smi of ours, and none of those packages."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nyes 'NVIDIA H100, 9.0, 81559, 81000, 580.65' | head -2\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    hide = "import sys; sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(',')))"
    extra = "modelopt,accelerate,datasets,pulp,pyarrow,requests"
    script = f"{hide}; from builder.cli.commands import main; main()"
    fragment = [script, extra, "engine", built / part, "--out", tmp_path / "e", "--set", "tensor_parallel=2"]
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT / 'tests' / 'stand_in'}:{ROOT}",
    }
    ran = subprocess.run(
        [sys.executable, "-c", *fragment], env=environment, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, f"{backend} engine in {tmp_path / 'e'}\n"), ran.stderr
    assert json.loads((tmp_path / "e/lock.json").read_text())["tensorrt_llm"] == "1.2.1+standin"


def test_too_little_gpu_memory_is_reported_before(built: Path, tmp_path: Path, machine: Callable[..., None]) -> None:
    machine((replace(H100, memory_free=1 << 20),) * 2, tensorrt_llm="1.2.1")
    fragment = refused("engine", built / "checkpoint-trtllm", "--out", tmp_path / "e")
    assert fragment.startswith("GPU 0 (NVIDIA H100 80GB HBM3) has 0.0 GiB free and the engine needs about 1.")
    assert nothing_left(tmp_path / "e")


@pytest.mark.parametrize(
    ("code", "fragment"),
    [
        ("import os; os.kill(os.getpid(), 9)", "rank 1 was killed by SIGKILL"),
        ("print('[TRT] [E] 2: Cuda Runtime (out of memory)'); raise SystemExit(1)",
         "rank 1 ended with status 1, 'Cuda Runtime (out of memory)': the GPU ran out of memory: lower engine."),
        ("print('getPluginCreator could not find plugin: TwofourGemm version: 1'); raise SystemExit(1)",
         "'TwofourGemm': a plugin library is missing: start it through the artifact's launch files"),
    ],
    ids=["killed", "out of memory", "no plugin"],
)  # fmt: skip
def test_a_rank_that_ends_takes_the_others_with_it_and_leaves_nothing(
    built: Path, tmp_path: Path, container: None, monkeypatch: pytest.MonkeyPatch, code: str, fragment: str
) -> None:
    alive = tmp_path / "alive"
    others = f"import os, pathlib, time; pathlib.Path({str(alive)!r}).write_text(str(os.getpid())); time.sleep(60)"
    last = f"import pathlib, time\nwhile not pathlib.Path({str(alive)!r}).exists(): time.sleep(0.01)\n{code}"
    monkeypatch.setattr(tensorrt, "_rank_command", lambda *_: [sys.executable, "-c", (others, last)[_[-1]]])
    message = refused("engine", built / "checkpoint-trtllm", "--out", tmp_path / "e")
    assert fragment in message
    assert not Path(f"/proc/{alive.read_text()}").exists()
    assert nothing_left(tmp_path / "e")
    log = Path(message.split("its log: '")[1].rstrip("')"))
    assert log.is_file()
    shutil.rmtree(log.parent)


def test_a_tensorrt_build_goes_to_its_end_and_reports_what_was_proven(
    model: Path, tmp_path: Path, container: None
) -> None:
    recipe, out = write_recipe(tmp_path / "recipe.yaml", model), tmp_path / "out"
    done("build", recipe, *BUILD, "--out", out, "--store", tmp_path / "store")
    report = json.loads((out / "report/report.json").read_text())
    notes = " ".join(report["notes"])
    assert "of 10 2:4 layers: 10 picked." in notes
    assert "TensorRT picked sparse tactics for 10 layers of 10 eligible." in notes
    assert "our plugin's kernels were not timed" in notes
    assert "is that of the same checkpoint on the torch engine. Speed is not measured" in notes
    reasons = {layer["name"]: layer["reason"] for layer in report["layers"]}
    assert reasons["model.layers.1.self_attn.v_proj"] == "2:4: TensorRT timed a sparse tactic faster and picked it"
    assert reasons["lm_head"].startswith("dense")
    assert {layer["kernel"] for layer in report["layers"]} == {None}
    assert "performance" not in report
    assert report["size"]["built_bytes"] == sum(path.stat().st_size for path in (out / "engine").glob("rank*.engine"))
    assert report["accuracy"]["built"]["perplexity"] > 0
    assert (out / "triton/make_repository.py").is_file()
    assert done("verify", out, "--json").json["violations"] == []
    change(out / "engine/engine.json", lambda facts: facts.update(checkpoint_sha256="0" * 64))
    assert (
        "checkpoint-trtllm: engine/engine.json was built from other files than these" in twofour("verify", out).stdout
    )
    (layer,) = done("explain", out, "--layers", "*.0.attention.qkv", "--json").json["layers"]
    assert layer["valid_pattern"]
    assert "picked" in layer["reason"]


def test_a_speed_gate_that_cannot_be_measured_here_has_not_passed(model: Path, tmp_path: Path) -> None:
    benchmark = {"workloads": [{"input_tokens": 8, "output_tokens": 4, "concurrency": [1]}], "min_speedup": 1.2}
    recipe = write_recipe(tmp_path / "recipe.yaml", model, benchmark=benchmark)
    ended = twofour("build", recipe, *BUILD, "--set", "engine.backend=pytorch", "--out", tmp_path / "out",
                    "--store", tmp_path / "store", "--json")  # fmt: skip
    assert ended.status == 1
    assert ended.stderr.startswith(
        "failed: not measured, and at least 1.20x is required: measure it with twofour bench"
    )
    assert (tmp_path / "out/engine/twofour_sparse/layers.json").is_file()
    assert done("verify", tmp_path / "out", "--json").json["violations"] == []
    assert any("the sparse kernels were not timed" in note for note in ended.json["notes"])
