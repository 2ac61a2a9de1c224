"""The comparison with llama.cpp: what is timed, the likelihood of a text, and inputs that cannot be compared."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import torch

from benchmarks.pruning.accuracy import run_script
from benchmarks.pruning.scripts.request_times import Timer, nll
from builder.config import EngineConfig
from builder.engines import registry
from calibration.evaluation.evaluate import hf_logits, perplexity
from calibration.quantization.quantize import load_model


def compare(*arguments):
    command = [sys.executable, "-m", "benchmarks.pruning.llama_cpp", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_build_is_timed_and_judged_as_its_engine_computes(docs_llama, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "hf").symlink_to(docs_llama)
    out = tmp_path / "build" / "engine"
    registry.build("torch", tmp_path / "checkpoints", out, EngineConfig(), "L4", speed_matters=False)
    windows = np.random.default_rng(0).integers(5, 1000, size=(5, 40))
    np.save(tmp_path / "tokens.npy", windows)

    measured = json.loads(
        run_script(sys.executable, "serve_twofour", str(out.parent), str(tmp_path / "tokens.npy"), "16", "4")
    )

    assert len(measured["prefill_ms"]) == len(measured["decode_ms"]) == Timer.REQUESTS - 1
    assert min(measured["prefill_ms"] + measured["decode_ms"]) > 0
    expected = perplexity(hf_logits(load_model(docs_llama).to(torch.float32)), windows)
    assert math.isclose(math.exp(measured["nll"] / measured["tokens"]), expected, rel_tol=0.02)
    assert measured["bytes"] == sum(file.stat().st_size for file in out.rglob("*.safetensors")) > 0


def test_the_likelihood_is_that_of_a_cross_entropy():
    windows, logits = np.array([[1, 0, 2]]), np.random.default_rng(0).normal(size=(1, 3, 4)).astype(np.float32)
    sums = nll(windows, logits)
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits[0, :-1]), torch.tensor(windows[0, 1:]), reduction="sum"
    )
    assert math.isclose(sums["nll"], float(expected), rel_tol=1e-6)
    assert sums["tokens"] == 2


def test_an_environment_that_cannot_be_installed_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    done = compare(tmp_path / "model.gguf", "--environment", tmp_path / "peer")
    assert done.returncode != 0
    assert "llama-cpp-python" in done.stderr
    assert "cannot be installed" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_build_that_is_none_is_named(tmp_path):
    peer = tmp_path / "peer"
    (peer / "bin").mkdir(parents=True)
    (peer / "bin" / "python").write_text("#!/bin/sh\n")  # stands for the environment of llama.cpp
    (peer / "bin" / "python").chmod(0o755)
    (peer / "complete").touch()
    done = compare(tmp_path / "model.gguf", "--build", f"ours={tmp_path}", "--environment", peer)
    assert done.returncode != 0
    assert f"--build 'ours={tmp_path}' is not a build" in done.stderr
    assert "Traceback" not in done.stderr
