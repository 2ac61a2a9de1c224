"""TensorRT-LLM through the command line: what a machine without a GPU leaves, and each wrong input in one line.

With `container`, this process is as in TensorRT-LLM's container with two GPUs, and the ranks import the stand-in.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_contract import check_flags, switches

from builder.engines.trtllm import sparsity_report, tensorrt, version_lock
from plugins.common.nvidia_smi import Gpu
from tests.support.command import done, nothing_left, refused, twofour
from tests.support.contract import facts
from tests.support.models import change_config, cut_llama, write_recipe

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


@pytest.fixture
def container(machine: Callable[..., None]) -> None:
    machine(tensorrt_llm="1.2.1", tensorrt="10.14.1")


# a machine without a GPU


def test_the_checkpoints_verify_on_both_ranks(built: Path) -> None:
    found = done("verify", built, "--json").json
    assert [(part["kind"], part["ranks"]) for part in found["checkpoints"]] == [("hf", 1), ("trtllm", 2)]
    assert found["checkpoints"][1]["sparse_layers"] == 2 * 5
    assert found["violations"] == []


def test_the_build_command_is_left_ready_to_run_and_every_flag_is_in_the_contract(built: Path, tmp_path: Path) -> None:
    (tmp_path / "trtllm-build").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "trtllm-build").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ran = subprocess.run([built / "engine/build.sh"], capture_output=True, text=True, env=environment, check=True)
    words = ran.stdout.splitlines()
    check_flags(words, facts("trtllm-build"), switches("trtllm-build"))
    given = dict(itertools.pairwise(words))
    assert Path(given["--checkpoint_dir"]).samefile(built / "checkpoint-trtllm")
    assert Path(given["--model_cls_file"]).samefile(built / "engine/hooks/models.py")
    assert (given["--gemm_plugin"], given["--workers"]) == ("disable", "2")
    assert not (built / "engine/engine.json").exists()  # it is no engine yet


def test_scripts_of_a_build_can_be_run(built: Path) -> None:
    for script in ("build.sh", "launch/serve.sh", "launch/slurm.sh", "launch/triton.sh"):
        assert os.access(built / "engine" / script, os.X_OK)


@pytest.mark.parametrize("backend", ["auto", "tensorrt"])
def test_engine_says_in_one_line_what_is_missing(
    built: Path, tmp_path: Path, machine: Callable[..., None], backend: str
) -> None:
    words = refused("engine", built / "checkpoint-trtllm", "--backend", backend, "--out", tmp_path / "e")
    assert words == (
        "engine.backend=tensorrt needs the package tensorrt_llm, which is not installed: run 'twofour engine' in the "
        "container nvcr.io/nvidia/tensorrt-llm/release:1.2.1, or use engine.backend=torch"
    )
    machine(cards=(), tensorrt_llm="1.2.1")
    words = refused("engine", built / "checkpoint-trtllm", "--backend", backend, "--out", tmp_path / "e")
    assert words.startswith("engine.backend=tensorrt needs a GPU, and there is none")
    assert nothing_left(tmp_path / "e")


def test_a_checkpoint_goes_to_the_backends_that_read_its_kind(built: Path, tmp_path: Path) -> None:
    words = refused("engine", built / "checkpoint", "--backend", "tensorrt", "--out", tmp_path / "e")
    assert words.startswith(f"'{built}/checkpoint' is a unified Hugging Face checkpoint, and tensorrt needs")
    assert "name OUT/checkpoint-trtllm of a build" in words
    words = refused("engine", built / "checkpoint-trtllm", "--backend", "pytorch", "--out", tmp_path / "e")
    assert words.endswith("name OUT/checkpoint of a build for engine.backend=pytorch, or use --backend tensorrt")
    assert done("engine", built / "checkpoint", "--out", tmp_path / "e", "--json").json["backend"] == "torch"


def test_ranks_are_the_checkpoints_own_unless_others_are_asked_for(built: Path, tmp_path: Path) -> None:
    words = refused("engine", built / "checkpoint-trtllm", "--set", "tensor_parallel=4", "--out", tmp_path / "e")
    assert "was exported for tensor_parallel 2 and engine.tensor_parallel is 4" in words
    words = refused("engine", built / "checkpoint", "--set", "tensor_parallel=2", "--backend", "torch",
                    "--out", tmp_path / "e")  # fmt: skip
    assert words.startswith("the torch engine runs on one device")


@pytest.mark.parametrize("command", ["plan", "build"])
@pytest.mark.parametrize(
    ("changes", "keys", "words"),
    [
        ({"intermediate_size": 784}, {"tensor_parallel": 8, "backend": "pytorch"},
         "'model.layers.0.mlp.down_proj' has in_features 784: tensor_parallel 8 gives each rank 98, which cuts a 2:4"),
        ({}, {"tensor_parallel": 8}, "the model has 4 attention heads, which tensor_parallel 8 does not divide"),
        ({}, {"pipeline_parallel": 3}, "the model has 2 decoder blocks, which pipeline_parallel 3 does not divide"),
    ],
)  # fmt: skip
def test_a_split_that_cannot_be_is_refused_at_plan(
    model: Path, tmp_path: Path, command: str, changes: dict[str, Any], keys: dict[str, Any], words: str
) -> None:
    shutil.copytree(model, tmp_path / "model")
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16} if changes else {}
    change_config(model / "config.json", tmp_path / "model/config.json", **changes, **heads)
    given = [word for key, value in keys.items() for word in ("--set", f"engine.{key}={value}")]
    place = ("--out", tmp_path / "out", "--store", tmp_path / "store") if command == "build" else ()
    told = refused(
        command, tmp_path / "model", "--preset", "2of4-all", "--set", "engine.backend=tensorrt", *given, *place
    )
    assert words in told
    assert f"use engine.{next(iter(keys))}=" in told
    assert nothing_left(tmp_path / "out")


def test_what_the_backend_or_the_card_cannot_do_is_told_at_plan(model: Path) -> None:
    words = refused("plan", model, "--preset", "int8-2of4-all", "--set", "engine.backend=pytorch")
    assert words.startswith(
        "the PyTorch backend of TensorRT-LLM has no INT8 W8A8 linear layer ('unsupported quant mode')"
    )
    keys = ("--preset", "int8-2of4-all", "--set", "engine.backend=tensorrt", "--json")
    notes = done("plan", model, *keys, "--gpu", "B200").json["notes"]
    assert any(note.startswith("not on B200 ") and "refuses SmoothQuant INT8 on SM100" in note for note in notes)
    assert not any(note.startswith("not on") for note in done("plan", model, *keys, "--gpu", "A100").json["notes"])


# checkpoints that this release does not know


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def newer(config: dict[str, Any]) -> None:
    """As a ModelOpt of the future might say it, in whichever of the three files this is."""
    section = config.get("quantization_config") or config.get("quantization")
    section["quant_algo"] = "NVFP9"
    (section if "quantization_config" in config else config)["producer"] = {"name": "modelopt", "version": "1.3.0"}


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (newer, "quant_algo is 'NVFP9': only NO_QUANT, W8A8_SQ_PER_CHANNEL, FP8, "
                "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN are known here; modelopt 1.3.0 wrote it: export it again with "
                "nvidia-modelopt 0.47"),
        (lambda c: c.update(architecture="Gemma9ForCausalLM", architectures=["Gemma9ForCausalLM"]),
         "architecture is 'Gemma9ForCausalLM': only LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM"),
        (lambda c: c.update(dtype="float64"), "dtype is 'float64': only bfloat16, float16, float32 are known here"),
    ],
    ids=["newer ModelOpt", "architecture", "dtype"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["checkpoint", "checkpoint-trtllm"])
def test_a_checkpoint_that_this_release_does_not_know(
    built: Path, tmp_path: Path, kind: str, edit: Callable[[dict[str, Any]], object], words: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(built / kind, copy)
    change(copy / "config.json", lambda c: (c.pop("architectures", None) if "architecture" in c else 0, edit(c)))
    if kind == "checkpoint" and edit is newer:
        change(copy / "hf_quant_config.json", newer)
    elif kind == "checkpoint":
        change(copy / "config.json", lambda c: c.pop("architecture", None))
    else:
        change(copy / "config.json", lambda c: c.pop("architectures", None))
    assert refused("engine", copy, "--out", tmp_path / "e").startswith(f"'{copy}/config.json': {words}")
    assert nothing_left(tmp_path / "e")
    ended = twofour("verify", copy)
    assert (ended.status, words in ended.stderr, "Traceback" in ended.stderr) == (1, True, False)


def test_the_flat_form_of_a_newer_modelopt(built: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(built / "checkpoint", copy)
    flat = {"producer": {"name": "modelopt", "version": "1.0.2"}, "quant_method": "modelopt", "quant_algo": "FP8"}
    (copy / "hf_quant_config.json").write_text(json.dumps(flat))
    words = refused("engine", copy, "--out", tmp_path / "e")
    assert "hf_quant_config.json is of a form that is not known here; modelopt 1.0.2 wrote it: export" in words


def test_tensors_of_another_dtype_than_the_config_says(built: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(built / "checkpoint-trtllm", copy)
    change(copy / "config.json", lambda c: c.update(dtype="float16"))
    ended = twofour("engine", copy, "--out", tmp_path / "e")
    assert ended.status == 1
    assert ended.stderr.startswith("failed: [dtype] rank0.safetensors: 'lm_head.weight': it is BF16")
    assert nothing_left(tmp_path / "e")


# in the container


def test_an_engine_runs_where_it_was_built_and_nowhere_else(
    built: Path, model: Path, tmp_path: Path, container: None, machine: Callable[..., None]
) -> None:
    engine = tmp_path / "build" / "engine"
    facts = done("engine", built / "checkpoint-trtllm", "--out", engine, "--json").json
    assert (facts["backend"], facts["tensor_parallel"]) == ("tensorrt", 2)
    assert done("verify", engine, "--json").json["violations"] == []
    done("deploy", engine.parent)
    words = refused("bench", engine, "--model", model)
    assert "which this process cannot open: serve it as its launch file says" in words
    machine((replace(H100, name="NVIDIA A100", sm=80),), tensorrt_llm="1.2.1", tensorrt="10.14.1")
    words = f"'{engine}' needs SM 90 (here: 80): use the container nvcr.io/nvidia/tensorrt-llm/release:1.2.1 on a GPU"
    shutil.rmtree(engine.parent / "triton")
    assert refused("bench", engine).startswith(words)
    assert refused("evaluate", engine, "--data", model / "evaluation.jsonl", "--model", model).startswith(words)
    assert refused("deploy", engine.parent).startswith(words)
    assert not (engine.parent / "triton").exists()
    ended = twofour("verify", engine)
    assert ended.status == 1
    assert f"failed: [version-lock] lock.json: {words}" in ended.stderr
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
    words = [script, extra, "engine", built / part, "--out", tmp_path / "e", "--set", "tensor_parallel=2"]
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT / 'tests' / 'stand_in'}:{ROOT}",
    }
    ran = subprocess.run([sys.executable, "-c", *words], env=environment, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, f"{backend} engine in {tmp_path / 'e'}\n"), ran.stderr
    assert json.loads((tmp_path / "e/lock.json").read_text())["tensorrt_llm"] == "1.2.1+standin"


def test_too_little_gpu_memory_is_told_before(built: Path, tmp_path: Path, machine: Callable[..., None]) -> None:
    machine((replace(H100, memory_free=1 << 20),) * 2, tensorrt_llm="1.2.1")
    words = refused("engine", built / "checkpoint-trtllm", "--out", tmp_path / "e")
    assert words.startswith("GPU 0 (NVIDIA H100 80GB HBM3) has 0.0 GiB free and the engine needs about 1.")
    assert nothing_left(tmp_path / "e")


@pytest.mark.parametrize(
    ("code", "words"),
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
    built: Path, tmp_path: Path, container: None, monkeypatch: pytest.MonkeyPatch, code: str, words: str
) -> None:
    alive = tmp_path / "alive"
    others = f"import os, pathlib, time; pathlib.Path({str(alive)!r}).write_text(str(os.getpid())); time.sleep(60)"
    last = f"import pathlib, time\nwhile not pathlib.Path({str(alive)!r}).exists(): time.sleep(0.01)\n{code}"
    monkeypatch.setattr(tensorrt, "_rank_command", lambda *_: [sys.executable, "-c", (others, last)[_[-1]]])
    told = refused("engine", built / "checkpoint-trtllm", "--out", tmp_path / "e")
    assert words in told
    assert not Path(f"/proc/{alive.read_text()}").exists()
    assert nothing_left(tmp_path / "e")
    log = Path(told.split("its log: '")[1].rstrip("')"))
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
    assert layer["valid_2to4"]
    assert "picked" in layer["reason"]


def test_a_speed_gate_that_cannot_be_measured_here_has_not_passed(model: Path, tmp_path: Path) -> None:
    benchmark = {"workloads": [{"input_tokens": 8, "output_tokens": 4, "concurrency": [1]}], "min_speedup": 1.2}
    recipe = write_recipe(tmp_path / "recipe.yaml", model, benchmark=benchmark)
    ended = twofour("build", recipe, *BUILD, "--set", "engine.backend=pytorch", "--out", tmp_path / "out",
                    "--store", tmp_path / "store", "--json")  # fmt: skip
    assert ended.status == 1
    assert ended.stderr.startswith(
        "failed: not measured, and at least 1.20x is asked for: measure it with twofour bench"
    )
    assert (tmp_path / "out/engine/twofour_sparse/layers.json").is_file()
    assert done("verify", tmp_path / "out", "--json").json["violations"] == []
    assert any("the sparse kernels were not timed" in note for note in ended.json["notes"])
