"""The version lock, the launch files and what GPUs there are: all without a GPU."""

import json
import os
import shutil
import subprocess
from dataclasses import asdict, replace

import pytest

from builder import verify
from builder.config import EngineConfig
from builder.engines.trtllm import launch, tensorrt, version_lock
from plugins.common import nvidia_smi
from plugins.common.errors import UserError
from plugins.tensorrt_llm import releases
from tests.support.stand_in_checkpoint import LAYERS, write_checkpoint

CONFIG = EngineConfig(backend="tensorrt", max_batch_size=8, max_seq_len=512, max_num_tokens=1024)


BUILT = version_lock.Lock("tensorrt", "1.2.1", "10.14.1", "13.0.1", 90, gpu="NVIDIA H100", container=releases.CONTAINER)


def locked(**changes):
    return replace(BUILT, **changes)


def test_same_versions_may_run_and_a_local_label_or_cuda_minor_does_not_matter():
    assert version_lock.mismatches(locked(), locked(tensorrt_llm="1.2.1+abc", cuda="13.1.0")) == {}


@pytest.mark.parametrize(
    ("here", "fragment"),
    [
        ({"sm": 89}, "SM 90 (here: 89)"),
        ({"tensorrt": "10.16.0"}, "TensorRT 10.14.1 (here: 10.16.0)"),
        ({"tensorrt_llm": None}, "TensorRT-LLM 1.2.1 (here: none)"),
        ({"cuda": "12.9"}, "CUDA 13.0.1 (here: 12.9)"),
    ],
)
def test_mismatch_is_named(here, fragment):
    assert list(version_lock.mismatches(locked(), locked(**here)).values()) == [fragment]


def test_engine_for_another_gpu_names_the_container_and_the_gpu(tmp_path, monkeypatch):
    version_lock.write(tmp_path, locked())
    monkeypatch.setattr(version_lock, "current", lambda backend, plugin: locked(sm=80, gpu="NVIDIA A100"))
    with pytest.raises(
        UserError, match=r"needs SM 90 \(here: 80\): use the container .*release:1\.2\.1 on a GPU with SM 90"
    ):
        version_lock.require(tmp_path)


def test_other_plugin_library_is_refused():
    assert version_lock.mismatches(locked(plugin_sha256="a"), locked(plugin_sha256="b")) == {
        "plugin_sha256": "plugin library it was built with (here: another one)"
    }
    assert "missing" in version_lock.mismatches(locked(plugin_sha256="a"), locked())["plugin_sha256"]


def test_torch_engines_and_engines_without_a_lock_run_anywhere(tmp_path):
    assert version_lock.mismatches(locked(backend="torch"), locked(sm=None, tensorrt=None)) == {}
    version_lock.require(tmp_path)


@pytest.mark.parametrize("text", ['{"backend": "tensorrt"}', "[]", "{", json.dumps({**asdict(BUILT), "backend": "x"})])
def test_damaged_lock_is_refused(tmp_path, text):
    (tmp_path / "lock.json").write_text(text)
    with pytest.raises(UserError, match="is not a version lock"):
        version_lock.read(tmp_path)


def test_cuda_is_the_toolkits_where_no_wheel_brings_it(tmp_path, monkeypatch):
    monkeypatch.setattr(version_lock, "installed", lambda name: None)
    monkeypatch.setattr(version_lock, "CUDA_TOOLKIT", tmp_path / "version.json")
    assert version_lock.current("tensorrt").cuda is None
    (tmp_path / "version.json").write_text('{"cuda": {"name": "CUDA SDK", "version": "13.0.1"}}')
    assert version_lock.current("tensorrt").cuda == "13.0.1"


def test_nvidia_smi_answers_are_read_and_strange_lines_passed_over():
    text = "NVIDIA H100 80GB HBM3, 9.0, 81559, 81000, 580.65.06\nNVIDIA B200, 10.0, 183359, [N/A], 580.65.06\n"
    actual = nvidia_smi.parse(text)
    assert [(g.name, g.sm) for g in actual] == [("NVIDIA H100 80GB HBM3", 90)]
    assert actual[0].memory_total == 81559 << 20


def test_launch_scripts_are_valid_bash_and_pass_the_environment_on(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "t", mapping={"world_size": 2, "tp_size": 2, "pp_size": 1})
    out = tmp_path / "engine"
    tensorrt.prepare(checkpoint, out, CONFIG.model_copy(update={"tensor_parallel": 2}), ratios={LAYERS[0]: 2.0})
    for script in (out / "launch").iterdir():
        subprocess.run(["bash", "-n", script], check=True)
    slurm = (out / "launch/slurm.sh").read_text()
    assert "#SBATCH --ntasks=2" in slurm
    assert "trtllm-llmapi-launch trtllm-serve" in slurm


def test_serve_script_preloads_the_plugin_and_fails_without_it(tmp_path):
    out = tmp_path / "engine"
    tensorrt.prepare(write_checkpoint(tmp_path / "t"), out, CONFIG, ratios={LAYERS[0]: 2.0})
    done = subprocess.run([out / "launch/serve.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"'{out}/{launch.PLUGIN_LIBRARY}' is missing" in done.stderr
    (out / launch.PLUGIN_LIBRARY).write_bytes(b"")
    done = subprocess.run(
        ["bash", "-c", f'source "{out}/launch/env.sh" && printf %s "$LD_PRELOAD"'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{out}/{launch.PLUGIN_LIBRARY}"


STUBS = {  # each prints its arguments and then behaves as the real one
    "srun": 'while [ "$1" != bash ]; do shift; done\nexec "$@"',
    "mpirun": 'while [ "$1" != tritonserver ]; do shift; done\nexec "$@"',
    "trtllm-llmapi-launch": "exec $@",  # the real one splits at spaces too
    "trtllm-serve": 'printf "%s\\n" trtllm-serve "$@" "$LD_PRELOAD" "$PYTHONPATH"',
    "tritonserver": 'printf "%s\\n" tritonserver "$@" "$LD_PRELOAD" "$PYTHONPATH"',
}


@pytest.mark.parametrize("script", ["serve.sh", "slurm.sh", "triton.sh"])
def test_launch_scripts_start_the_server_with_the_library_and_the_module(tmp_path, script):
    """Run whole on stand-ins of ours for the programs that they start."""
    tools, engine = tmp_path / "bin", tmp_path / "engine"
    tools.mkdir()
    for name, body in STUBS.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    serve = ["trtllm-serve", "$engine", "--extra_llm_api_options", "$engine/llm_args.yaml"]
    launch.write(engine, EngineConfig(tensor_parallel=2), serve, "image", "pytorch", modules=True, preload=True)
    library = engine / launch.PLUGIN_LIBRARY
    compile_empty(library)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "ENGINE": str(engine)}
    command = [engine / "launch" / script, *(["repository"] if script == "triton.sh" else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    program, *arguments, preload, modules = done.stdout.splitlines()
    assert (preload, modules) == (str(library), str(engine))
    if script == "triton.sh":
        assert (program, arguments) == ("tritonserver", ["--model-repository=repository"])
    else:
        assert (program, arguments[0]) == ("trtllm-serve", str(engine))
        assert arguments[arguments.index("--extra_llm_api_options") + 1] == f"{engine}/llm_args.yaml"
        assert arguments[arguments.index("--port") + 1] == "8000"


def test_triton_starts_one_server_a_rank_of_a_tensorrt_engine(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "mpirun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tools / "mpirun").chmod(0o755)
    config = EngineConfig(tensor_parallel=2)
    launch.write(tmp_path, config, ["trtllm-serve", "$engine"], "image", "tensorrt", modules=False, preload=False)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}"}
    command = [tmp_path / "launch/triton.sh", "a repository", "--http-port=9000"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    arguments = done.stdout.splitlines()
    cut = arguments.index(":")
    first, second = arguments[1:cut], arguments[cut + 1 :]
    assert arguments[0] == "--allow-run-as-root"
    common = ["-n", "1", "-x", "LD_PRELOAD", "-x", "PYTHONPATH", "tritonserver", "--model-repository=a repository"]
    assert first[: len(common)] == second[: len(common)] == common
    assert [side[-1] for side in (first, second)] == ["--http-port=9000"] * 2
    assert "--backend-config=python,shm-region-prefix-name=prefix1_" in second
    assert set(second) - set(first) >= {"--model-control-mode=explicit", "--load-model=tensorrt_llm"}


def compile_empty(library):
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to make a library")
    subprocess.run(["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", library], input="", text=True, check=True)


def test_sixteen_ranks_take_two_nodes(tmp_path):
    config = EngineConfig(tensor_parallel=8, pipeline_parallel=2)
    launch.write(tmp_path, config, ["trtllm-serve", "$engine"], "image", "tensorrt", modules=False, preload=False)
    slurm = (tmp_path / "launch/slurm.sh").read_text()
    assert "#SBATCH --nodes=2" in slurm
    assert "#SBATCH --ntasks-per-node=8" in slurm
    assert "LD_PRELOAD" not in (tmp_path / "launch/env.sh").read_text()


def test_an_engine_timed_on_an_old_cusparselt_does_not_pass_verification(tmp_path):
    """TWOFOUR_CUSPARSELT_OLDEST accepts cuSPARSELt 0.8.0 for measuring; such an engine must not ship."""
    (tmp_path / "tactics.json").write_text('{"versions": {"cusparselt": 800}}')
    (violation,) = verify._check_kernel_versions(tmp_path)
    assert violation.file == "tactics.json"
    assert "cuSPARSELt 0.8.0, which is for measuring only" in violation.message
    for versions in ('{"cusparselt": 801}', '{"cusparselt": 0}', '{"cusparselt": null}', "{}", "[]"):
        (tmp_path / "tactics.json").write_text(f'{{"versions": {versions}}}')
        assert verify._check_kernel_versions(tmp_path) == []
