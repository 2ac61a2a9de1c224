"""The image and the script of examples/two-environments: what they name exists, and the script's commands are ours."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "two-environments"
IN_THE_IMAGE = {"numpy", "pydantic", "safetensors", "torch", "transformers"}  # TensorRT-LLM's own requirements


def test_the_image_is_the_last_stable_release_with_engines_and_gets_all_that_it_lacks():
    page = (EXAMPLE / "Dockerfile").read_text()
    assert "ARG TENSORRT_LLM=1.2.1" in page
    assert "FROM nvcr.io/nvidia/tensorrt-llm/release:${TENSORRT_LLM}" in page
    for source in re.findall(r"^COPY (.*) \S+$", page, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split())
    project = (ROOT / "pyproject.toml").read_text()
    needed = re.search(r"^dependencies = \[(.*?)\]", project, re.MULTILINE | re.DOTALL)[1]
    names = {re.match(r"[\w-]+", name)[0] for name in re.findall(r'"([^"]+)"', needed)}
    installed = {re.match(r"[\w-]+", name)[0] for name in re.findall(r'"([^"]+)"', page)}
    assert names - IN_THE_IMAGE <= installed
    assert not {"nvidia-modelopt", "accelerate", "datasets"} & installed


@pytest.mark.parametrize(("backend", "part"), [("tensorrt", "checkpoint-trtllm"), ("pytorch", "checkpoint")])
def test_the_script_calibrates_outside_and_builds_the_engine_inside(tmp_path, backend, part):
    tools, out = tmp_path / "bin", tmp_path / "out"
    (out / part).mkdir(parents=True)
    tools.mkdir()
    for name in ("twofour", "docker"):
        (tools / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tools / name).chmod(0o755)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}"}
    command = [EXAMPLE / "build.sh", "recipe.yaml", str(out), backend]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    build, verify, inside, _ = done.stdout.splitlines()
    assert build == f"twofour build recipe.yaml --set engine.backend={backend} --until checkpoint --out {out}"
    assert verify == f"twofour verify {out}/{part}"
    assert inside.startswith("docker run --rm --gpus all")
    assert f"-v {out}:{out}:ro -v {out}-{backend}:{out}-{backend}" in inside
    assert inside.endswith(f"twofour engine {out}/{part} --backend {backend} --out {out}-{backend}/engine")
    assert (tmp_path / f"out-{backend}").is_dir()
