"""TensorRT-LLM through the command line: what a machine without a GPU leaves, and each wrong input in one line.

With `container`, this process is as in TensorRT-LLM's container with two GPUs, and the ranks import the stand-in.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import done, nothing_left, refused, twofour
from tests.support.contract import check_flags, facts, switches
from tests.support.models import change_config
from tests.support.trtllm_builds import change


def test_the_checkpoints_verify_on_both_ranks(built: Path) -> None:
    actual = done("verify", built, "--json").json
    assert [(part["kind"], part["ranks"]) for part in actual["checkpoints"]] == [("hf", 1), ("trtllm", 2)]
    assert actual["checkpoints"][1]["sparse_layers"] == 2 * 5
    assert actual["violations"] == []


def test_the_build_command_is_left_ready_to_run_and_every_flag_is_in_the_contract(built: Path, tmp_path: Path) -> None:
    (tmp_path / "trtllm-build").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "trtllm-build").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ran = subprocess.run([built / "engine/build.sh"], capture_output=True, text=True, env=environment, check=True)
    arguments = ran.stdout.splitlines()
    check_flags(arguments, facts("trtllm-build"), switches("trtllm-build"))
    given = dict(itertools.pairwise(arguments))
    assert Path(given["--checkpoint_dir"]).samefile(built / "checkpoint-trtllm")
    assert Path(given["--model_cls_file"]).samefile(built / "engine/hooks/models.py")
    assert (given["--gemm_plugin"], given["--workers"]) == ("disable", "2")
    assert not (built / "engine/engine.json").exists()  # it is not an engine yet


def test_scripts_of_a_build_can_be_run(built: Path) -> None:
    for script in ("build.sh", "launch/serve.sh", "launch/slurm.sh", "launch/triton.sh"):
        assert os.access(built / "engine" / script, os.X_OK)


@pytest.mark.parametrize("backend", ["auto", "tensorrt"])
def test_engine_names_in_one_line_what_is_missing(
    built: Path, tmp_path: Path, machine: Callable[..., None], backend: str
) -> None:
    arguments = refused("engine", built / "checkpoint-trtllm", "--backend", backend, "--out", tmp_path / "e")
    assert arguments == (
        "engine.backend=tensorrt needs the package tensorrt_llm, which is not installed: run 'twofour engine' in the "
        "container nvcr.io/nvidia/tensorrt-llm/release:1.2.1, or use engine.backend=torch"
    )
    machine(cards=(), tensorrt_llm="1.2.1")
    arguments = refused("engine", built / "checkpoint-trtllm", "--backend", backend, "--out", tmp_path / "e")
    assert arguments.startswith("engine.backend=tensorrt needs a GPU, and there is none")
    assert nothing_left(tmp_path / "e")


def test_a_checkpoint_goes_to_the_backends_that_read_its_kind(built: Path, tmp_path: Path) -> None:
    arguments = refused("engine", built / "checkpoint", "--backend", "tensorrt", "--out", tmp_path / "e")
    assert arguments.startswith(f"'{built}/checkpoint' is a unified Hugging Face checkpoint, and tensorrt needs")
    assert "name OUT/checkpoint-trtllm of a build" in arguments
    arguments = refused("engine", built / "checkpoint-trtllm", "--backend", "pytorch", "--out", tmp_path / "e")
    assert arguments.endswith("name OUT/checkpoint of a build for engine.backend=pytorch, or use --backend tensorrt")
    assert done("engine", built / "checkpoint", "--out", tmp_path / "e", "--json").json["backend"] == "torch"


def test_ranks_are_the_checkpoints_own_unless_others_are_asked_for(built: Path, tmp_path: Path) -> None:
    arguments = refused("engine", built / "checkpoint-trtllm", "--set", "tensor_parallel=4", "--out", tmp_path / "e")
    assert "was exported for tensor_parallel 2 and engine.tensor_parallel is 4" in arguments
    arguments = refused("engine", built / "checkpoint", "--set", "tensor_parallel=2", "--backend", "torch",
                    "--out", tmp_path / "e")  # fmt: skip
    assert arguments.startswith("the torch engine runs on one device")


@pytest.mark.parametrize("command", ["plan", "build"])
@pytest.mark.parametrize(
    ("changes", "keys", "arguments"),
    [
        ({"intermediate_size": 784}, {"tensor_parallel": 8, "backend": "pytorch"},
         "'model.layers.0.mlp.down_proj' has in_features 784: tensor_parallel 8 gives each rank 98, which cuts a 2:4"),
        ({}, {"tensor_parallel": 8}, "the model has 4 attention heads, which tensor_parallel 8 does not divide"),
        ({}, {"pipeline_parallel": 3}, "the model has 2 decoder blocks, which pipeline_parallel 3 does not divide"),
    ],
)  # fmt: skip
def test_a_split_that_cannot_be_is_refused_at_plan(
    model: Path, tmp_path: Path, command: str, changes: dict[str, Any], keys: dict[str, Any], arguments: str
) -> None:
    shutil.copytree(model, tmp_path / "model")
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16} if changes else {}
    change_config(model / "config.json", tmp_path / "model/config.json", **changes, **heads)
    given = [word for key, value in keys.items() for word in ("--set", f"engine.{key}={value}")]
    place = ("--out", tmp_path / "out", "--store", tmp_path / "store") if command == "build" else ()
    message = refused(
        command, tmp_path / "model", "--preset", "2of4-all", "--set", "engine.backend=tensorrt", *given, *place
    )
    assert arguments in message
    assert f"use engine.{next(iter(keys))}=" in message
    assert nothing_left(tmp_path / "out")


def test_what_the_backend_or_the_card_cannot_do_is_reported_by_plan(model: Path) -> None:
    arguments = refused("plan", model, "--preset", "int8-2of4-all", "--set", "engine.backend=pytorch")
    assert arguments.startswith(
        "the PyTorch backend of TensorRT-LLM has no INT8 W8A8 linear layer ('unsupported quant mode')"
    )
    keys = ("--preset", "int8-2of4-all", "--set", "engine.backend=tensorrt", "--json")
    notes = done("plan", model, *keys, "--gpu", "B200").json["notes"]
    assert any(note.startswith("not on B200 ") and "rejects SmoothQuant INT8 on SM100" in note for note in notes)
    assert not any(note.startswith("not on") for note in done("plan", model, *keys, "--gpu", "A100").json["notes"])


def newer(config: dict[str, Any]) -> None:
    """As a future ModelOpt might write it, in any of the three files."""
    section = config.get("quantization_config") or config.get("quantization")
    section["quant_algo"] = "NVFP9"
    (section if "quantization_config" in config else config)["producer"] = {"name": "modelopt", "version": "1.3.0"}


@pytest.mark.parametrize(
    ("edit", "arguments"),
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
    built: Path, tmp_path: Path, kind: str, edit: Callable[[dict[str, Any]], object], arguments: str
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
    assert refused("engine", copy, "--out", tmp_path / "e").startswith(f"'{copy}/config.json': {arguments}")
    assert nothing_left(tmp_path / "e")
    ended = twofour("verify", copy)
    assert (ended.status, arguments in ended.stderr, "Traceback" in ended.stderr) == (1, True, False)


def test_the_flat_form_of_a_newer_modelopt(built: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(built / "checkpoint", copy)
    flat = {"producer": {"name": "modelopt", "version": "1.0.2"}, "quant_method": "modelopt", "quant_algo": "FP8"}
    (copy / "hf_quant_config.json").write_text(json.dumps(flat))
    arguments = refused("engine", copy, "--out", tmp_path / "e")
    assert "hf_quant_config.json is of a form that is not known here; modelopt 1.0.2 wrote it: export" in arguments


def test_tensors_of_another_dtype_than_the_configs(built: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(built / "checkpoint-trtllm", copy)
    change(copy / "config.json", lambda c: c.update(dtype="float16"))
    ended = twofour("engine", copy, "--out", tmp_path / "e")
    assert ended.status == 1
    assert ended.stderr.startswith("failed: [dtype] rank0.safetensors: 'lm_head.weight': it is BF16")
    assert nothing_left(tmp_path / "e")
